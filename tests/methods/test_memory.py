"""The computed memory of a step against PyTorch's own allocator, and activation checkpointing, for every method."""

from __future__ import annotations

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from method_steps import BY_NAME, REPRESENTATIVES, gradients_step, make_batches, make_of_table, of_methods
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ssl.errors import MethodError
from nnunet_ssl.methods.crossmatch import CrossMatchTrainer
from nnunet_ssl.methods.mutual_reliable import MutualReliableTrainer
from nnunet_ssl.methods.simcvd import SimCVDTrainer
from nnunet_ssl.networks.training_network import TrainingNetwork
from nnunet_ssl.trainer.gradients import StepGradients
from nnunet_ssl.trainer.live_bytes import LiveBytes
from nnunet_ssl.trainer.memory import MemoryEstimate, judge, log_memory, step_bytes, trainer_of_plans

MODES = pytest.mark.parametrize("mode", ["split", "stacked"])


@pytest.fixture
def make(monkeypatch, tmp_path):
    def factory(method, planned, **options):
        return make_of_table(method, planned, monkeypatch, tmp_path, **options)

    return factory


@pytest.fixture
def larger(planned_3d, tmp_path):
    """The tiny plan with patches and features whose memory is more than that of losses and batches."""
    larger = copy.copy(planned_3d)
    larger.root = tmp_path
    larger.environment = planned_3d.environment | {"nnUNet_preprocessed": str(tmp_path / "preprocessed")}
    larger.preprocessed.mkdir(parents=True)
    for path in planned_3d.preprocessed.iterdir():
        if path.name != "nnUNetPlans.json":
            (larger.preprocessed / path.name).symlink_to(path)
    plans = json.loads((planned_3d.preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["tiny"]["patch_size"] = [24, 32, 40]
    plans["configurations"]["tiny"]["architecture"]["arch_kwargs"] |= {
        # oneDNN's copies have channels in blocks of 8 or 16, by the CPU's vector length; these fill both.
        "features_per_stage": [16, 32, 64],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }
    (larger.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return larger


# ---- the counter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
def test_storages_count_from_their_making_to_their_end(fake: bool) -> None:
    from contextlib import nullcontext

    with FakeTensorMode() if fake else nullcontext(), LiveBytes() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        view = a.view(10, 100)[2:]
        assert live.now == 4000
        b = a * 2
        assert (live.now, live.peak) == (8000, 8000)
        del a
        assert live.now == 8000, "a view holds it"
        del view, b
        assert (live.now, live.peak) == (0, 8000)


def test_what_a_backward_pass_needs_counts_until_it_ran() -> None:
    with FakeTensorMode():
        weight = torch.zeros(1000, requires_grad=True)
        with LiveBytes() as live:
            y = weight.exp()
            z = y.square()  # saves y
            loss = z.sum()
            del y, z
            assert live.now == 4000 + 4
            loss.backward()
            del loss
            assert live.now == 4000, "the gradient"
            assert live.peak >= 3 * 4000


def test_a_convolutions_tensors_count_twice_while_it_runs() -> None:
    with FakeTensorMode():
        convolution = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False)
        with LiveBytes() as live:
            image = torch.zeros(1, 1, 16, 16)
            output = convolution(image)
            assert live.now == 4 * (256 + 512)
            assert live.peak == 2 * live.now
            del output


# ---- the step -------------------------------------------------------------------------------------------------------


def allocated(trainer, batch, tmp_path) -> int:
    """The most that PyTorch's own allocator gave out during a step, above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    trainer.train_step(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.train_step(batch)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e["ts"], index, e["args"]["Bytes"]) for index, e in enumerate(events) if e["name"] == "[memory]")
    now = peak = 0
    for _, _, size in memory:
        now += size
        peak = max(peak, now)
    return peak


@of_methods("method, mode, checkpointing", [("split", False), ("split", True), ("stacked", False)])
def test_the_computed_memory_is_what_pytorch_allocates(make, larger, tmp_path, method, mode, checkpointing) -> None:
    trainer = make(method, larger, memory_mode=mode, activation_checkpointing=checkpointing)
    _, _, batch = make_batches(trainer, u=trainer.unlabeled_batch_size)
    computed = step_bytes(trainer, mode, mixed_precision=False)
    momentum = 4 * trained_parameters(trainer.network)
    real = allocated(trainer, batch, tmp_path)
    assert computed.peak - computed.before - momentum == pytest.approx(real, rel=0.06)


def trained_parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def test_what_is_there_before_the_step(make, planned_2d) -> None:
    trainer = make(SimCVDTrainer, planned_2d)
    patch = 24 * 24
    # Image, targets, and for each class a distance map and its place.
    labeled = 2 * (4 * patch + 2 * patch + 2 * patch // 4 + 2 * (2 * patch + 8))
    unlabeled = 2 * 4 * patch + 2 * 8  # the weak view, and partners
    state = [*trainer.network.parameters(), *trainer.network.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state)
    for mixed in (False, True):
        assert step_bytes(trainer, "split", mixed_precision=mixed).before == labeled + unlabeled + weights


def test_more_of_everything_needs_more(make, larger) -> None:
    def peak(method, mode, *, mixed=True, checkpointing=None, **settings) -> int:
        trainer = make(method, larger, **settings)
        return step_bytes(trainer, mode, mixed_precision=mixed, activation_checkpointing=checkpointing).peak

    supervised = peak(CrossMatchTrainer, "supervised")
    split = peak(CrossMatchTrainer, "split")
    stacked = peak(CrossMatchTrainer, "stacked")
    assert supervised < split < 1.5 * supervised
    assert 3 * split < stacked
    assert 0.5 < split / peak(CrossMatchTrainer, "split", mixed=False) < 0.7
    assert peak(CrossMatchTrainer, "split", unlabeled_batch_size=4) > 1.7 * split
    checkpointed = peak(CrossMatchTrainer, "split", checkpointing=True)
    assert checkpointed < 0.8 * split
    assert peak(CrossMatchTrainer, "split", activation_checkpointing=True) == checkpointed
    two, three = (
        [peak(MutualReliableTrainer, mode, decoders=count) for mode in ("split", "stacked")] for count in (2, 3)
    )
    assert three[0] < 1.15 * two[0] and three[1] > 1.3 * two[1]


@of_methods()
def test_nothing_is_changed(make, planned_2d, method) -> None:
    trainer = make(method, planned_2d)
    before = dict(vars(trainer))
    weights = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for mode in ("supervised", "split", "stacked"):
        step_bytes(trainer, mode, mixed_precision=True, activation_checkpointing=True)
    assert vars(trainer).keys() == before.keys()
    assert all(vars(trainer)[name] is value for name, value in before.items())
    assert not trainer.epoch_log.counts
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.network.named_parameters())
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@MODES
@pytest.mark.parametrize("method", REPRESENTATIVES, ids=lambda method: method.__name__)
def test_half_precision_is_that_of_autocast(make, larger, monkeypatch, mode, method) -> None:
    """A CPU's autocast casts as a GPU's does, but for a few operations that these methods have little of."""
    trainer = make(method, larger)
    computed = step_bytes(trainer, mode, mixed_precision=True).peak
    monkeypatch.setattr("nnunet_ssl.trainer.gradients.nullcontext", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert computed == pytest.approx(step_bytes(trainer, mode, mixed_precision=False).peak, rel=0.03)


@of_methods(
    "method, options",
    [({"regions": True},), ({"ignore": True},), ({"regions": True, "ignore": True},), ({"residual": True},)],
)
def test_every_kind_of_labels_and_network(make, planned_2d, method, options) -> None:
    plain = step_bytes(make(method, planned_2d), "split", mixed_precision=True).peak
    found = step_bytes(make(method, planned_2d, **options), "split", mixed_precision=True).peak
    # A residual block keeps more; labels change little.
    assert 0.8 * plain < found < (2.5 if "residual" in options else 1.3) * plain


@of_methods()
def test_without_deep_supervision(make, planned_2d, method) -> None:
    trainer = make(method, planned_2d)
    expected = step_bytes(trainer, "split", mixed_precision=False).peak
    trainer.enable_deep_supervision = False
    assert 0.5 * expected < step_bytes(trainer, "split", mixed_precision=False).peak < expected


@of_methods()
def test_a_trainer_of_plans_has_the_step_of_an_initialized_one(make, planned_2d, method) -> None:
    initialized = make(method, planned_2d)
    plans = PlansManager(initialized.plans_manager.plans)
    of_plans = trainer_of_plans(method, plans, "tiny", initialized.dataset_json)
    for mode in ("supervised", "split", "stacked"):
        assert step_bytes(of_plans, mode, mixed_precision=True) == step_bytes(initialized, mode, mixed_precision=True)


# ---- what is said of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "mode", "fits", "expected"),
    [
        (50, "auto", True, "stacked should fit into 50.0 GB"),
        (50, "stacked", True, "stacked should fit"),
        (50, "split", True, "split should fit"),
        (49, "auto", True, "auto changes to split if needed"),
        (40, "auto", True, "auto changes to split if needed"),
        (39, "auto", True, "auto starts in split, because stacked needs more"),
        (20, "auto", True, "auto starts in split"),
        (20, "stacked", False, 'set "memory_mode"'),
        (20, "split", True, "split should fit into 20.0 GB"),
        (14, "auto", False, 'set "activation_checkpointing": true, for about 9.0 GB'),
        (14, "split", False, 'set "activation_checkpointing": true'),
        (14, "stacked", False, 'set "memory_mode": "split" and "activation_checkpointing": true'),
        (11, "auto", False, "-gpu_memory_target"),
        (11, "stacked", False, '"unlabeled_batch_size"'),
        (11, "split", False, "in any memory mode"),
    ],
)
def test_memory_is_judged_with_headroom(free, mode, fits, expected) -> None:
    estimate = SimpleNamespace(stacked=40, split=12, split_checkpointed=9)
    verdict = judge(estimate, free, mode)
    assert (verdict.fits, expected in verdict.text) == (fits, True)


def logged(trainer, monkeypatch, *, free: int) -> str:
    """What the start of a training on a GPU with so much free memory, and 1 kB in PyTorch's hands, would log."""
    lines: list[str] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *text: lines.append(" ".join(map(str, text))))
    trainer.start_split = log_memory(trainer)
    (line,) = lines
    return line


def test_the_start_says_which_mode_fits(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d, memory_mode="stacked")
    estimate = MemoryEstimate(trainer)
    assert (estimate.labeled, estimate.unlabeled) == (2, 2)
    assert estimate.supervised < estimate.split_checkpointed < estimate.split < estimate.stacked
    assert "Stacked should fit into 10.0 GB" in logged(trainer, monkeypatch, free=10**10)
    assert 'set "memory_mode"' in logged(trainer, monkeypatch, free=int(1.3 * estimate.split * 1e9))
    assert "-gpu_memory_target" in logged(trainer, monkeypatch, free=int(estimate.split_checkpointed * 1e9))


def test_a_mistake_of_the_method_is_raised_at_the_start(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)
    monkeypatch.setattr(trainer, "loss_weights", lambda progress: {"supervised": 1.0})
    with pytest.raises(MethodError, match="has no weight"):
        logged(trainer, monkeypatch, free=10**10)


def test_auto_starts_in_split_where_stacked_needs_more_than_there_is(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)
    stacked = int(MemoryEstimate(trainer).stacked * 1e9)
    for free, expected in ((stacked + 10_000, False), (stacked - 10_000, True)):
        logged(trainer, monkeypatch, free=free)
        assert trainer.start_split == expected
    for mode in ("stacked", "split"):
        trainer = make(CrossMatchTrainer, planned_2d, memory_mode=mode)
        logged(trainer, monkeypatch, free=stacked - 10_000)
        assert not trainer.start_split


@pytest.mark.parametrize(("over_processes", "expected"), [(True, "split"), (False, "stacked")])
def test_auto_tries_nothing_where_batch_normalization_waits_for_other_processes(over_processes, expected) -> None:
    unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1, norm_op=nn.BatchNorm2d)
    network = TrainingNetwork(unet, teacher=True)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if over_processes else network
    gpu = torch.device("cuda")
    assert StepGradients(None, network, device=gpu, memory_mode="auto").memory_mode == expected
    assert StepGradients(None, network, device=gpu, memory_mode="stacked").memory_mode == "stacked"


@pytest.mark.parametrize("too_large", [True, False])
def test_the_start_goes_to_split_and_says_so(make, planned_2d, monkeypatch, too_large) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)
    trainer.step_gradients.memory_mode = "stacked"  # as auto chooses on a GPU
    lines: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *text: lines.append(" ".join(map(str, text))))
    monkeypatch.setattr("nnunet_ssl.trainer.base.log_memory", lambda given: too_large)
    monkeypatch.setattr("nnunet_ssl.trainer.base.prepare_unlabeled_cases", lambda *arguments, **options: sys.exit())
    with pytest.raises(SystemExit):
        trainer.on_train_start()
    expected = "split" if too_large else "stacked"
    assert trainer.step_gradients.memory_mode == expected and lines[-1] == f"Memory mode: {expected}"


def test_without_an_estimate_training_goes_on(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)

    def broken(self):
        raise ValueError("no streams")

    monkeypatch.setattr(CrossMatchTrainer, "streams", broken)
    line = logged(trainer, monkeypatch, free=10**10)
    assert line == "No estimate of the GPU memory of a step (ValueError: no streams)"
    assert not trainer.start_split


def test_on_a_cpu_nothing_is_said_and_nothing_computed(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *text: pytest.fail(str(text)))
    monkeypatch.setattr(CrossMatchTrainer, "streams", lambda self: pytest.fail("computed"))
    log_memory(trainer)


def test_the_start_says_it_before_it_preprocesses(make, planned_2d, monkeypatch) -> None:
    trainer = make(CrossMatchTrainer, planned_2d)
    order: list[str] = []

    def preprocess(*arguments, **options):
        order.append("preprocess")
        raise SystemExit

    monkeypatch.setattr("nnunet_ssl.trainer.base.log_memory", lambda given: order.append("memory"))
    monkeypatch.setattr("nnunet_ssl.trainer.base.prepare_unlabeled_cases", preprocess)
    with pytest.raises(SystemExit):
        trainer.on_train_start()
    assert order == ["memory", "preprocess"]


# ---- activation checkpointing ---------------------------------------------------------------------------------------


def gradients_of(trainer, labeled, unlabeled) -> tuple[dict, dict]:
    torch.manual_seed(11)
    terms = gradients_step(trainer, labeled, unlabeled, trainer.loss_weights(1.0))
    return terms, {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}


@of_methods(
    "method, dim, residual, mode",
    [
        (dim, residual, mode)
        for dim, residual in [("planned_2d", False), ("planned_3d", False), ("planned_2d", True)]
        for mode in ("split", "stacked")
    ],
)
def test_checkpointing_changes_no_number(make, request, method, mode, dim, residual) -> None:
    trainer = make(method, request.getfixturevalue(dim), memory_mode=mode, residual=residual)
    labeled, unlabeled, _ = make_batches(trainer)
    terms, gradients = gradients_of(trainer, labeled, unlabeled)
    trainer.training_network.activation_checkpointing = True
    state = torch.get_rng_state()
    again, recomputed = gradients_of(trainer, labeled, unlabeled)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, terms[name]) for name, value in again.items())
    assert set(recomputed) == set(gradients)
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_checkpointing_keeps_what_a_dropout_of_the_plans_drew(make, planned_2d) -> None:
    """nnU-Net's plans may put dropout into the network; computed again, it has to drop the same."""
    trainer = make(CrossMatchTrainer, planned_2d, memory_mode="split")
    for stage in (*trainer.training_network.encoder.stages, *trainer.training_network.decoder.stages):
        stage.append(torch.nn.Dropout(0.5)) if isinstance(stage, torch.nn.Sequential) else stage.convs.append(
            torch.nn.Dropout(0.5)
        )
    labeled, unlabeled, _ = make_batches(trainer)
    terms, gradients = gradients_of(trainer, labeled, unlabeled)
    trainer.training_network.activation_checkpointing = True
    again, recomputed = gradients_of(trainer, labeled, unlabeled)
    assert all(torch.equal(value, terms[name]) for name, value in again.items())
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_setting_switches_it_on(make, planned_2d) -> None:
    assert not make(CrossMatchTrainer, planned_2d).training_network.activation_checkpointing
    assert make(CrossMatchTrainer, planned_2d, activation_checkpointing=True).training_network.activation_checkpointing


@pytest.mark.slow
@of_methods()
def test_compile_takes_a_checkpointed_network_in_one_graph(make, planned_2d, method) -> None:
    trainer = make(method, planned_2d, memory_mode="stacked", activation_checkpointing=True)
    _, _, batch = make_batches(trainer)
    torch._dynamo.reset()
    trainer.network = torch.compile(trainer.network, backend="aot_eager", fullgraph=True)
    trainer.prepare_steps()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for _ in range(2):
        assert math.isfinite(trainer.train_step(batch)["loss"])
    # Its losses are compiled apart, for labeled and unlabeled batches where a method has them of both.
    assert graphs["unique_graphs"] == before + 1 + BY_NAME[method.__name__].fused[1]
