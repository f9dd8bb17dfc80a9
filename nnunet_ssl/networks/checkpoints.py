"""Weights of nnU-Net's own network, out of checkpoints: to predict with elsewhere, or to start from."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import replacing
from nnunet_ssl.text import one_line, some_of

# The first bytes of what torch.save writes.
_ZIP = b"PK\x03\x04"

# Where TrainingNetwork.training_state keeps a teacher. The network that predicts is in network_weights instead.
_TEACHER = "training_only.teacher."


class NotPlainError(UserError):
    """A checkpoint holds more than tensors and plain values, as those of nnU-Net's own trainers do."""


def read_checkpoint(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint's tensors and plain values; of classes and functions it may name PyTorch's own list alone.

    Raises:
        NotPlainError: it holds anything else.
        UserError: it cannot be opened, or is damaged.
    """
    unread = f"The checkpoint {file} could not be read as tensors and plain values"
    try:
        with file.open("rb") as opened:
            try:
                return _load(opened, device)
            except Exception as error:
                # Its class is pickle's, which this package does not import.
                if type(error).__name__ != "UnpicklingError":
                    raise UserError(f"{unread}: it is damaged, or not a checkpoint ({one_line(error)}).") from None
                # Without PyTorch's text, which recommends to load the file without this check.
                trainer, objects = _named_in(file)
                writer = f" {trainer} wrote it." if trainer else ""
                raise NotPlainError(
                    f"{unread}: it contains {some_of(objects, 3) or 'other objects'}. Such objects are not loaded, "
                    f"because they could run code.{writer}"
                ) from None
    except OSError as error:
        raise UserError(f"The checkpoint {file} could not be opened: {error.strerror}.") from None


def _load(opened: BinaryIO, device: torch.device | str) -> dict[str, Any]:
    # PyTorch before 2.6 runs code in files of its older formats, weights_only or not (CVE-2025-32434).
    if opened.read(len(_ZIP)) != _ZIP:
        raise ValueError("it is not in the format that PyTorch writes since version 1.6")
    # PyTorch does not compare what it reads with the file's checksums.
    with zipfile.ZipFile(opened) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"its part {broken} has changed since it was written")
    opened.seek(0)
    checkpoint = torch.load(opened, map_location=device, weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it contains a {type(checkpoint).__name__}, not a table of entries")
    return checkpoint


def _named_in(file: Path) -> tuple[str | None, list[str]]:
    """Which trainer wrote a checkpoint, and which classes and functions it names; nothing of it is run."""
    try:
        content = torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")
        operations = list(pickletools.genops(content))
    except Exception:
        return None, []
    # Between an entry's name and its value there may be a note that the name comes up again.
    values = [(code.name, value) for code, value, _ in operations if "PUT" not in code.name and code.name != "MEMOIZE"]
    trainer = None
    for (_, name), (code_name, value) in pairwise(values):
        if name == "trainer_name" and code_name.endswith("UNICODE"):
            trainer = str(value)
    objects = dict.fromkeys(str(value).replace(" ", ".") for code_name, value in values if code_name == "GLOBAL")
    return trainer, [name for name in objects if not name.startswith(("torch.", "collections."))]


def write_checkpoint(
    checkpoint: Mapping[str, Any], file: Path, *, aside: Path | None = None, durable: bool = False
) -> None:
    """Write a checkpoint; other arguments and errors as for :func:`~nnunet_ssl.files.replacing`."""
    try:
        with replacing(file, aside=aside, durable=durable) as unfinished, unfinished.open("wb") as opened:
            torch.save(checkpoint, opened)
    except RuntimeError as error:
        # What PyTorch's writer makes of a full disk.
        raise OSError(one_line(error)) from error


def differences(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """In what a checkpoint's network and the one of the plans differ, in the words of plans; empty if in nothing.

    Args:
        there: the checkpoint's ``network_weights``.
        here: the state dict to fill with them.
    """
    unlike = [name for name in {**here, **there} if _shape(there.get(name)) != _shape(here.get(name))]
    if not unlike:
        return []
    theirs, ours = _in_words(there), _in_words(here)
    found = [f"{what} {theirs[what]} there, {ours[what]} here" for what in ours if theirs[what] != ours[what]]
    return found or [f"{len(unlike)} tensors, such as {unlike[0]}"]


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _in_words(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights of one of nnU-Net's U-Nets say of it."""
    kernels = {name: tensor for name, tensor in weights.items() if name.endswith("weight") and tensor.dim() > 3}
    encoder = [tensor for name, tensor in kernels.items() if name.startswith("encoder.")]
    heads = [tensor for name, tensor in kernels.items() if ".seg_layers." in name]
    stages: dict[str, Tensor] = {}
    for name, tensor in kernels.items():
        if stage := re.match(r"encoder\.stages\.\d+\.", name):
            stages.setdefault(stage[0], tensor)
    return {
        "input channels": encoder[0].shape[1] if encoder else None,
        "outputs (background and classes, or regions)": heads[-1].shape[0] if heads else None,
        "features of the stages": [tensor.shape[0] for tensor in stages.values()],
        "kernel sizes": [tuple(tensor.shape[2:]) for tensor in stages.values()],
    }


def networks_in(training_state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Whose weights a checkpoint holds, ``student`` and perhaps ``teacher``; the one that predicts comes first.

    Args:
        training_state: :meth:`~nnunet_ssl.networks.training_network.TrainingNetwork.training_state` of the checkpoint.
    """
    if not any(name.startswith(_TEACHER) for name in training_state):
        return ("student",)
    student_predicts = not any(name.startswith("encoder.") for name in training_state)
    return ("student", "teacher") if student_predicts else ("teacher", "student")


@torch.no_grad()
def stock_weights(
    network: nn.Module,
    network_weights: Mapping[str, Tensor],
    training_state: Mapping[str, Tensor],
    *,
    weights: str,
) -> dict[str, Tensor]:
    """The state dict of nnU-Net's network with the student's or the teacher's weights; fills ``network`` with them.

    Args:
        network: nnU-Net's own, built from the checkpoint's plans.
        network_weights: the checkpoint's weights of the network that predicts.
        training_state: as for :func:`networks_in`.
        weights: one of :func:`networks_in`.

    Raises:
        RuntimeError: the checkpoint is of another network.
    """
    network.load_state_dict(network_weights)
    if weights != networks_in(training_state)[0]:
        prefix = _TEACHER if weights == "teacher" else ""
        # A parameter that has several names in the state dict has one here, as in training_state.
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            tensor.copy_(training_state[f"{prefix}{name}"])
    return dict(network.state_dict())


@torch.no_grad()
def with_pretrained_encoder(network: Any, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of ``network``, its encoder filled from a checkpoint of self-supervised pretraining.

    The checkpoint is one of nnssl (https://github.com/MIC-DKFZ/nnssl): its entry ``nnssl_adaptation_plan`` says under
    which names encoder and stem are. As nnU-Net does with such checkpoints in its own fine-tuning, a stem for one
    channel is repeated for several and divided by their number, and the decoder stays as ``network`` has it.

    Args:
        network: a PlainConvUNet or ResidualEncoderUNet.
        checkpoint: with ``network_weights`` and ``nnssl_adaptation_plan``.

    Raises:
        UserError: there is no such entry, or the checkpoint's encoder is not that of ``network``.
    """
    plan = checkpoint.get("nnssl_adaptation_plan", {})
    if not {"key_to_encoder", "key_to_stem"} <= set(plan) or "network_weights" not in checkpoint:
        raise UserError(
            "it contains no nnssl_adaptation_plan, so it is not a checkpoint of nnssl. Give a checkpoint of nnU-Net "
            "or of this package to -pretrained_weights as it is."
        )
    encoder = network.encoder.state_dict(prefix="encoder.")
    input_weights = {f"{name}.weight" for name in network.keys_to_in_proj}
    found: dict[str, Tensor] = {}
    # The stem first: it may be a part of what is called the encoder.
    places = [(plan["key_to_stem"], network.key_to_stem), (plan["key_to_encoder"], network.key_to_encoder)]
    for name, tensor in checkpoint["network_weights"].items():
        place = next(((theirs, ours) for theirs, ours in places if name.startswith(f"{theirs}.")), None)
        if place is None:
            continue
        ours = place[1] + name.removeprefix(place[0])
        if ours in input_weights and ours in encoder and tensor.shape[1] == 1:
            channels = encoder[ours].shape[1]
            tensor = tensor.repeat_interleave(channels, dim=1) / channels
        found[ours] = tensor

    unlike = [f"{name} is missing there" for name in encoder if name not in found]
    unlike += [f"{name} is missing here" for name in found if name not in encoder]
    unlike += [
        f"{name} is {tuple(found[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in encoder.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if unlike:
        theirs = plan.get("architecture_plans", {}).get("arch_class_name", "unknown")
        raise UserError(
            f"its encoder ({theirs}) is not that of the plans ({type(network).__name__}): {len(unlike)} tensors "
            f"differ, such as {'; '.join(unlike[:3])}."
        )
    network.encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in found.items()})
    return dict(network.state_dict())
