"""What the authors of methods need of the base, by methods written as someone else would, and mistakes named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from author_methods import MeanTeacher, TwoNetworks
from method_steps import make_short
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl import testing
from nnunet_ssl.api import (
    CutMix,
    MethodError,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    Stream,
    TrainingNetwork,
    Views,
    another_decoder,
    consistency_mse,
    dice_and_cross_entropy,
    entropy,
    masked_cross_entropy,
    masked_dice_loss,
    random_boxes,
    setting,
    voxelwise_cross_entropy,
)
from nnunet_ssl.cli.training_checks import check_memory as doctors_check_memory
from nnunet_ssl.networks import passes as passes_module
from nnunet_ssl.testing import make_batches, stages_of, tiny_plans, tiny_trainers
from nnunet_ssl.testing.checks import check_gradients
from nnunet_ssl.trainer.memory import step_bytes

METHODS = pytest.mark.parametrize("method", [MeanTeacher, TwoNetworks], ids=lambda method: method.__name__)


@pytest.fixture
def made():
    """Trainers of the tiny plans in 2D."""
    opened = []

    def factory(method, **options):
        context = tiny_trainers(method, **({"dim": 2} | options))
        opened.append(context)
        return context.__enter__()()

    yield factory
    for context in opened:
        context.__exit__(None, None, None)


# ---- the methods conform --------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    ("dim", "labels"), [(2, "classes"), (2, "regions and ignore"), (3, "classes")], ids=lambda value: str(value)
)
def test_gradients_memory_modes_and_the_estimate(method, dim, labels, made) -> None:
    testing.check_gradients(made(method, dim=dim, labels=labels))
    testing.check_split(made(method, dim=dim, labels=labels))
    testing.check_memory(made(method, dim=dim, labels=labels))


@METHODS
def test_steps_checkpoints_mixed_precision_and_compile(method, made, tmp_path) -> None:
    testing.check_steps(made(method))
    testing.check_autocast(made(method))
    testing.check_compiled(made(method))
    with tiny_trainers(method, dim=2) as make:
        testing.check_resume(make, tmp_path)
        testing.check_stock_network(make, tmp_path)


def test_a_method_that_fails_checks_hears_of_every_one(monkeypatch) -> None:
    class Broken(MeanTeacher):
        def after_optimizer_step(self):
            pass

        def loss_weights(self, progress):
            return {**super().loss_weights(progress), "never": 1.0}

    some = ("2D, a step of every stage", "2D, the checkpoint", "2D, classes, split as stacked")
    checks = testing._checks
    monkeypatch.setattr(testing, "_checks", lambda *given: (one for one in checks(*given) if one[0] in some))
    with pytest.raises(testing.NotConforming, match=r"Broken fails 2 checks") as raised:
        testing.check_method(Broken)
    of_both = "- 2D, a step of every stage; 2D, the checkpoint: MethodError: The network has a teacher"
    assert of_both in str(raised.value) and str(raised.value).count("did not move") == 1
    monkeypatch.setattr(Broken, "after_optimizer_step", MeanTeacher.after_optimizer_step)
    with pytest.raises(testing.NotConforming, match=r"1 checks:\n- 2D, a step .*never yields never"):
        testing.check_method(Broken)
    testing.check_method(MeanTeacher)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda labeled, _: labeled.image.mul_(2), r"labeled\.image"),
        (lambda labeled, _: labeled.target[1].fill_(0), r"labeled\.target\[1\]"),
        (lambda _, unlabeled: unlabeled.weak.add_(1), r"unlabeled\.weak"),
    ],
)
def test_a_batch_that_is_changed_in_place_is_named(change, name, made) -> None:
    def images(self, labeled, unlabeled, prepared):
        change(labeled, unlabeled)
        return MeanTeacher.images(self, labeled, unlabeled, prepared)

    trainer = made(_with(images=images))
    with pytest.raises(AssertionError, match=rf"a hook changes {name} in place; work on a copy"):
        check_gradients(trainer)


# ---- prepare --------------------------------------------------------------------------------------------------------


def test_what_is_prepared_reaches_images_and_terms_and_carries_no_gradient(made) -> None:
    trainer = made(MeanTeacher)
    labeled, unlabeled, _ = make_batches(trainer)
    torch.manual_seed(1)
    prepared = trainer.prepare(labeled, unlabeled)
    assert not prepared.mean.requires_grad
    torch.testing.assert_close(prepared.mean.sum(1), torch.ones(3, 24, 24))
    stream = Stream("any", dropout=0.5, teacher=True, gradient=False)
    one, two = (trainer.without_gradient(unlabeled.weak, stream).logits for _ in range(2))
    assert not torch.equal(one, two), "each pass draws its own dropout"
    plain = trainer.without_gradient(unlabeled.weak, Stream("any", teacher=True, gradient=False)).logits
    with torch.no_grad():
        teacher = trainer.training_network.teacher
        torch.testing.assert_close(plain, teacher.decoder(teacher.encoder(unlabeled.weak))[0])
    found, terms = [], []
    images, loss_terms = trainer.images, trainer.loss_terms
    trainer.images = lambda *given: found.append(given[-1]) or images(*given)
    trainer.loss_terms = lambda *given: terms.append(given[-1]) or loss_terms(*given)
    trainer.step_gradients(labeled, unlabeled, prepared, trainer.loss_weights(1.0))
    assert found == [prepared] and found[0] is terms[0] is prepared


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_a_term_that_a_stage_does_not_have_is_nan_in_its_epochs_and_all_is_drawn(planned_2d, environment, tmp_path):
    os.environ["nnUNet_n_proc_DA"] = "0"
    trainer = make_short(TwoNetworks, planned_2d, tmp_path, epochs=2, steps=2)
    trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging
    mutual = logged["ssl/loss/mutual"]
    assert len(mutual) == 2 and math.isnan(mutual[0]) and math.isfinite(mutual[1])
    assert np.isfinite(logged["ssl/loss/distance"]).all() and np.isfinite(logged["ssl/loss/total"]).all()
    assert (Path(trainer.output_folder) / "progress_ssl.png").stat().st_size > 10_000
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert "Stage together" in log.read_text()


def test_the_estimate_is_that_of_the_largest_stage(made) -> None:
    trainer = made(TwoNetworks)

    def peak(stages: tuple[str, ...], mode: str) -> int:
        trainer.stages = lambda: stages
        return step_bytes(trainer, mode, mixed_precision=False).peak

    for mode in ("split", "stacked"):
        alone, together = peak(("alone",), mode), peak(("together",), mode)
        assert alone < together == peak(("alone", "together"), mode) == peak(("together", "alone"), mode)


def test_doctor_estimates_a_method_with_stages() -> None:
    plans, dataset_json = tiny_plans(dim=2)
    (finding, *_) = doctors_check_memory(TwoNetworks, PlansManager(plans), "tiny", dataset_json)
    assert "TwoNetworks split" in finding.text and "batches of 2 + 2" in finding.text


def test_a_stage_that_is_none_is_named(made, monkeypatch) -> None:
    trainer = made(TwoNetworks)
    _, _, batch = make_batches(trainer)
    monkeypatch.setattr(trainer, "stage", lambda progress: "alnoe")
    with pytest.raises(MethodError, match=r"'alnoe', which is none of stages.*: alone, together"):
        trainer.train_step(batch)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    results = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).with_name("author_steps.py")
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), script, results],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(results / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_two_processes_hold_the_same_second_network_in_every_stage(ranks, mode) -> None:
    first, second = (rank[mode] for rank in ranks)
    assert list(first["after"]) == list(second["after"])
    for name, tensor in first["after"].items():
        assert torch.equal(tensor, second["after"][name]), name
    of_b = [name for name in first["after"] if name.startswith("training_only.network_b.")]
    assert any(not torch.equal(first["after"][name], first["before"][name]) for name in of_b)
    assert first["mode"] == second["mode"] == mode
    assert first["images"] != second["images"]


def test_a_new_stage_is_tried_again_before_two_processes_go_to_split(ranks) -> None:
    for rank in ranks:
        assert rank["out of memory"]["modes"] == ["stacked", "stacked", "split", "split"]
        for name, tensor in rank["out of memory"]["after"].items():
            assert torch.equal(tensor, ranks[0]["out of memory"]["after"][name]), name


# ---- a second network, a teacher ------------------------------------------------------------------------------------


def test_a_second_network_is_in_the_checkpoint_and_learns_by_deep_supervision(made, tmp_path) -> None:
    trainer = made(TwoNetworks)
    labeled, unlabeled, _ = make_batches(trainer)
    state = trainer.training_network.training_state()
    assert {"encoder", "decoder"} <= {n.split(".")[2] for n in state if n.startswith("training_only.network_b.")}
    a, b = trainer.training_network.encoder, trainer.training_network.training_only["network_b"].encoder
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)), "drawn apart"
    *_, together = stages_of(trainer)
    assert together == "together"
    _, gradients = testing.gradients_of(trainer, labeled, unlabeled, mode="split")
    # The head of half the resolution learns from the unlabeled images' outputs too.
    heads = [name for name in gradients if "network_b.decoder.seg_layers" in name]
    assert len(heads) == 4 and all(gradients[name].abs().max() > 0 for name in heads)


@pytest.mark.parametrize("predict_with", ["student", "teacher"])
def test_the_default_moves_the_teacher_and_the_setting_says_who_predicts(made, predict_with) -> None:
    trainer = made(MeanTeacher, ema_decay=0.9, predict_with=predict_with)
    network = trainer.training_network
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    before = [p.clone() for p in network.teacher.encoder.parameters()]
    trainer.train_step(batch)
    assert network.teacher.updates == 2
    # min(0.9, 1 - 1 / 2)
    for old, moved, student in zip(
        before, network.teacher.encoder.parameters(), network.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(moved, 0.5 * old + 0.5 * student.detach())
    source = network.teacher if predict_with == "teacher" else network
    state = network.state_dict()
    for part in ("encoder", "decoder"):
        for name, tensor in getattr(source, part).named_parameters(prefix=part):
            assert torch.equal(tensor, state[name]), name
    with torch.no_grad():
        expected = source.decoder(source.encoder(batch["data"]))[0]
        assert torch.equal(network(batch["data"])[0], expected)


@pytest.mark.parametrize(
    ("predict_with", "other"), [("student", "teacher"), pytest.param("teacher", "student", marks=pytest.mark.slow)]
)
def test_student_and_teacher_are_both_validated(planned_2d, environment, tmp_path, predict_with, other) -> None:
    trainer = make_short(MeanTeacher, planned_2d, tmp_path, predict_with=predict_with, validate_both=True)
    os.environ["nnUNet_def_n_proc"] = "1"
    trainer.inference_allowed_mirroring_axes = (0,)
    with torch.no_grad():  # student and teacher that see opposite classes everywhere
        trainer.training_network.decoder.seg_layers[-1].bias += torch.tensor([50.0, 0.0, 0.0])
        trainer.training_network.teacher.decoder.seg_layers[-1].bias += torch.tensor([0.0, 50.0, 0.0])
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["validation", f"validation_{other}"]
    predicted = {
        name: json.loads((folder / name / "summary.json").read_text())["mean"]["1"]["n_pred"]
        for name in ("validation", f"validation_{other}")
    }
    assert (predicted["validation"] > 0) == (predict_with == "teacher")
    assert (predicted[f"validation_{other}"] > 0) == (other == "teacher")
    assert trainer.training_network.predict_with_teacher == (predict_with == "teacher")


# ---- mistakes -------------------------------------------------------------------------------------------------------


def _with(**changes):
    return type("Mistaken", (MeanTeacher,), changes)


def _images(change):
    return lambda self, *given: change(MeanTeacher.images(self, *given))


def _terms(*parts):
    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        for part in parts:
            yield part(self, outputs, labeled)

    return loss_terms


def _supervised(self, outputs, labeled):
    return {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}


@dataclass(frozen=True)
class NoTeacherSettings(SemiSupervisedSettings):
    passes: int = setting(3, "passes of the teacher", minimum=1, integer=True)


MISTAKES = {
    "a term without weight": (
        _with(loss_weights=lambda self, progress: {"supervised": 1.0}),
        r"'consistency' has no weight: loss_weights\(\) returns 'supervised'",
    ),
    "no supervised term": (
        _with(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs["u"].logits.mean()})),
        "yields no term 'supervised', only consistency",
    ),
    "an image that is not returned": (
        _with(images=_images(lambda images: {"x": images["x"]})),
        r"stream 'u' decodes the image 'u', which images\(\) does not return; it returns 'x'",
    ),
    "images of unequal size": (
        _with(images=_images(lambda images: {**images, "u": images["u"][..., :-4]})),
        r"unequal sizes, channels first: 'x' \(1, 24, 24\), 'u' \(1, 24, 20\)",
    ),
    "a lone zero term": (
        _with(loss_terms=_terms(_supervised, lambda self, outputs, _: {"consistency": torch.zeros(())})),
        "with 'consistency' does not depend on any stream with gradient",
    ),
    "a detached term": (
        _with(loss_terms=_terms(_supervised, lambda self, o, _: {"consistency": o["u"].logits.detach().mean()})),
        "with 'consistency' does not depend on any stream with gradient",
    ),
    "a term that is no scalar": (
        _with(loss_terms=_terms(lambda self, outputs, _: {"supervised": outputs["u"].logits})),
        r"'supervised' has the shape \(3, 3, 24, 24\)",
    ),
    "a term that is a number": (
        _with(loss_terms=_terms(lambda self, o, labeled: {**_supervised(self, o, labeled), "consistency": 0.0})),
        "'consistency' is of the type float, not a tensor. Leave out a term",
    ),
    "no dictionary": (
        _with(loss_terms=_terms(lambda self, o, labeled: _supervised(self, o, labeled)["supervised"])),
        r"loss_terms\(\) yields a value of the type Tensor",
    ),
    "an empty dictionary": (_with(loss_terms=_terms(lambda *_: {})), r"loss_terms\(\) yields an empty dictionary"),
    "no generator": (
        _with(loss_terms=lambda self, outputs, labeled, *_: _supervised(self, outputs, labeled)),
        r"loss_terms\(\) returns a value of the type dict. Write it as a generator",
    ),
    "a stream that is none": (
        _with(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs["y"].logits.mean()})),
        r"asks for the stream 'y', which streams\(\) does not return; it returns 'x', 'u'",
    ),
    "a peek at a stream that is none": (
        _with(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs.peek("y").logits.mean()})),
        r"asks for the stream 'y', which streams\(\) does not return; it returns 'x', 'u'",
    ),
    "a stream of an earlier part": (
        _with(loss_terms=_terms(_supervised, lambda _, outputs, __: {"consistency": outputs["x"].logits[0].mean()})),
        "asks for the stream 'x' after the part of the loss that used it",
    ),
    "a view that is not there": (
        _with(images=lambda self, labeled, unlabeled, _: {"x": labeled.image, "u": unlabeled.augmented}),
        r"images\(\) returns None as 'u': a view that is not there. Ask for it in unlabeled_views",
    ),
    "a network that is none": (
        _with(streams=lambda self: {"x": Stream("x", network="b")}),
        r"'x' asks for the network 'b', .*networks=\{'b': another_network\(network\)\}",
    ),
    "a decoder that is none": (
        _with(streams=lambda self: {"x": Stream("x", decoder="b")}),
        r"'x' asks for the decoder 'b', .*decoders=\{'b': another_decoder\(network.decoder\)\}",
    ),
    "a teacher's decoder": (
        _with(streams=lambda self: {"x": Stream("x", decoder="b", teacher=True, gradient=False)}),
        "'x' is the teacher's, which has nnU-Net's own decoder alone",
    ),
    "a head that is none": (
        _with(streams=lambda self: {"x": Stream("x", head=True)}),
        r"'x' asks for a head, which build_training_network\(\) has not made",
    ),
    "a teacher that is none": (
        _with(settings_class=NoTeacherSettings, build_training_network=lambda self, network: TrainingNetwork(network)),
        r"'without_gradient' asks for a teacher, which build_training_network\(\) has not made",
    ),
    "one resolution for nnU-Net's loss": (
        _with(streams=lambda self: {"x": Stream("x"), "u": Stream("u")}),
        "a list of resolutions as target and one tensor as output. Ask for .*deep_supervision=self.enable_deep",
    ),
    **{
        f"{hook} that returns nothing": (
            _with(**{hook: lambda self, *_: None}),
            rf"^{hook}\(\) returns a value of the type NoneType\. Return a dictionary",
        )
        for hook in ("streams", "images", "loss_weights")
    },
    "a weight that is nan": (
        _with(loss_weights=lambda self, progress: {"supervised": 1.0, "consistency": math.nan}),
        r"loss_weights\(\) returns nan for the term 'consistency'\. Return a finite number",
    ),
    "a weight that is a text": (
        _with(loss_weights=lambda self, progress: {"supervised": "0.5", "consistency": 1.0}),
        r"loss_weights\(\) returns '0.5' for the term 'supervised'",
    ),
    "an image without channels": (
        _with(images=_images(lambda images: {**images, "u": images["u"][:, 0]})),
        r"The image 'u' of images\(\) has the shape \(3, 24, 24\); it must be a tensor \(N, C, \*patch size\)",
    ),
    "an image that is a list": (
        _with(images=_images(lambda images: {**images, "u": [images["u"]]})),
        r"The image 'u' of images\(\) has the type list",
    ),
    "a pass of a view that is not there": (
        _with(prepare=lambda self, _, unlabeled: self.without_gradient(unlabeled.augmented, Stream("u"))),
        r"without_gradient\(\) gets None as its image\. If that is a view, ask for it in unlabeled_views\(\)",
    ),
    "a teacher that is never moved": (
        _with(after_optimizer_step=lambda self: None),
        r"update_teacher\(decay\) there, or do not override it",
    ),
}


@pytest.mark.parametrize("mode", ["stacked", "split"])
@pytest.mark.parametrize(("method", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(method, message, mode, made) -> None:
    trainer = made(method, memory_mode=mode)
    _, _, batch = make_batches(trainer)
    with pytest.raises(MethodError, match=message):
        trainer.train_step(batch)


def test_a_graph_that_split_no_longer_has_is_named(made) -> None:
    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        x = outputs["x"]
        yield {"supervised": self.supervised_loss(x.logits, labeled.target)}
        yield {"consistency": outputs["u"].logits.mean() + x.full_resolution.mean()}

    trainer = made(_with(loss_terms=loss_terms), memory_mode="split")
    _, _, batch = make_batches(trainer)
    with pytest.raises(MethodError, match=r"an earlier part has used\. In memory mode split its graph is gone"):
        trainer.train_step(batch)


def test_to_look_whether_there_is_a_stream_runs_no_pass(made) -> None:
    found = []

    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        found.extend(name in outputs for name in ("x", "u", "y"))
        found.append(dict(outputs._outputs))
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

    trainer = made(_with(loss_terms=loss_terms), memory_mode="split")
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    assert found == [True, True, False, {}]


def test_a_hook_that_is_missing_is_named(made) -> None:
    trainer = made(SemiSupervisedTrainer)
    with pytest.raises(NotImplementedError, match=r"SemiSupervisedTrainer has no loss_weights\(\)"):
        trainer.train_step(make_batches(trainer)[2])


MISTAKES_AT_THE_START = {
    "teacher's settings without a teacher": (
        _with(build_training_network=lambda self, network: TrainingNetwork(network)),
        r"derives from TeacherSettings, but the network has no teacher: write TrainingNetwork\(network, teacher=True\)",
    ),
    "a second network that is the first": (
        _with(build_training_network=lambda self, n: TrainingNetwork(n, teacher=True, networks={"b": n})),
        r"The network 'b' has no weights of its own\. Make it with another_network\(network\)",
    ),
    "a second decoder that is the first": (
        _with(build_training_network=lambda self, n: TrainingNetwork(n, teacher=True, decoders={"b": n.decoder})),
        r"The decoder 'b' has no weights of its own\. Make it with another_decoder\(network\.decoder\)",
    ),
    "stages that are a text": (
        _with(stages=lambda self: "training"),
        r"stages\(\) returns 'training'\. Return a",
    ),
    "no stages": (_with(stages=lambda self: ()), r"stages\(\) returns \(\)\. Return a tuple of names"),
    "views that are not returned": (
        _with(unlabeled_views=lambda self: None),
        r"unlabeled_views\(\) returns a value of the type NoneType\. Return Views",
    ),
    "targets that are not returned": (
        _with(labeled_targets=lambda self: None),
        r"labeled_targets\(\) returns a value of the type NoneType\. Return a dictionary",
    ),
}


@pytest.mark.parametrize(("method", "message"), MISTAKES_AT_THE_START.values(), ids=MISTAKES_AT_THE_START)
def test_a_mistake_is_named_before_the_first_step(method, message, made) -> None:
    with pytest.raises(MethodError, match=message):
        made(method)


def test_a_decoder_on_the_networks_own_encoder_is_another_one(made) -> None:
    def build(self, network):
        other = another_decoder(network.decoder)
        other.encoder = network.encoder
        return TrainingNetwork(network, teacher=True, decoders={"b": other})

    trainer = made(_with(build_training_network=build))
    trainer.train_step(make_batches(trainer)[2])


def test_what_is_prepared_carries_no_gradient_even_where_a_method_forgets_it(made) -> None:
    found = []

    def prepare(self, labeled, unlabeled):
        return self.training_network.encoder(labeled.image)[0].mean()

    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        found.append(prepared.requires_grad)
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target) * prepared}

    def images(self, labeled, unlabeled, prepared):
        return {"x": labeled.image, "u": unlabeled.weak}

    trainer = made(_with(prepare=prepare, images=images, loss_terms=loss_terms))
    trainer.train_step(make_batches(trainer)[2])
    assert found == [False]


def _settings_class(base=SemiSupervisedSettings, **fields):
    annotations = dict.fromkeys(fields, float)
    return dataclass(frozen=True)(type("Ours", (base,), {"__annotations__": annotations, **fields}))


@pytest.mark.parametrize(
    ("settings_class", "message"),
    [
        (_settings_class(weight=setting(1.5, "w", maximum=1.0)), "default of the setting 'weight' of Ours is 1.5"),
        (_settings_class(weight=setting(1.5, "w", maximum=1.0)), "allowed is number, at most 1"),
        (
            _settings_class(kind=setting("soft", "kind")),
            r"'kind' of Ours is 'soft'.* a text needs choices",
        ),
        (
            _settings_class(seed=setting(0.5, "s", minimum=0.0)),
            "'seed' of Ours is one of SemiSupervisedSettings",
        ),
        (
            _settings_class(memory_mode=setting("bank", "m", choices=("bank", "none"))),
            "'memory_mode' of Ours is",
        ),
        (_settings_class(as_dict=setting(1.0, "a", minimum=0.0)), "'as_dict' of Ours hides a method of SemiSuperv"),
        (
            type("Untyped", (SemiSupervisedSettings,), {"ramp_length": 0.9}),
            "Untyped has ramp_length = 0.9 without",
        ),
    ],
)
def test_settings_that_do_not_say_what_their_author_means_are_named(settings_class, message) -> None:
    with pytest.raises(MethodError, match=message):
        settings_class.from_plans({})


def test_a_method_may_change_a_default_and_a_range() -> None:
    ours = _settings_class(ramp_length=setting(0.9, "r", minimum=0.5, maximum=1.0))
    assert ours().ramp_length == 0.9


def test_settings_that_are_no_dataclass_or_have_no_allowed_values_are_named() -> None:
    class NoDataclass(SemiSupervisedSettings):
        weight: float = setting(0.1, "weight", minimum=0.0)

    @dataclass(frozen=True)
    class NoSetting(SemiSupervisedSettings):
        weight: float = 0.1

    with pytest.raises(MethodError, match=r"NoDataclass is no dataclass: write @dataclass\(frozen=True\)"):
        NoDataclass.from_plans({})
    with pytest.raises(MethodError, match="'weight' of NoSetting does not say which values are allowed"):
        NoSetting.from_plans({})


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_box_larger_than_the_patch_is_refused(fraction) -> None:
    with pytest.raises(ValueError, match="the side of a box is a share of the patch's"):
        random_boxes(2, (8, 8), fraction=fraction, device=torch.device("cpu"))


def test_a_teacher_without_its_settings_is_named(made) -> None:
    with pytest.raises(MethodError, match="derive SemiSupervisedSettings from TeacherSettings"):
        made(_with(settings_class=SemiSupervisedSettings, build_training_network=_teacher))


def _teacher(self, network):
    return TrainingNetwork(network, teacher=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Views(cutmix=CutMix()), "ask for some with strong=1"),
        (lambda: Views(strong=-1), "strong is -1; it is a number of views"),
        (lambda: Views(strong=1, cutmix=0.5), "cutmix is 0.5; give a CutMix"),
        (lambda: Stream("u", dropout=1.0), "dropout is 1.0; it is a probability, from 0 to below 1"),
        (lambda: Stream("u", dropout=-0.1), "dropout is -0.1"),
        (lambda: Stream("u", dropout_on="features"), "dropout_on is 'features'; give a tuple"),
        (lambda: CutMix(5.0), "probability is 5.0"),
        (lambda: CutMix(volume=(0.0, 0.0)), r"volume is \(0.0, 0.0\)"),
        (lambda: CutMix(volume=(1.2, 1.5)), r"volume is \(1.2, 1.5\)"),
        (lambda: CutMix(volume=(0.4, 0.2)), r"volume is \(0.4, 0.2\)"),
        (lambda: CutMix(volume=0.3), "volume is 0.3"),
        (lambda: CutMix(aspect_ratio=2.0), "aspect_ratio is 2.0"),
        (lambda: CutMix(aspect_ratio=0), "aspect_ratio is 0"),
    ],
)
def test_streams_and_views_that_cannot_be_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LOGITS, CLASSES = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)
WHERE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: consistency_mse(LOGITS, LOGITS[:1]),
        lambda: consistency_mse(LOGITS, LOGITS[0]),
        lambda: consistency_mse(LOGITS, LOGITS[:, :1]),
        lambda: dice_and_cross_entropy(LOGITS, CLASSES[:, 0], WHERE),
        lambda: dice_and_cross_entropy(LOGITS, CLASSES[:1], WHERE),
        lambda: masked_dice_loss(LOGITS, CLASSES[:, 0], WHERE),
        lambda: masked_cross_entropy(LOGITS, CLASSES.expand(2, 3, 4, 4), WHERE),
        lambda: voxelwise_cross_entropy(LOGITS, WHERE),
    ],
)
def test_shapes_that_would_be_broadcast_are_named(loss) -> None:
    with pytest.raises(ValueError, match=r"(teacher|label|target) has the shape \(.*\); it must be \(2, [13], 4, 4\)"):
        loss()


OF_LOGITS = {
    "entropy": lambda z, y, m: entropy(z, regions=False),
    "consistency_mse": lambda z, y, m: consistency_mse(z, torch.zeros(1, 2, 4, 4)),
    "consistency_mse, teacher": lambda z, y, m: consistency_mse(torch.zeros(1, 2, 4, 4), z),
    "masked_dice_loss": masked_dice_loss,
    "voxelwise_cross_entropy": lambda z, y, m: voxelwise_cross_entropy(z, y),
    "masked_cross_entropy": masked_cross_entropy,
    "dice_and_cross_entropy": dice_and_cross_entropy,
}


@pytest.mark.parametrize("loss", OF_LOGITS.values(), ids=OF_LOGITS)
def test_logits_that_are_a_list_are_named(loss) -> None:
    logits = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    label, everywhere = torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"deep_supervision=True.*full_resolution"):
        loss(logits, label, everywhere)


def test_out_of_memory_is_tried_in_every_stage_of_one_process(made, monkeypatch) -> None:
    trainer = made(TwoNetworks)
    _, _, batch = make_batches(trainer)
    trainer.step_gradients.memory_mode = "stacked"
    stages = stages_of(trainer)
    next(stages)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "stacked"
    next(stages)

    def fail(self):
        raise RuntimeError("FIND was unable to find an engine to execute this computation")

    monkeypatch.setattr(passes_module.StackedOutputs, "finish", fail)
    trainer.train_step(batch)
    assert trainer.step_gradients.memory_mode == "split"


def test_a_training_network_that_is_not_returned_is_named(made) -> None:
    with pytest.raises(MethodError, match=r"build_training_network\(\) returns .* NoneType\. Return a TrainingNetwork"):
        made(_with(build_training_network=lambda self, network: None))
