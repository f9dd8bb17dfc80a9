"""A compiled step: how many graphs, and the numbers of the step that is not compiled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from method_steps import BY_NAME, METHODS, gradients_step, make_batches, make_of_table, of_methods
from torch._dynamo.utils import counters

from nnunet_ssl.compiled import compiled
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.trainer import gradients

COMPILE = torch.compile

# nnU-Net's own: the validation's forward, and its Dice with gradient and without.
NNUNETS = 1 + 2

FUSED = BY_NAME["CrossMatchTrainer"].fused[0]


def cases() -> Iterator[Any]:
    """Every method and its other networks, without checkpointing and with it, and in PyTorch's own compiler."""
    for method, checkpointing, backend in itertools.product(METHODS, (False, True), ("aot_eager", "inductor")):
        if checkpointing and backend == "inductor" and not method.representative:
            continue
        for number, (options, graphs) in enumerate(zip(({}, *method.others), method.split_graphs, strict=False)):
            fast = method.representative and backend == "aot_eager" and not number
            fast = fast and (method is METHODS[0] or not checkpointing)
            words = [f"{method.name} {options or ''}".strip()]
            words += ["checkpointing"] * checkpointing + ["inductor"] * (backend == "inductor")
            values = (method, options, graphs, checkpointing, backend)
            yield pytest.param(*values, id=", ".join(words), marks=() if fast else pytest.mark.slow)


@pytest.fixture
def make(planned_2d, monkeypatch, tmp_path):
    """A trainer that nnU-Net compiles, as it does on a GPU."""

    def factory(method, backend="aot_eager", **settings):
        monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
        monkeypatch.setattr(method, "_do_i_compile", lambda self: True)
        return make_of_table(method, planned_2d, monkeypatch, tmp_path, **settings)

    forget_graphs()
    yield factory
    forget_graphs()


def forget_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled.cache_clear()


def gradients_of(trainer, labeled, unlabeled) -> tuple[dict, dict]:
    torch.manual_seed(11)
    terms = gradients_step(trainer, labeled, unlabeled, trainer.loss_weights(1.0))
    return terms, {n: p.grad.clone() for n, p in trainer.training_network.named_parameters() if p.grad is not None}


def check_equal_to_plain(trainer, labeled, unlabeled, *, rtol=1e-4) -> None:
    """The terms and the gradients of the compiled step are those of the plain one."""
    network, mode = trainer.network, trainer.step_gradients.memory_mode
    autocast = trainer.step_gradients.autocast
    trainer.network = trainer.training_network
    trainer.prepare_steps()
    trainer.step_gradients.autocast = autocast
    terms, gradients = gradients_of(trainer, labeled, unlabeled)
    assert compiled.cache_info().currsize == 0, "losses are compiled with the network alone"
    trainer.network = network
    trainer.prepare_steps()
    trainer.step_gradients.autocast = autocast
    assert trainer.step_gradients.memory_mode == mode
    found_terms, found = gradients_of(trainer, labeled, unlabeled)
    for term, value in terms.items():
        torch.testing.assert_close(found_terms[term], value, rtol=rtol, atol=rtol / 100)
    assert set(gradients) <= set(found)
    scale = max(gradient.abs().max() for gradient in gradients.values()).item()
    for parameter, gradient in found.items():
        # The head of the lowest resolution has no loss: no gradient, or compiled one of zeros.
        expected = gradients.get(parameter, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol / 10 * scale, msg=parameter)


def validate(trainer, batch, targets) -> None:
    trainer.network.eval()
    with torch.no_grad():
        given = {"data": batch["data"], "target": [target.clone() for target in targets]}
        assert math.isfinite(trainer.validation_step(given)["loss"])
    trainer.network.train()


@pytest.mark.parametrize(("method", "settings", "graphs", "checkpointing", "backend"), cases())
def test_a_step_in_split_mode_has_a_graph_of_every_kind_of_pass_and_no_more(
    make, method, settings, graphs, checkpointing, backend
):
    trainer = make(method.trainer, backend, memory_mode="split", activation_checkpointing=checkpointing, **settings)
    labeled, unlabeled, batch = make_batches(trainer, u=2)
    check_equal_to_plain(trainer, labeled, unlabeled)
    trainer.train_step(batch)
    validate(trainer, batch, labeled.target)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert math.isfinite(trainer.train_step(batch)["loss"])
            validate(trainer, batch, labeled.target)
    assert counters["stats"]["unique_graphs"] == graphs + method.fused[0] + NNUNETS
    assert not counters["graph_break"]


def test_unlabeled_batches_of_another_size_add_one_graph_of_the_encoder(make):
    trainer = make(CrossMatchTrainer, memory_mode="split")
    _, _, batch = make_batches(trainer, u=3)
    for _ in range(2):
        trainer.train_step(batch)
    assert counters["stats"]["unique_graphs"] == 2 + 4 + FUSED + 1, "one of nnU-Net's Dice"
    assert not counters["graph_break"]


def test_a_compiled_step_that_runs_out_of_memory_goes_on_compiled(make, monkeypatch):
    trainer = make(CrossMatchTrainer)
    labeled, _, batch = make_batches(trainer, u=2)
    trainer.step_gradients.memory_mode = "stacked"

    def fail(self):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(passes_module.StackedOutputs, "finish", fail)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "split"
    validate(trainer, batch, labeled.target)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train_step(batch)
        validate(trainer, batch, labeled.target)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert compiled.cache_info().currsize == 2 + FUSED, "encode, decode, losses"


@of_methods(
    "method, options, autocast",
    [({"regions": True, "ignore": True}, False), ({"regions": True}, False), ({"ignore": True}, False), ({}, True)],
    of_representative=1,
)
def test_losses_are_compiled_in_a_stacked_step_too(make, method, options, autocast):
    trainer = make(method, memory_mode="stacked", **options)
    labeled, unlabeled, batch = make_batches(trainer, u=2)
    if autocast:  # as on a GPU
        trainer.step_gradients.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    check_equal_to_plain(trainer, labeled, unlabeled, rtol=0.05 if autocast else 1e-4)
    trainer.train_step(batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert math.isfinite(trainer.train_step(batch)["loss"])
    assert compiled.cache_info().currsize == BY_NAME[method.__name__].fused[0]
    assert not counters["graph_break"]


def test_of_several_processes_none_compiles_losses(make, monkeypatch):
    trainer = make(CrossMatchTrainer, memory_mode="stacked")
    labeled, unlabeled, _ = make_batches(trainer, u=2)
    for processes, functions in ((2, 0), (1, FUSED)):
        monkeypatch.setattr(gradients, "num_processes", lambda count=processes: count)
        trainer.prepare_steps()
        gradients_of(trainer, labeled, unlabeled)
        assert compiled.cache_info().currsize == functions
