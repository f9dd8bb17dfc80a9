"""What holds for every method: memory modes, gradients, the step, checkpoints, label kinds and architectures."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from method_steps import (
    BY_NAME,
    METHODS,
    Given,
    make_batches,
    make_of_table,
    method_cases,
    of_methods,
    summed_terms,
)

from nnunet_ssl import testing
from nnunet_ssl.compiled import compiling_with
from nnunet_ssl.errors import UserError
from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.networks.passes import StackedOutputs
from nnunet_ssl.testing import gradients_of
from nnunet_ssl.trainer.base import SemiSupervisedTrainer
from nnunet_ssl.trainer.variants import TRAINING_LENGTHS, training_length_variants


@pytest.fixture(params=method_cases())
def make(request, monkeypatch, tmp_path):
    def factory(planned, **options):
        return make_of_table(request.param, planned, monkeypatch, tmp_path, **options)

    factory.method = request.param
    return factory


def change_supervised(trainer, monkeypatch, change) -> None:
    """Apply a function to every part of the supervised term."""
    loss_terms = trainer.loss_terms

    def changed(*given):
        for part in loss_terms(*given):
            yield {name: change(value) if name == "supervised" else value for name, value in part.items()}

    monkeypatch.setattr(trainer, "loss_terms", changed)


def of_makes(names: str = "make", cases=((),), *, fast: int = 1):
    """A test of whose cases the first ones are fast for every method."""
    return of_methods(names, cases, fast=fast, indirect=["make"])


@of_makes(
    "make, dim, options",
    [
        ("planned_2d", {}),
        ("planned_3d", {}),
        ("planned_3d", {"regions": True}),
        ("planned_2d", {"ignore": True}),
        ("planned_2d", {"regions": True, "ignore": True}),
        ("planned_2d", {"residual": True}),
    ],
)
def test_split_gives_the_terms_and_gradients_of_stacked(make, dim, options, request):
    trainer = make(request.getfixturevalue(dim), ramp_length=0.0, **options)
    testing.check_split(trainer)
    labeled, unlabeled, _ = make_batches(trainer)
    terms, gradients = gradients_of(trainer, labeled, unlabeled, mode="stacked")
    assert set(terms) == set(trainer.loss_weights(0.0))
    # Every parameter has one but the head that nnU-Net's deep supervision leaves out, and the teacher's.
    missing = {n for n, _ in trainer.network.named_parameters()} - set(gradients)
    assert all("seg_layers.0." in name or "training_only.teacher." in name for name in missing)
    testing.check_gradients(trainer)


@pytest.mark.parametrize("mode", ["split", "stacked"])
def test_a_step_takes_the_gradient_of_the_weighted_sum(make, mode, planned_2d):
    trainer = make(planned_2d)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer._steps_in_epoch = 10, 10, 15
    labeled, unlabeled, _ = make_batches(trainer)
    _, found = gradients_of(trainer, labeled, unlabeled, mode=mode)

    # All terms of outputs with one graph, one weighted sum, one backward pass.
    torch.manual_seed(11)
    prepared = trainer.prepare(labeled, unlabeled)
    streams, images = trainer.streams(), trainer.images(labeled, unlabeled, prepared)
    masks = trainer.training_network.draw_dropout_masks(streams, images)
    outputs = Given(StackedOutputs(trainer.network, images, streams, masks))
    terms = summed_terms(trainer, outputs, labeled, unlabeled, prepared)
    weights = trainer.loss_weights(0.15)
    loss = sum(weights[name] * value for name, value in terms.items())
    parameters = {n: p for n, p in trainer.network.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    scale = max(g.abs().max() for g in expected if g is not None).item()
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_the_step_is_counted_clipped_and_followed_by_the_hook(make, planned_2d, monkeypatch):
    trainer = make(planned_2d)
    _, _, batch = make_batches(trainer)
    calls, hook = [], trainer.after_optimizer_step
    monkeypatch.setattr(
        trainer, "after_optimizer_step", lambda: (calls.append(trainer.optimizer.state_dict()["state"]), hook())
    )
    change_supervised(trainer, monkeypatch, lambda loss: loss * 1e6)
    trainer.train_step(batch)
    assert len(calls) == 1 and calls[0]
    assert trainer.progress == pytest.approx(1 / (250 * 1000))
    norm = torch.stack([p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(12, rel=1e-3)
    trainer.logger.log("train_losses", 0.0, 0)
    trainer.record("share", torch.tensor([1]), torch.tensor([2]))
    trainer.on_train_epoch_start()
    assert trainer._steps_in_epoch == 0 and trainer.epoch_log.counts == {}


def test_a_step_that_the_gradient_scaler_skipped_moves_nothing(make, planned_2d, monkeypatch):
    trainer = make(planned_2d)
    _, _, batch = make_batches(trainer)
    # The first step's gradients overflow, the second one's are scaled by 3.
    trainer.grad_scaler = torch.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-38)
    trainer.prepare_steps()
    change_supervised(trainer, monkeypatch, lambda loss: loss * 1e6)
    before = {n: t.clone() for n, t in [*trainer.network.named_parameters(), *trainer.network.named_buffers()]}
    trainer.train_step(batch)
    after = dict([*trainer.network.named_parameters(), *trainer.network.named_buffers()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert trainer.epoch_log.skipped_steps == 1 and updates_of_teacher(trainer) in (None, 0)
    trainer.train_step(batch)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert trainer.epoch_log.skipped_steps == 1 and updates_of_teacher(trainer) in (None, 1)


def updates_of_teacher(trainer) -> int | None:
    network = trainer.training_network
    return network.teacher.updates if "teacher" in network.training_only else None


def test_with_a_gradient_scaler_terms_that_are_not_finite_move_nothing_and_stop_after_twenty(
    make, planned_2d, monkeypatch
):
    trainer = make(planned_2d)
    _, _, batch = make_batches(trainer)
    trainer.grad_scaler = torch.GradScaler("cpu")
    trainer.prepare_steps()
    before = {n: p.clone() for n, p in trainer.network.named_parameters()}
    change_supervised(trainer, monkeypatch, lambda loss: loss * float("nan"))
    for _ in range(20):
        trainer.train_step(batch)
    with pytest.raises(RuntimeError, match=r"not finite: supervised.*l0, l1"):
        trainer.train_step(batch)
    assert all(torch.equal(p, before[n]) for n, p in trainer.network.named_parameters())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make, planned_2d, monkeypatch):
    trainer = make(planned_2d)
    _, _, batch = make_batches(trainer)
    before = {n: p.clone() for n, p in trainer.network.named_parameters()}
    # The square root of zero: 0 with an infinite gradient.
    change_supervised(trainer, monkeypatch, lambda loss: (loss * 0).sqrt())
    with pytest.raises(RuntimeError, match="not finite: the gradient"):
        trainer.train_step(batch)
    assert all(torch.equal(p, before[n]) for n, p in trainer.network.named_parameters())


def test_a_term_that_is_not_finite_stops_with_its_cases(make, planned_3d):
    trainer = make(planned_3d, ramp_length=0.0)
    _, unlabeled, batch = make_batches(trainer)
    before = {n: p.clone() for n, p in trainer.network.named_parameters()}
    for view in (unlabeled.weak, unlabeled.augmented):
        if view is not None:
            view[1] = float("nan")
    with pytest.raises(RuntimeError, match=r"not finite: .*l0, l1.*u0, u1, u2"):
        trainer.train_step(batch)
    assert all(torch.equal(p, before[n]) for n, p in trainer.network.named_parameters())


def fail_after_the_passes(monkeypatch, error: str) -> None:
    """In memory mode stacked, raise where the backward pass would begin."""

    def fail(self):
        raise RuntimeError(error)

    monkeypatch.setattr(passes_module.StackedOutputs, "finish", fail)


ENGINE = "FIND was unable to find an engine to execute this computation"


@pytest.mark.parametrize("before", [0, 2])
def test_out_of_memory_in_any_step_goes_on_in_split_mode_as_if_nothing_had_been(make, before, planned_3d, monkeypatch):
    def after_steps(*, fail: bool) -> tuple[SemiSupervisedTrainer, dict, dict]:
        trainer = make(planned_3d)
        _, _, batch = make_batches(trainer)
        torch.manual_seed(3)
        trainer.step_gradients.memory_mode = "stacked"  # as auto chooses on a GPU
        for _ in range(before):
            trainer.train_step(batch)
        with monkeypatch.context() as context:
            if fail:
                fail_after_the_passes(context, ENGINE)
            else:
                trainer.step_gradients.memory_mode = "split"
            results = [trainer.train_step(batch) for _ in range(2)]
        tensors = [*trainer.network.named_parameters(), *trainer.network.named_buffers()]
        return trainer, results[-1], dict(tensors)

    expected, logged, weights = after_steps(fail=False)
    state = torch.get_rng_state()
    found, found_logged, found_weights = after_steps(fail=True)
    assert found.step_gradients.memory_mode == "split"
    assert torch.equal(torch.get_rng_state(), state)
    assert found_logged == logged
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found_weights.items())
    # Counted once, not once for each attempt.
    assert found.epoch_log.counts.keys() == expected.epoch_log.counts.keys()
    assert all(torch.equal(counts, expected.epoch_log.counts[name]) for name, counts in found.epoch_log.counts.items())


def test_a_failed_attempt_held_the_momentum_and_left_nothing(make, planned_2d, monkeypatch):
    trainer = make(planned_2d)
    _, _, batch = make_batches(trainer)
    trainer.step_gradients.memory_mode = "stacked"
    alive, momentum = [], []
    init = passes_module.SplitOutputs.__init__

    def fail(self):
        alive.extend(weakref.ref(loss) for loss in self._losses)
        alive.extend(weakref.ref(output.full_resolution) for output in self._outputs.values())
        momentum.extend(trainer.optimizer.state)
        raise RuntimeError(ENGINE)

    def after_it(self, *args, **kwargs):
        # Before the step's passes, a method may have made others; nothing was alive then.
        assert not any(one() is not None for one in alive)
        init(self, *args, **kwargs)

    monkeypatch.setattr(passes_module.StackedOutputs, "finish", fail)
    monkeypatch.setattr(passes_module.SplitOutputs, "__init__", after_it)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "split" and alive
    assert len(momentum) == sum(parameter.requires_grad for parameter in trainer.network.parameters())


def test_only_memory_mode_auto_falls_back_and_from_memory_errors_alone(make, planned_2d, monkeypatch):
    for mode, error in (("stacked", ENGINE), ("auto", "an illegal memory access was encountered")):
        trainer = make(planned_2d, memory_mode=mode)
        _, _, batch = make_batches(trainer)
        trainer.step_gradients.memory_mode = "stacked"
        fail_after_the_passes(monkeypatch, error)
        with pytest.raises(RuntimeError, match=error):
            trainer.train_step(batch)
        assert trainer.step_gradients.memory_mode == "stacked"


@pytest.mark.parametrize("dim", ["planned_2d", "planned_3d"])
def test_training_lowers_the_loss(make, dim, request):
    trainer = make(request.getfixturevalue(dim))
    _, _, batch = make_batches(trainer)
    first = trainer.train_step(batch)
    for _ in range(15):
        last = trainer.train_step(batch)
    assert last["loss"] < first["loss"] - 0.02
    assert all(math.isfinite(value) for value in last.values())


def test_without_deep_supervision(make, planned_2d):
    trainer = make(planned_2d)
    trainer.enable_deep_supervision = False
    trainer.was_initialized = False
    trainer.initialize()
    _, _, batch = make_batches(trainer)
    assert math.isfinite(trainer.train_step(batch)["loss"])


@of_makes()
def test_resume_is_bit_for_bit(make, planned_2d, tmp_path):
    testing.check_resume(lambda: make(planned_2d), tmp_path)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(method.trainer, options, id=f"{method.name}-{options}", marks=marks)
        for method in METHODS
        for marks in ([] if method.representative else [pytest.mark.slow],)
        for options in method.others
    ],
    indirect=["make"],
)
def test_resume_with_other_settings_is_bit_for_bit(make, options, planned_2d, tmp_path):
    testing.check_resume(lambda: make(planned_2d, **options), tmp_path)


@of_makes()
def test_the_checkpoint_predicts_with_nnunets_own_network(make, planned_3d, tmp_path):
    testing.check_stock_network(lambda: make(planned_3d), tmp_path)


@of_makes("make, dim", [("planned_2d",), ("planned_3d",)])
def test_a_step_moves_weights_and_yields_every_term(make, dim, request):
    testing.check_steps(make(request.getfixturevalue(dim)))


def test_another_methods_checkpoint_is_refused(make, planned_2d, tmp_path):
    trainer = make(planned_2d)
    trainer.logger.log("ema_fg_dice", 0.5, 0)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    checkpoint = torch.load(tmp_path / "c.pth", weights_only=True)
    checkpoint["ssl"]["network"]["training_only.other"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"^Continue with nnunet_ssl .* does not contain what .*training_only\.other"):
        trainer.load_checkpoint(checkpoint)


def test_stock_weights_are_enough_to_start_from(make, planned_2d):
    trainer = make(planned_2d)
    stock = make.method.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=True
    )
    trainer.training_network.load_state_dict(stock.state_dict())
    for name, tensor in trainer.training_network.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name]), name
    if hasattr(trainer.training_network.training_only, "teacher"):
        for name, tensor in trainer.training_network.teacher.stock().state_dict().items():
            assert torch.equal(tensor, stock.state_dict()[name]), name


@of_makes()
def test_variants_of_other_lengths(make):
    name = make.method.__name__
    variants = training_length_variants(make.method)
    assert set(variants) == {name, *(f"{name}_{n}epoch{'s' if n > 1 else ''}" for n in TRAINING_LENGTHS)}
    assert all(v.__name__ == key and issubclass(v, make.method) for key, v in variants.items())


def test_the_unlabeled_batch_size_is_the_settings(make, planned_2d):
    assert make(planned_2d).unlabeled_batch_size == 2
    assert make(planned_2d, unlabeled_batch_size=5).unlabeled_batch_size == 5


def test_bfloat16_autocast_gives_finite_losses_close_to_float32(make, planned_2d, monkeypatch):
    testing.check_autocast(make(planned_2d, ramp_length=0.0))
    trainer = make(planned_2d, ramp_length=0.0)
    labeled, unlabeled, _ = make_batches(trainer)
    expected, _ = gradients_of(trainer, labeled, unlabeled, mode="stacked")
    monkeypatch.setattr(trainer.step_gradients, "autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    for mode in ("stacked", "split"):
        terms, gradients = gradients_of(trainer, labeled, unlabeled, mode=mode)
        for name, value in terms.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.05, msg=name)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "autocast", [pytest.param(False, id="float32", marks=pytest.mark.slow), pytest.param(True, id="bfloat16")]
)
def test_compile_makes_one_graph_of_a_step_and_one_of_a_validation_and_no_more(
    make, backend, autocast, planned_2d, monkeypatch
):
    trainer = make(planned_2d)
    labeled, _, batch = make_batches(trainer)
    validation = {"data": batch["data"], "target": labeled.target}
    if autocast:
        monkeypatch.setattr(trainer.step_gradients, "autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    graphs = torch._dynamo.utils.counters["stats"]
    with compiling_with(backend):
        trainer.network = torch.compile(trainer.network, fullgraph=True)
        trainer.prepare_steps()
        trainer.step_gradients.memory_mode = "stacked"
        before = graphs["unique_graphs"]
        for _ in range(3):
            trainer.network.train()
            assert math.isfinite(trainer.train_step(batch)["loss"])
            trainer.network.eval()
            with torch.no_grad():
                targets = [target.clone() for target in validation["target"]]
                assert math.isfinite(trainer.validation_step({**validation, "target": targets})["loss"])
    # Its losses are compiled apart, for labeled and unlabeled batches where a method has them of both.
    _, losses = BY_NAME[make.method.__name__].fused
    assert graphs["unique_graphs"] == before + 2 + losses


def test_a_transformer_in_the_plans_is_refused_by_name(make, planned_3d):
    trainer = make(planned_3d)
    architecture = trainer.configuration_manager.configuration["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.Primus"
    trainer.was_initialized = False
    with pytest.raises(UserError, match=r"a Primus\. Supported are PlainConvUNet and ResidualEncoderUNet"):
        trainer.initialize()
