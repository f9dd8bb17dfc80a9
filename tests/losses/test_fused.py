"""Losses that are compiled with the network: one graph each, and the values and gradients of the plain function."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nnunet_ssl import api, losses, methods
from nnunet_ssl.compiled import compiled, fused, fusing
from nnunet_ssl.methods import dtc, mcnet, mutual_reliable, simcvd, urpc

COMPILE = torch.compile
SHAPE = (2, 3, 8, 6)
GENERATOR = torch.Generator().manual_seed(5)
LOGITS, OTHERS, FEATURES = (torch.randn(SHAPE, generator=GENERATOR) for _ in range(3))
CLASSES = torch.randint(0, 3, (2, 1, 8, 6), generator=GENERATOR)
REGIONS = torch.rand(SHAPE, generator=GENERATOR) > 0.5
MASK, MASKS = torch.rand(2, 1, 8, 6, generator=GENERATOR) > 0.3, torch.rand(SHAPE, generator=GENERATOR) > 0.3


def mutual(logits: Tensor, other: Tensor, *, regions: bool) -> Any:
    student, teacher = (mutual_reliable.lesson(z.detach(), FEATURES, regions=regions) for z in (logits, other))
    return mutual_reliable.learn(logits, student, teacher, certainty_weight=True, similarity_weight=True)


def coverage(target: Tensor, confidence: Tensor) -> Any:
    return api.coverage(api.PseudoLabel(target, confidence), 0.5, structures=3 if target.dtype == torch.bool else 2)


def sharpened(logits: Tensor, first: Tensor, second: Tensor, **options: Any) -> Tensor:
    return mcnet.mutual_loss(logits, [first, second], temperature=0.5, **options)


tasks = partial(dtc.dual_task_consistency, steepness=3.0)

# A function, what carries a gradient, other arguments, graphs.
Case = tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Any, ...], int]
CASES: dict[str, Case] = {
    "dice of classes": (api.dice_of_logits, (LOGITS,), (CLASSES.to(torch.uint8), MASK), 1),
    "dice of regions": (api.dice_of_logits, (LOGITS,), (REGIONS, MASKS), 1),
    "dice of probabilities": (api.masked_dice_loss, (LOGITS.sigmoid(),), (REGIONS, MASK), 1),
    "cross-entropy": (api.masked_cross_entropy, (LOGITS,), (CLASSES, MASK), 1),
    "cross-entropy of regions": (api.masked_cross_entropy, (LOGITS,), (REGIONS, MASKS), 1),
    "both": (api.dice_and_cross_entropy, (LOGITS,), (CLASSES, MASK), 1),
    "entropy": (partial(api.entropy, regions=False), (LOGITS,), (), 1),
    "entropy of regions": (partial(api.entropy, regions=True), (LOGITS,), (), 1),
    "entropy of probabilities": (partial(api.entropy_of_probabilities, regions=False), (LOGITS.softmax(1),), (), 1),
    "pseudo-label": (partial(api.pseudo_label, regions=False), (LOGITS,), (), 1),
    "pseudo-label of regions": (partial(api.pseudo_label, regions=True), (LOGITS,), (), 1),
    "mutual": (partial(mutual, regions=False), (LOGITS, OTHERS), (), 2),
    "mutual of regions": (partial(mutual, regions=True), (LOGITS, OTHERS), (), 2),
    "consistency": (partial(api.consistency, regions=False), (LOGITS, OTHERS), (), 1),
    "consistency of regions, masked": (partial(api.consistency, regions=True), (LOGITS, OTHERS), (MASKS,), 1),
    "sharpened": (partial(sharpened, regions=False, label_gradient=False), (LOGITS,), (OTHERS, FEATURES), 1),
    "sharpened, labels too": (partial(sharpened, regions=True, label_gradient=True), (LOGITS,), (OTHERS, FEATURES), 1),
    "pyramid": (partial(urpc.pyramid_consistency, regions=False), (torch.stack((LOGITS, OTHERS)),), (), 1),
    "pyramid of regions": (partial(urpc.pyramid_consistency, regions=True), (torch.stack((LOGITS, OTHERS)),), (), 1),
    "consistency, masked": (api.consistency_mse, (LOGITS, OTHERS), (MASK,), 1),
    "distance": (simcvd.distance_error, (LOGITS,), (OTHERS, None), 1),
    "distance, ignore label": (simcvd.distance_error, (LOGITS,), (OTHERS, MASK), 1),
    "tasks": (partial(tasks, regions=False), (LOGITS, OTHERS[:, 1:]), (), 1),
    "tasks of regions": (partial(tasks, regions=True), (LOGITS, OTHERS), (), 1),
    "coverage": (coverage, (), (CLASSES, MASK.float()), 1),
    "both of regions": (api.dice_and_cross_entropy, (LOGITS,), (REGIONS, MASK), 1),
    "coverage of regions": (coverage, (), (REGIONS, MASKS.float()), 1),
}


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Compiles; a break of a graph raises."""
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=request.param, fullgraph=True))
    forget_graphs()
    yield
    forget_graphs()


def forget_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled.cache_clear()


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_function(backend, name):
    function, with_gradient, others, graphs = CASES[name]
    found = []
    for on in (False, True):
        counters.clear()
        leaves = [tensor.clone().requires_grad_() for tensor in with_gradient]
        for _ in range(2):
            with fusing(on):
                results = tensors_of(function(*leaves, *others))
            if results[0].requires_grad:
                results[0].sum().backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        found.append([*(result.detach() for result in results), *gradients])
        assert counters["stats"]["unique_graphs"] == (graphs if on else 0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_every_compiled_function_has_a_case(monkeypatch):
    wrapper = fused(torch.relu).__code__
    paths = [(package.__path__, f"{package.__name__}.") for package in (losses, methods)]
    modules = [importlib.import_module(one.name) for path in paths for one in pkgutil.iter_modules(*path)]
    everything = itertools.chain.from_iterable(vars(module).values() for module in modules)
    found = {one for one in everything if getattr(one, "__code__", None) is wrapper}
    called = set()
    monkeypatch.setattr(torch, "compile", lambda function, **_: called.add(function) or function)
    forget_graphs()
    with fusing(True):
        for function, with_gradient, others, _ in CASES.values():
            function(*with_gradient, *others)
    forget_graphs()
    missing = sorted(f"{one.__module__}.{one.__name__}" for one in found if one.__wrapped__ not in called)
    assert len(found) > 10 and not missing, f"CASES should have {', '.join(missing)}"


def test_what_may_change_from_step_to_step_is_no_part_of_a_graph(backend):
    label = api.pseudo_label(LOGITS, regions=False)
    with fusing(True):
        counted = [api.coverage(label, threshold, structures=2)[0][0].item() for threshold in (0.0, 0.5, 0.9)]
        streams = [api.pseudo_label(logits, regions=False) for logits in (LOGITS, LOGITS.clone().requires_grad_())]
    assert counted[0] == CLASSES.numel() > counted[1] > counted[2]
    assert torch.equal(streams[0].confidence, streams[1].confidence)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_fused_function_becomes_a_part_of_the_one_that_calls_it(backend):
    @fused
    def inner(a: Tensor) -> Tensor:
        return a + 1

    @fused
    def outer(a: Tensor) -> Tensor:
        return inner(a) * inner(2 * a)

    with fusing(True):
        assert outer(torch.ones(2)).tolist() == [6.0, 6.0]
    assert counters["stats"]["unique_graphs"] == compiled.cache_info().currsize == 1
