"""Two processes on halves of a batch against one process on the joined batch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import KINDS, MODES, CrossTeaching, joined_batches, joined_masks, make, tensors_of
from method_steps import gradients_step, method_cases, of_methods

from nnunet_ssl.networks.training_network import TrainingNetwork

OUT_OF_MEMORY = "out of memory"
CASES = pytest.mark.parametrize(
    ("method", "kind", "mode"),
    [*method_cases(itertools.product(KINDS, MODES)), *itertools.product([CrossTeaching], ["2d"], MODES)],
)


@pytest.fixture(scope="module")
def ranks(request, planned_2d, planned_3d, tmp_path_factory) -> list[dict]:
    """What each process made of the cases that this session's tests ask for."""
    results = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).with_name("distributed_steps.py")
    here = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]
    cases = {(one["method"].__name__, one.get("kind", "2d"), one.get("mode", OUT_OF_MEMORY)): None for one in here}
    (results / "cases.json").write_text(json.dumps([*cases]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)),
            *map(str, (planned_2d.preprocessed, planned_3d.preprocessed, results)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(results / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def joined(planned_2d, planned_3d, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingNetwork, "draw_dropout_masks", joined_masks(None))

    def factory(method, kind):
        planned = {"2d": planned_2d, "3d": planned_3d}[kind[:2]]
        return make(method, kind, planned, monkeypatch, tmp_path)

    return factory


def assert_close(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    scale = max(tensor.abs().max() for tensor in expected.values()).item()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5 * scale, msg=name)


@CASES
def test_gradients_are_those_of_one_process_on_the_joined_batch(method, kind, mode, ranks, joined):
    first, second = (rank[method.__name__, kind, mode] for rank in ranks)
    assert first["sizes"] == second["sizes"] == (1, 2)
    trainer = joined(method, kind)
    # nnU-Net gives the coarsest output a weight of 1e-6 instead of 0 where several processes train.
    trainer.loss.weight_factors = first["loss_weights"]
    labeled, unlabeled, _ = joined_batches(trainer)
    trainer.step_gradients.memory_mode = "stacked"
    terms = gradients_step(trainer, labeled, unlabeled, trainer.loss_weights(0.0))
    expected = {n: p.grad for n, p in trainer.network.named_parameters() if p.grad is not None}
    assert_close(first["gradients"], expected)
    for name, tensor in second["gradients"].items():
        assert torch.equal(tensor, first["gradients"][name])
    for name, value in terms.items():
        torch.testing.assert_close((first["terms"][name] + second["terms"][name]) / 2, value, rtol=1e-4, atol=1e-6)
    # The comparison can fail: a rank's own gradients are others.
    with pytest.raises(AssertionError):
        assert_close(first["own"], expected)


@CASES
def test_after_steps_all_ranks_hold_the_same_and_what_one_process_would(method, kind, mode, ranks, joined):
    first, second = (rank[method.__name__, kind, mode] for rank in ranks)
    # Weights, teacher and its counter, bit for bit.
    assert list(first["after"]) == list(second["after"])
    for name, tensor in first["after"].items():
        assert torch.equal(tensor, second["after"][name]), name
    assert first["logged"] == second["logged"]

    trainer = joined(method, kind)
    trainer.loss.weight_factors = first["loss_weights"]
    before = tensors_of(trainer)
    _, _, batch = joined_batches(trainer)
    logged = [trainer.train_step(batch) for _ in range(2)][-1]
    assert first["logged"] == pytest.approx(logged, rel=1e-3, abs=1e-5)
    moved = {n: t - before[n] for n, t in tensors_of(trainer).items() if t.is_floating_point()}
    assert_close({name: first["after"][name] - before[name] for name in moved}, moved)


@of_methods()
def test_out_of_memory_on_one_rank_sends_all_to_split_mode(method, ranks):
    first, second = (rank[method.__name__, "2d", OUT_OF_MEMORY] for rank in ranks)
    assert first["mode"] == second["mode"] == "split"
    for name, tensor in first["after"].items():
        assert torch.equal(tensor, second["after"][name]), name
