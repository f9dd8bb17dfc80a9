"""What a method's hooks return, checked: a mistake of its author is named where it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.data.labeled_targets import LabeledTarget
from nnunet_ssl.errors import MethodError, returned
from nnunet_ssl.networks.streams import Stream

_HOOKS = (
    "build_training_network",
    "unlabeled_views",
    "labeled_targets",
    "stages",
    "stage",
    "prepare",
    "streams",
    "images",
    "loss_terms",
    "loss_weights",
    "after_optimizer_step",
    "settings_class",
)
_SIMILAR = 0.85
MOMENTS = tuple(moment / 1000 for moment in range(1000))
"""At which ``stage()`` is looked at before a training, as shares of it."""

_ROUNDING = 1e-6


# ---- before a training ----------------------------------------------------------------------------------------------


def check_hook_names(method: type, base: type) -> None:
    """Whether no hook is misspelled, which the package would not call.

    Raises:
        MethodError: what a method adds to the base has nearly the name of a hook that the method does not have.
    """
    classes = method.__mro__[: method.__mro__.index(base)]
    added = {name for one in classes for name in vars(one) if not name.startswith("_")}
    missing = [name for name in _HOOKS if name not in added]
    for name in sorted(name for name in added if not hasattr(base, name)):
        near = difflib.get_close_matches(name, missing, n=1, cutoff=_SIMILAR)
        if near:
            raise MethodError(
                f"{method.__name__} has {name!r}, which the package does not call. Did you mean {near[0]!r}? If it is "
                "something of your own, put an underscore in front of its name."
            )


def first_stage(stages: Any) -> str:
    """The first of the stages that ``stages()`` returns.

    Raises:
        MethodError: it returns no tuple of different names.
    """
    if not (isinstance(stages, (tuple, list)) and stages and all(isinstance(name, str) for name in stages)):
        raise MethodError(f'stages() returns {stages!r}. Return a tuple of names, such as ("training",).')
    if len(set(stages)) < len(stages):
        raise MethodError(f"stages() returns {', '.join(map(repr, stages))}. Return each name once.")
    return stages[0]


def known_stage(stage: Any, stages: Sequence[str]) -> str:
    """What ``stage()`` has returned.

    Raises:
        MethodError: it is none of ``stages()``.
    """
    if stage not in stages:
        raise MethodError(f"stage() returns {stage!r}, which is none of stages(): {', '.join(stages)}.")
    return stage


def last_moments(stage: Callable[[float], Any], stages: Sequence[str]) -> dict[str, float]:
    """The progress at which each stage that a training enters ends, by the stage's name.

    Raises:
        MethodError: at some moment, ``stage()`` returns none of ``stages()``.
    """
    return {known_stage(stage(progress), stages): progress for progress in MOMENTS}


def labeled_targets_of(made: Any) -> Mapping[str, LabeledTarget]:
    """What ``labeled_targets()`` has returned.

    Raises:
        MethodError: it is no dictionary of labeled targets.
    """
    targets: Mapping[str, LabeledTarget] = returned("labeled_targets", made, Mapping, "Return a dictionary.")
    for name, target in targets.items():
        if not isinstance(target, LabeledTarget):
            found = f"the class {target.__name__}" if isinstance(target, type) else f"a {type(target).__name__}"
            raise MethodError(
                f"labeled_targets() returns {found} as {name!r}. Return an object of a class derived from "
                "LabeledTarget, such as SignedDistanceMaps()."
            )
    return targets


def check_target(made: Any, text: str) -> None:
    """Whether a labeled target has made a tensor or a tuple of tensors.

    Raises:
        MethodError: it has not; ``text`` says what has made it.
    """
    for one in made if isinstance(made, tuple) else (made,):
        if not isinstance(one, Tensor):
            raise MethodError(
                f"{text} a value of the type {type(one).__name__}. Return a tensor, or a tuple of tensors."
            )


def unknown_modules(attributes: Mapping[str, Any], trained: Iterable[nn.Parameter]) -> list[str]:
    """A warning for each module of a trainer whose weights could learn, but are not in its network.

    Args:
        attributes: of the trainer.
        trained: the network's weights.
    """
    known = set(trained)
    learning = {
        name: {parameter for parameter in value.parameters() if parameter.requires_grad}
        for name, value in attributes.items()
        if isinstance(value, nn.Module)
    }
    return [
        f"The trainer's attribute {name!r} is a module with weights of its own. nnU-Net's optimizer does not move "
        "them, and no checkpoint holds them. If they should be trained, put the module into the training network, in "
        "build_training_network(): made.training_only['a name'] = module. For a teacher, a head, a decoder or a second "
        "network, TrainingNetwork has arguments."
        for name, parameters in learning.items()
        if not parameters <= known
    ]


def log_unknown_modules(
    attributes: Mapping[str, Any], trained: Iterable[nn.Parameter], log: Callable[[str], Any]
) -> None:
    """Log the warnings of :func:`unknown_modules`."""
    for warning in unknown_modules(attributes, trained):
        log(f"Warning: {warning}")


# ---- in a step ------------------------------------------------------------------------------------------------------


def check_images(streams: Mapping[str, Stream], images: Mapping[str, Tensor]) -> None:
    """Whether the streams' images are there, and of one size for each network.

    Raises:
        MethodError: a stream is none; or an image is missing or no tensor, or those of one network are of unequal size.
    """
    for name, stream in streams.items():
        if not isinstance(stream, Stream):
            raise MethodError(f"streams() returns a value of the type {type(stream).__name__} as {name!r}, no Stream.")
        if stream.image not in images:
            raise MethodError(
                f"The stream {name!r} decodes the image {stream.image!r}, which images() does not return; it returns "
                f"{', '.join(map(repr, images)) or 'none'}."
            )
        if images[stream.image] is None:
            raise MethodError(
                f"images() returns None as {stream.image!r}: a view that is not there. Ask for it in unlabeled_views()."
            )
        image = images[stream.image]
        if not isinstance(image, Tensor) or image.ndim < 4:
            found = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"type {type(image).__name__}"
            raise MethodError(
                f"The image {stream.image!r} of images() has the {found}; it must be a tensor (N, C, *patch size)."
            )
    for place in {(stream.network, stream.teacher) for stream in streams.values()}:
        names = dict.fromkeys(one.image for one in streams.values() if (one.network, one.teacher) == place)
        sizes = {name: tuple(images[name].shape[1:]) for name in names}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
            raise MethodError(
                f"The images of a step have unequal sizes, channels first: {listed}. A network encodes all of its "
                "images in one pass, so they may only differ in the number of samples."
            )


def check_weights(weights: Mapping[str, float]) -> None:
    """Whether the weights of the terms are numbers of 0 or more, but for rounding.

    Raises:
        MethodError: one is not.
    """
    for name, weight in weights.items():
        if not (isinstance(weight, Real) and math.isfinite(weight) and weight > -_ROUNDING):
            raise MethodError(
                f"loss_weights() returns {weight!r} for the term {name!r}. Return a finite number, 0 or more. To make "
                "a term large, yield it with a minus."
            )


def weighted_sum(part: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss of the terms that a method has yielded together.

    Raises:
        MethodError: it is no dictionary of terms; or a term has no weight, is no scalar tensor, or does not depend on
            the network.
    """
    if not (isinstance(part, Mapping) and part):
        found = "an empty dictionary" if part == {} else f"a value of the type {type(part).__name__}"
        raise MethodError(f"loss_terms() yields {found}. Yield a dictionary with a term in it, by its name.")
    for name, value in part.items():
        if not isinstance(value, Tensor):
            raise MethodError(
                f"The term {name!r} is of the type {type(value).__name__}, not a tensor. Leave out a term that has no "
                "value in this step or stage: a term that is absent is logged as nan."
            )
        if name not in weights:
            raise MethodError(
                f"The term {name!r} has no weight: loss_weights() returns {', '.join(map(repr, weights)) or 'none'}."
            )
        if value.ndim > 0:
            raise MethodError(f"The term {name!r} has the shape {tuple(value.shape)}; a term is a scalar.")
        if not value.requires_grad:
            raise MethodError(
                f"The term {name!r} does not depend on any stream with gradient, as a constant zero does not. Leave "
                "it out: a term that is absent is logged as nan. If it is made of a stream, that stream has "
                "gradient=False or was detached. To log a number that nothing is learned from, call self.record()."
            )
    return torch.stack([weights[name] * value for name, value in part.items()]).sum()
