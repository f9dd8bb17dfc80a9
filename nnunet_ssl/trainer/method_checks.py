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
_MOMENTS = 1000


# ---- before a training ----------------------------------------------------------------------------------------------


def check_hook_names(method: type, base: type) -> None:
    """Whether what a method adds to the base has other names than a hook with a slip of the pen, which nobody calls.

    Raises:
        MethodError: a name is nearly that of a hook.
    """
    classes = method.__mro__[: method.__mro__.index(base)]
    added = {name for one in classes for name in vars(one) if not name.startswith("_") and not hasattr(base, name)}
    for name in sorted(added):
        near = difflib.get_close_matches(name, _HOOKS, n=1, cutoff=_SIMILAR)
        if near:
            raise MethodError(
                f"{method.__name__} has {name!r}, which nothing calls. Did you mean {near[0]!r}? If it is a function "
                "of your own, give it a name that is less like a hook's, or one with an underscore in front."
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


def check_stages(stage: Callable[[float], Any], stages: Sequence[str]) -> None:
    """Whether ``stage()`` returns one of ``stages()`` at every moment of a training; raises as :func:`known_stage`."""
    for moment in range(_MOMENTS):
        known_stage(stage(moment / _MOMENTS), stages)


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


def check_attributes(attributes: Mapping[str, Any], trained: Iterable[nn.Parameter]) -> None:
    """Whether all modules with weights that a trainer has are in its network.

    Args:
        attributes: of the trainer.
        trained: the network's weights.

    Raises:
        MethodError: no optimizer would move a module, and no checkpoint would hold it.
    """
    known = set(trained)
    for name, value in attributes.items():
        if isinstance(value, nn.Module) and not set(value.parameters()) <= known:
            raise MethodError(
                f"The trainer's attribute {name!r} is a module with weights of its own. The optimizer does not move "
                "them, and no checkpoint holds them. Put it into the training network, in build_training_network(): "
                f"network.training_only[{name!r}] = module."
            )


# ---- in a step ------------------------------------------------------------------------------------------------------


def check_images(streams: Mapping[str, Stream], images: Mapping[str, Tensor], size: Sequence[int]) -> None:
    """Whether the streams' images are there, of one size, and as large as the labeled batch's.

    Args:
        streams: by name.
        images: by name.
        size: (C, *patch size).

    Raises:
        MethodError: a stream is none; or an image is missing or no tensor, or of another size.
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
    sizes = {name: tuple(images[name].shape[1:]) for name in dict.fromkeys(one.image for one in streams.values())}
    listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
    if len(set(sizes.values())) > 1:
        raise MethodError(
            f"The images of a step have unequal sizes, channels first: {listed}. All are encoded in one pass, so "
            "they may only differ in the number of samples."
        )
    if sizes and set(sizes.values()) != {tuple(size)}:
        raise MethodError(
            f"The images of a step have another size than the batches, channels first: {listed}, not {tuple(size)}."
        )


def check_weights(weights: Mapping[str, float]) -> None:
    """Whether the weights of the terms are numbers of 0 or more.

    Raises:
        MethodError: one is not.
    """
    for name, weight in weights.items():
        if not (isinstance(weight, Real) and math.isfinite(weight) and weight >= 0):
            raise MethodError(
                f"loss_weights() returns {weight!r} for the term {name!r}. Return a finite number, 0 or more; what is "
                "to become large is a term with a minus in front."
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
