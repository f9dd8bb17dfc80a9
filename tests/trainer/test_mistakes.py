"""Mistakes in a method's hooks: each is named, where its author made it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from author_methods import MeanTeacher, TwoNetworks, changed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.nn import functional

from nnunet_ssl import testing
from nnunet_ssl.api import (
    LabeledTarget,
    MethodError,
    SemiSupervisedSettings,
    SemiSupervisedTrainer,
    SignedDistanceMaps,
    Stream,
    TrainingNetwork,
    Views,
    another_decoder,
    setting,
)
from nnunet_ssl.cli.training_checks import check_memory as doctors_check_memory
from nnunet_ssl.testing import make_batches, tiny_plans
from nnunet_ssl.testing.checks import check_gradients
from nnunet_ssl.trainer.memory import step_bytes
from nnunet_ssl.trainer.method_checks import log_unknown_modules, unknown_modules


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
        changed(loss_weights=lambda self, progress: {"supervised": 1.0}),
        r"'consistency' has no weight: loss_weights\(\) returns 'supervised'",
    ),
    "no supervised term": (
        changed(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs["u"].logits.mean()})),
        "yields no term 'supervised', only consistency",
    ),
    "an image that is not returned": (
        changed(images=_images(lambda images: {"x": images["x"]})),
        r"stream 'u' decodes the image 'u', which images\(\) does not return; it returns 'x'",
    ),
    "images of unequal size": (
        changed(images=_images(lambda images: {**images, "u": images["u"][..., :-4]})),
        r"unequal sizes, channels first: 'x' \(1, 24, 24\), 'u' \(1, 24, 20\)",
    ),
    "a lone zero term": (
        changed(loss_terms=_terms(_supervised, lambda self, outputs, _: {"consistency": torch.zeros(())})),
        "The term 'consistency' does not depend on any stream with gradient",
    ),
    "a detached term": (
        changed(loss_terms=_terms(_supervised, lambda self, o, _: {"consistency": o["u"].logits.detach().mean()})),
        "The term 'consistency' does not depend on any stream with gradient",
    ),
    "a detached term in one part with the supervised one": (
        changed(loss_terms=_terms(lambda self, o, y: _supervised(self, o, y) | {"consistency": torch.tensor(0.5)})),
        r"term 'consistency' does not depend on any stream with gradient.*call self\.record\(\)",
    ),
    "a term that is no scalar": (
        changed(loss_terms=_terms(lambda self, outputs, _: {"supervised": outputs["u"].logits})),
        r"'supervised' has the shape \(3, 3, 24, 24\)",
    ),
    "a term that is a number": (
        changed(loss_terms=_terms(lambda self, o, labeled: {**_supervised(self, o, labeled), "consistency": 0.0})),
        "'consistency' is of the type float, not a tensor. Leave out a term",
    ),
    "no dictionary": (
        changed(loss_terms=_terms(lambda self, o, labeled: _supervised(self, o, labeled)["supervised"])),
        r"loss_terms\(\) yields a value of the type Tensor",
    ),
    "an empty dictionary": (changed(loss_terms=_terms(lambda *_: {})), r"loss_terms\(\) yields an empty dictionary"),
    "no generator": (
        changed(loss_terms=lambda self, outputs, labeled, *_: _supervised(self, outputs, labeled)),
        r"loss_terms\(\) returns a value of the type dict. Write it as a generator",
    ),
    "a stream that is none": (
        changed(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs["y"].logits.mean()})),
        r"asks for the stream 'y', which streams\(\) does not return; it returns 'x', 'u'",
    ),
    "a peek at a stream that is none": (
        changed(loss_terms=_terms(lambda self, outputs, _: {"consistency": outputs.peek("y").logits.mean()})),
        r"asks for the stream 'y', which streams\(\) does not return; it returns 'x', 'u'",
    ),
    "a stream of an earlier part": (
        changed(loss_terms=_terms(_supervised, lambda _, outputs, __: {"consistency": outputs["x"].logits[0].mean()})),
        "asks for the stream 'x' again, after a part of the loss was yielded",
    ),
    "a view that is not there": (
        changed(images=lambda self, labeled, unlabeled, _: {"x": labeled.image, "u": unlabeled.augmented}),
        r"images\(\) returns None as 'u': a view that is not there. Ask for it in unlabeled_views",
    ),
    "a network that is none": (
        changed(streams=lambda self: {"x": Stream("x", network="b")}),
        r"'x' asks for the network 'b', .*networks=\{'b': another_network\(network\)\}",
    ),
    "a decoder that is none": (
        changed(streams=lambda self: {"x": Stream("x", decoder="b")}),
        r"'x' asks for the decoder 'b', .*decoders=\{'b': another_decoder\(network.decoder\)\}",
    ),
    "a teacher's decoder": (
        changed(streams=lambda self: {"x": Stream("x", decoder="b", teacher=True, gradient=False)}),
        "'x' is the teacher's, which has nnU-Net's own decoder alone",
    ),
    "a head that is none": (
        changed(streams=lambda self: {"x": Stream("x", head=True)}),
        r"'x' asks for a head, which build_training_network\(\) has not made",
    ),
    "a teacher that is none": (
        changed(
            settings_class=NoTeacherSettings, build_training_network=lambda self, network: TrainingNetwork(network)
        ),
        r"'without_gradient' asks for a teacher, which build_training_network\(\) has not made",
    ),
    "a stream that is a text": (
        changed(streams=lambda self: {"x": "x"}),
        r"streams\(\) returns a value of the type str as 'x', no Stream",
    ),
    "an output of another size than the target": (
        changed(images=_images(lambda images: {name: image[..., :-8] for name, image in images.items()})),
        r"gets an output of \(24, 16\) voxels and a target of \(24, 24\)",
    ),
    "one resolution for the loss of several": (
        changed(
            loss_terms=_terms(
                lambda self, o, y: {"supervised": self.supervised_loss(o["x"].full_resolution, y.full_resolution)}
            )
        ),
        "gets one tensor as output and one tensor as target. Ask for the stream with deep_supervision",
    ),
    "a weight below zero": (
        changed(loss_weights=lambda self, progress: {"supervised": 1.0, "consistency": -0.5}),
        r"returns -0.5 for the term 'consistency'\. Return a finite number, 0 or more\. To make a term large",
    ),
    "a record of the trainer's own name": (
        changed(prepare=lambda self, *_: self.record("loss/supervised", torch.ones(()), torch.ones(()))),
        r"record\(\) gets the name 'loss/supervised'\. Give a text that does not begin with loss/, weight/, share/",
    ),
    "a record of numbers": (
        changed(prepare=lambda self, *_: self.record("share", 1.0, 2.0)),
        r"record\(\) gets 1\.0 and 2\.0 as count and total of 'share'\. Give two tensors of one shape",
    ),
    "a record of unequal shapes": (
        changed(prepare=lambda self, *_: self.record("share", torch.ones(3), torch.ones(()))),
        r"gets a tensor \(3,\) and a tensor \(\) as count and total of 'share'",
    ),
    "a record of voxels": (
        changed(prepare=lambda self, _, u: self.record("share", u.weak > 0, u.weak > 0)),
        r"gets a tensor \(3, 1, 24, 24\) and a tensor .* as count and total of 'share'",
    ),
    "a pass of several images": (
        changed(prepare=lambda self, _, unlabeled: self.without_gradient([unlabeled.weak], Stream("u"))),
        r"without_gradient\(\) gets a list as its image, not a tensor",
    ),
    "one resolution for nnU-Net's loss": (
        changed(streams=lambda self: {"x": Stream("x"), "u": Stream("u")}),
        r"gets one tensor as output and a list of resolutions as target\. Ask for .*deep_supervision=self.enable_deep",
    ),
    **{
        f"{hook} that returns nothing": (
            changed(**{hook: lambda self, *_: None}),
            rf"^{hook}\(\) returns a value of the type NoneType\. Return a dictionary",
        )
        for hook in ("streams", "images", "loss_weights")
    },
    "a weight that is nan": (
        changed(loss_weights=lambda self, progress: {"supervised": 1.0, "consistency": math.nan}),
        r"loss_weights\(\) returns nan for the term 'consistency'\. Return a finite number",
    ),
    "a weight that is a text": (
        changed(loss_weights=lambda self, progress: {"supervised": "0.5", "consistency": 1.0}),
        r"loss_weights\(\) returns '0.5' for the term 'supervised'",
    ),
    "an image without channels": (
        changed(images=_images(lambda images: {**images, "u": images["u"][:, 0]})),
        r"The image 'u' of images\(\) has the shape \(3, 24, 24\); it must be a tensor \(N, C, \*patch size\)",
    ),
    "an image that is a list": (
        changed(images=_images(lambda images: {**images, "u": [images["u"]]})),
        r"The image 'u' of images\(\) has the type list",
    ),
    "a pass of a view that is not there": (
        changed(prepare=lambda self, _, unlabeled: self.without_gradient(unlabeled.augmented, Stream("u"))),
        r"without_gradient\(\) gets None as its image, not a tensor\. If that is a view, ask for it in unlabeled_views",
    ),
    "a teacher that is never moved": (
        changed(after_optimizer_step=lambda self: None),
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

    trainer = made(changed(loss_terms=loss_terms), memory_mode="split")
    _, _, batch = make_batches(trainer)
    with pytest.raises(MethodError, match=r"an earlier part has used\. In memory mode split its graph is gone"):
        trainer.train_step(batch)


def test_a_bottleneck_that_split_no_longer_has_an_encoder_for_is_named(made) -> None:
    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}
        output = outputs["u"]
        yield {"consistency": output.logits.mean()}
        yield {"consistency": output.bottleneck.square().mean()}

    streams = {"x": Stream("x", deep_supervision=True), "u": Stream("u", bottleneck=True)}
    trainer = made(changed(loss_terms=loss_terms, streams=lambda self: streams), memory_mode="split")
    with pytest.raises(MethodError, match=r"an earlier part has used\. In memory mode split its graph is gone"):
        trainer.train_step(make_batches(trainer)[2])


def test_a_stream_whose_bottleneck_alone_is_used_frees_its_encoder_in_split_and_has_its_gradient(made) -> None:
    kept = []

    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        self.record_prediction(outputs.peek("u").logits)
        yield {"consistency": outputs["u"].bottleneck.square().mean()}
        kept.append(list(getattr(outputs, "_features", {})))
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

    streams = {"x": Stream("x", deep_supervision=True), "u": Stream("u", bottleneck=True)}
    method = changed(loss_terms=loss_terms, streams=lambda self: streams)
    testing.check_split(made(method))
    assert kept == [[], []]


def test_to_look_whether_there_is_a_stream_runs_no_pass(made) -> None:
    found = []

    def loss_terms(self, outputs, labeled, unlabeled, prepared):
        found.extend(name in outputs for name in ("x", "u", "y"))
        found.append(dict(outputs._outputs))
        yield {"supervised": self.supervised_loss(outputs["x"].logits, labeled.target)}

    trainer = made(changed(loss_terms=loss_terms), memory_mode="split")
    _, _, batch = make_batches(trainer)
    trainer.train_step(batch)
    assert found == [True, True, False, {}]


def test_a_hook_that_is_missing_is_named(made) -> None:
    trainer = made(SemiSupervisedTrainer)
    with pytest.raises(NotImplementedError, match=r"SemiSupervisedTrainer has no loss_weights\(\)"):
        trainer.train_step(make_batches(trainer)[2])


MISTAKES_AT_THE_START = {
    "teacher's settings without a teacher": (
        changed(build_training_network=lambda self, network: TrainingNetwork(network)),
        r"derives from TeacherSettings, but the network has no teacher: write TrainingNetwork\(network, teacher=True\)",
    ),
    "a second network that is the first": (
        changed(build_training_network=lambda self, n: TrainingNetwork(n, teacher=True, networks={"b": n})),
        r"The network 'b' has no weights of its own\. Make it with another_network\(network\)",
    ),
    "a second decoder that is the first": (
        changed(build_training_network=lambda self, n: TrainingNetwork(n, teacher=True, decoders={"b": n.decoder})),
        r"The decoder 'b' has no weights of its own\. Make it with another_decoder\(network\.decoder\)",
    ),
    "stages that are a text": (
        changed(stages=lambda self: "training"),
        r"stages\(\) returns 'training'\. Return a",
    ),
    "a stage with the name of another": (
        changed(stages=lambda self: ("a", "a")),
        r"returns 'a', 'a'\. Return each name once",
    ),
    "a hook with a slip of the pen": (
        changed(unlabelled_views=lambda self: Views(strong=2)),
        "has 'unlabelled_views', which the package does not call. Did you mean 'unlabeled_views'",
    ),
    "targets of a class": (
        changed(labeled_targets=lambda self: {"distance": SignedDistanceMaps}),
        r"returns the class SignedDistanceMaps as 'distance'\. Return an object",
    ),
    "targets of a function": (
        changed(labeled_targets=lambda self: {"distance": len}),
        "returns a builtin_function_or_method as 'distance'",
    ),
    "no stages": (changed(stages=lambda self: ()), r"stages\(\) returns \(\)\. Return a tuple of names"),
    "views that are not returned": (
        changed(unlabeled_views=lambda self: None),
        r"unlabeled_views\(\) returns a value of the type NoneType\. Return Views",
    ),
    "targets that are not returned": (
        changed(labeled_targets=lambda self: None),
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

    trainer = made(changed(build_training_network=build))
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

    trainer = made(changed(prepare=prepare, images=images, loss_terms=loss_terms))
    trainer.train_step(make_batches(trainer)[2])
    assert found == [False]


def test_a_training_network_that_is_not_returned_is_named(made) -> None:
    with pytest.raises(MethodError, match=r"build_training_network\(\) returns .* NoneType\. Return a TrainingNetwork"):
        made(changed(build_training_network=lambda self, network: None))


def test_a_module_that_no_optimizer_moves_is_named(made) -> None:
    kept, own, frozen = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)
    attributes = {"network": kept, "loss": nn.CrossEntropyLoss(), "bare": 3, "labeler": frozen}
    assert unknown_modules(attributes, kept.parameters()) == []
    lines: list[str] = []
    log_unknown_modules(attributes | {"projector": own}, kept.parameters(), lines.append)
    (line,) = lines
    assert line.startswith("Warning: The trainer's attribute 'projector' is a module with weights of its own.")
    trainer = made(MeanTeacher)
    trainer.projector = own
    with pytest.raises(AssertionError, match=r"'projector' is a module .*: made\.training_only\["):
        testing.check_steps(trainer)


def test_a_name_near_a_hook_that_the_method_has_is_the_methods_own(made) -> None:
    extra = {"image": 3, "stream": 0, "loss_weight": 0.1, "prepared": None, "stage1": "alone"}
    made(type("Own", (TwoNetworks,), extra | {"prepare": TwoNetworks.prepare}))
    with pytest.raises(MethodError, match=r"has 'prepared', which the package does not call. Did you mean 'prepare'"):
        made(type("Own", (TwoNetworks,), extra))


def test_a_stage_that_only_comes_later_is_checked_at_the_start(made) -> None:
    def stage(self, progress):
        return "alone" if progress < 0.5 else "togehter"

    method = type("Late", (TwoNetworks,), {"stage": stage})
    plans, dataset_json = tiny_plans(dim=2)
    for start in (made, lambda one: list(doctors_check_memory(one, PlansManager(plans), "tiny", dataset_json))):
        with pytest.raises(MethodError, match=r"'togehter', which is none of stages.*: alone, together"):
            start(method)


def test_a_teacher_that_is_never_run_and_predictions_that_are_not_counted_are_named(made) -> None:
    class Forgotten(MeanTeacher):
        def prepare(self, labeled, unlabeled):
            found = super().prepare(labeled, unlabeled)
            return found._replace(mean=torch.full_like(found.mean, 1 / found.mean.shape[1]))

        def without_gradient(self, image, stream):
            return super().without_gradient(image, replace(stream, teacher=False))

        def record_prediction(self, logits):
            pass

    with pytest.raises(AssertionError, match="the teacher is never run: set teacher=True"):
        check_gradients(made(Forgotten))
    with pytest.raises(AssertionError, match=r"record_prediction\(\) is never called"):
        testing.check_steps(made(Forgotten))


@pytest.mark.parametrize("target", [None, np.zeros(3), (torch.zeros(3), None)])
def test_a_labeled_target_that_makes_no_tensor_is_named(target, made) -> None:
    class Nothing(LabeledTarget):
        def __call__(self, segmentation):
            return target

        def largest(self, batch_size, patch_size):
            return torch.empty(batch_size, 1, *patch_size)

    trainer = made(changed(labeled_targets=lambda self: {"mine": Nothing()}))
    with pytest.raises(
        MethodError, match=r"target 'mine' returns a value of the type (NoneType|ndarray)\. Return a tensor, or a tuple"
    ):
        trainer.train_step(make_batches(trainer)[2])


def test_an_empty_targets_content_is_named_as_that(made) -> None:
    class Wrong(LabeledTarget):
        def __call__(self, segmentation):
            return segmentation > 0

        def largest(self, batch_size, patch_size):
            return np.zeros(3)

    trainer = made(changed(labeled_targets=lambda self: {"mine": Wrong()}))
    trainer.train_step(make_batches(trainer)[2])
    with pytest.raises(MethodError, match=r"largest\(\) of the labeled target 'mine' returns .* ndarray"):
        step_bytes(trainer, "split", mixed_precision=True)


def test_a_record_whose_shape_changes_is_named(made) -> None:
    trainer = made(MeanTeacher)
    trainer.record("mine", torch.ones(()), torch.ones(()))
    for shape in ((2,), (3,)):
        with pytest.raises(MethodError, match=r"gets a tensor .* of 'mine'\. .* the same in each step"):
            trainer.record("mine", torch.ones(shape), torch.ones(shape))


@pytest.mark.parametrize("made_by_head", [torch.zeros(2), {"a": [torch.zeros(2)]}])
@pytest.mark.parametrize("mode", ["stacked", "split"])
def test_a_head_that_returns_no_named_tensors_is_named(made_by_head, mode, made) -> None:
    class Head(nn.Module):
        def forward(self, image, features):
            return made_by_head

    trainer = made(
        changed(
            build_training_network=lambda self, network: TrainingNetwork(network, teacher=True, head=Head()),
            streams=lambda self: {**MeanTeacher.streams(self), "u": Stream("u", head=True)},
        ),
        memory_mode=mode,
    )
    with pytest.raises(MethodError, match=r"The head returns a value of the type \w+\. Return a dictionary of tensors"):
        trainer.train_step(make_batches(trainer)[2])


def test_a_teacher_of_the_authors_own_is_named(made) -> None:
    def build(self, network):
        network = TrainingNetwork(network)
        network.training_only["teacher"] = nn.Linear(1, 1)
        return network

    with pytest.raises(MethodError, match=r"'teacher'\] is the package's own teacher"):
        made(changed(build_training_network=build))


def test_a_view_that_no_stream_uses_may_be_absent(made) -> None:
    trainer = made(changed(images=_images(lambda images: {**images, "unused": None})))
    trainer.train_step(make_batches(trainer)[2])


def test_an_own_loss_of_one_resolution_is_taken(made) -> None:
    method = changed(
        _build_loss=lambda self: lambda output, target: functional.cross_entropy(output, target[:, 0].long()),
        loss_terms=_terms(
            lambda self, o, y: {"supervised": self.supervised_loss(o["x"].full_resolution, y.full_resolution)}
        ),
    )
    trainer = made(method)
    trainer.train_step(make_batches(trainer)[2])
