"""nnU-Net's U-Net as training sees it: encoder and decoder apart, many passes in one forward, a teacher beside it."""

from __future__ import annotations

import copy
import pydoc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.errors import UserError
from nnunet_ssl.networks.pointwise import pointwise
from nnunet_ssl.text import some_of

UNet: TypeAlias = PlainConvUNet | ResidualEncoderUNet
"""The networks of nnU-Net that can be trained here."""

SUPPORTED = {architecture.__name__: architecture for architecture in (PlainConvUNet, ResidualEncoderUNet)}
"""Their classes, by name."""

_UPDATES = "training_only.teacher.updates"
_HOMES_OF_LAYERS = ("torch.nn.", "dynamic_network_architectures.")

Logits: TypeAlias = Any
"""(N, C, *spatial), or with deep supervision nnU-Net's list of them, full resolution first."""


@dataclass(frozen=True)
class Stream:
    """One pass of a decoder, and what it should return.

    Attributes:
        image: name of the image whose features are decoded. Streams of one image share its pass of the encoder.
        dropout: probability with which a channel is dropped, for this stream alone.
        dropout_on: where: ``skips``, ``bottleneck``, ``features`` (the decoder's last, before its heads).
        gradient: whether a loss is taken of this stream. Without, it runs without gradient.
        deep_supervision: whether it puts out all of nnU-Net's resolutions or the full one alone.
        decoder: which of the training network's ``decoders``; nnU-Net's own by default.
        head: whether the training network's ``head`` runs on the decoder's last features.
        features: whether the decoder's last features are returned, without gradient.
        bottleneck: whether the encoder's last features are returned, as the decoder got them.
        teacher: run by the teacher: its encoder, its decoder, its head. A teacher's stream has no gradient.
    """

    image: str
    dropout: float = 0.0
    dropout_on: tuple[str, ...] = ("skips", "bottleneck")
    gradient: bool = True
    deep_supervision: bool = False
    decoder: str | None = None
    head: bool = False
    features: bool = False
    bottleneck: bool = False
    teacher: bool = False

    def __post_init__(self) -> None:
        if self.teacher and self.gradient:
            raise ValueError("A teacher's stream has no gradient: set gradient=False.")

    @property
    def kind(self) -> Stream:
        """The stream without what the decoder's pass does not depend on.

        ``torch.compile`` makes a graph for every value that it sees: for each name, and for each probability.
        """
        return replace(self, image="image", dropout=0.0, dropout_on=(), gradient=False)


class StreamOutput(NamedTuple):
    """What a stream returns.

    Attributes:
        logits: (N, C, *spatial), or with deep supervision nnU-Net's list of them, full resolution first.
        features: (N, F, *spatial), the decoder's last features, where the stream asks for them. Without gradient: a
            compiled forward would otherwise make one of zeros for each, as large as they are.
        bottleneck: (N, G, *coarse), the encoder's last features, where the stream asks for them.
        head: the head's outputs by name, where the stream asks for them.
    """

    logits: Logits
    features: Tensor | None = None
    bottleneck: Tensor | None = None
    head: Mapping[str, Tensor] | None = None

    @property
    def full_resolution(self) -> Tensor:
        """The logits (N, C, *spatial), with deep supervision or without."""
        return self.logits[0] if isinstance(self.logits, list) else self.logits

    def detach(self) -> StreamOutput:
        """The same values without gradient."""
        return StreamOutput(
            [level.detach() for level in self.logits] if isinstance(self.logits, list) else self.logits.detach(),
            None if self.features is None else self.features.detach(),
            None if self.bottleneck is None else self.bottleneck.detach(),
            None if self.head is None else {name: tensor.detach() for name, tensor in self.head.items()},
        )


class StreamMasks(NamedTuple):
    """Channel dropout of one stream: factors (N, channels, 1, ...), or None where nothing is dropped.

    Attributes:
        levels: one per level of the encoder, full resolution first.
        features: for the decoder's last features.
    """

    levels: list[Tensor | None]
    features: Tensor | None


Masks: TypeAlias = Mapping[str, StreamMasks]


class TrainingNetwork(nn.Module):
    """nnU-Net's own encoder and decoder, under their own names, and beside them what only training needs.

    Its state dict is the stock network's. Called with one tensor it is the network that predicts, for nnU-Net's
    validation. Called with images and streams it runs all streams of a training step at once, so that a DDP wrapper and
    ``torch.compile`` see one forward.

    Args:
        network: the network that nnU-Net built from the plans.
        decoders: more decoders of the same encoder, by name.
        head: called as ``head(image, features)`` with a stream's image and its decoder's last features; returns
            tensors (N, ...) by name.
        teacher: whether to keep a teacher, a copy of network and head that :meth:`update_teacher` moves.
        predict_with_teacher: whether the teacher is the network that predicts and that ``state_dict`` holds.

    Attributes:
        activation_checkpointing: whether passes with gradient keep the outputs of the encoder's stages and of the
            decoders' but the last alone, and compute what is inside of them again for the backward pass. The last
            stage costs the most time and saves little: its activations are needed when memory is at its peak.

    Raises:
        NotImplementedError: the network is none of nnU-Net's U-Nets.
    """

    activation_checkpointing = False

    def __init__(
        self,
        network: nn.Module,
        *,
        decoders: Mapping[str, nn.Module] | None = None,
        head: nn.Module | None = None,
        teacher: bool = False,
        predict_with_teacher: bool = False,
    ) -> None:
        super().__init__()
        unet = check_supported(network)
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        self.predict_with_teacher = predict_with_teacher
        self.training_only = nn.ModuleDict({f"decoder_{name}": decoder for name, decoder in (decoders or {}).items()})
        if head is not None:
            self.training_only["head"] = head
        if teacher:
            self.training_only["teacher"] = _Teacher(network, head)

    @property
    def teacher(self) -> _Teacher:
        """The teacher, of a network that has one."""
        teacher = self.training_only["teacher"]
        assert isinstance(teacher, _Teacher)
        return teacher

    def forward(
        self,
        images: Tensor | Mapping[str, Tensor],
        streams: Mapping[str, Stream] | None = None,
        masks: Masks | None = None,
    ) -> Logits | dict[str, StreamOutput]:
        """Predict, or run all streams of a step.

        Args:
            images: a tensor (N, C, *spatial), or tensors by name whose sizes differ in N at most.
            streams: the passes, by name.
            masks: of :func:`draw_dropout_masks`.

        Returns:
            What nnU-Net's network returns, or the output of each stream by name.
        """
        if streams is None:
            assert isinstance(images, Tensor)
            return self.predict(images)
        assert isinstance(images, Mapping) and masks is not None
        outputs: dict[str, StreamOutput] = {}
        student = {name: stream for name, stream in streams.items() if not stream.teacher}
        skips = self.encode_stacked({name: images[name] for name in _images_of(student)})
        for decoder in dict.fromkeys(stream.decoder for stream in student.values()):
            group = {n: stream for n, stream in student.items() if stream.gradient and stream.decoder == decoder}
            if group:
                outputs |= self.decode(group, images, skips, masks)
        with torch.no_grad():
            for name, stream in student.items():
                if not stream.gradient:
                    detached = {stream.image: [level.detach() for level in skips[stream.image]]}
                    outputs |= self.decode({name: stream}, images, detached, masks)
            taught = {name: stream for name, stream in streams.items() if stream.teacher}
            if taught:
                skips = self.teacher.encode_stacked({name: images[name] for name in _images_of(taught)})
                for name, stream in taught.items():
                    outputs |= self.decode({name: stream}, images, skips, masks)
        return outputs

    def predict(self, image: Tensor) -> Logits:
        """What nnU-Net's network returns for an image (N, C, *spatial); deep supervision as set on the decoder."""
        if not self.predict_with_teacher:
            return self.decoder(self.encoder(image))
        # nnU-Net switches deep supervision on the decoder it knows.
        self.teacher.decoder.deep_supervision = self.decoder.deep_supervision
        return self.teacher.decoder(self.teacher.encoder(image))

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's features of an image, full resolution first."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self.encoder(image)
        skips = []
        stem = getattr(self.encoder, "stem", None)
        features = image if stem is None else _checkpoint(stem, image)
        for stage in self.encoder.stages:
            features = _checkpoint(stage, features)
            skips.append(features)
        return skips

    def encode_stacked(self, images: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """The encoder's features of each image, full resolution first, from one pass of all of them."""
        sizes = [len(image) for image in images.values()]
        levels = [_split(level, sizes) for level in self.encode(_cat([*images.values()]))]
        return {name: [level[index] for level in levels] for index, name in enumerate(images)}

    def decode(
        self,
        streams: Mapping[str, Stream],
        images: Mapping[str, Tensor],
        skips: Mapping[str, Sequence[Tensor]],
        masks: Masks,
    ) -> dict[str, StreamOutput]:
        """Streams of one decoder, stacked.

        Args:
            streams: by name; all of the same decoder, all of the student or all of the teacher.
            images: by name.
            skips: by the name of an image, the encoder's features, full resolution first, bottleneck last.
            masks: of :func:`draw_dropout_masks`.
        """
        # Deep supervision first: the heads of lower resolutions then take the leading rows of the stack.
        names = sorted(streams, key=lambda name: not streams[name].deep_supervision)
        branch = self.teacher if streams[names[0]].teacher else self
        dropped = {name: drop_channels(skips[streams[name].image], masks.get(name)) for name in names}
        sizes = [len(dropped[name][0]) for name in names]
        supervised = sum(size for size, name in zip(sizes, names, strict=True) if streams[name].deep_supervision)
        stacked = [_cat(level) for level in zip(*dropped.values(), strict=True)]

        decoder = branch.decoder_of(streams[names[0]])
        again = self.activation_checkpointing and torch.is_grad_enabled()
        coarse, last = _decoder_levels(decoder, stacked, coarse_rows=supervised, checkpointing=again)
        features = [
            _times(part, masks[name].features if name in masks else None)
            for name, part in zip(names, _split(last, sizes), strict=True)
        ]
        full = _split(pointwise(decoder.seg_layers[-1], _cat(features)), sizes)

        outputs: dict[str, StreamOutput] = {}
        first = 0
        for name, logits, part in zip(names, full, features, strict=True):
            stream, rows = streams[name], slice(first, first + len(logits))
            first = rows.stop
            outputs[name] = StreamOutput(
                [logits, *(level[rows] for level in reversed(coarse))] if stream.deep_supervision else logits,
                part.detach() if stream.features else None,
                dropped[name][-1] if stream.bottleneck else None,
                branch.training_only["head"](images[stream.image], part) if stream.head else None,
            )
        return outputs

    def decode_alone(
        self, stream: Stream, image: Tensor, skips: Sequence[Tensor], masks: StreamMasks | None
    ) -> StreamOutput:
        """One stream, with :attr:`Stream.kind` in its place: what is compiled of one then serves all of its kind.

        Args:
            stream: the stream's kind.
            image: what the stream names.
            skips: the encoder's features of the image, full resolution first.
            masks: the stream's channel dropout.
        """
        images, name = {stream.image: image}, "alone"
        return self.decode({name: stream}, images, {stream.image: skips}, {} if masks is None else {name: masks})[name]

    def decoder_of(self, stream: Stream) -> UNetDecoder:
        """The decoder that a stream names."""
        return self.decoder if stream.decoder is None else self.training_only[f"decoder_{stream.decoder}"]  # type: ignore[return-value]

    # ---- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_teacher(self, max_decay: float) -> None:
        """Move the teacher towards the student: θ' ← d θ' + (1 - d) θ, d = min(``max_decay``, 1 - 1/(step + 1)).

        Source: Tarvainen and Valpola, Mean teachers are better role models, NIPS 2017, section 2. Step counts from 0,
        so that the first update copies the student.
        """
        teacher, pairs = self.teacher, self._teacher_pairs()
        keep = min(max_decay, 1 - 1 / (teacher.updates + 1))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        # All in a few kernels, where each tensor would have its own.
        torch._foreach_lerp_([mine for mine, _ in moved], [students for _, students in moved], 1 - keep)
        for mine, students in pairs:
            if not mine.is_floating_point():
                mine.copy_(students)
        teacher.updates += 1

    def _teacher_pairs(self) -> list[tuple[Tensor, Tensor]]:
        student = dict([*self.named_parameters(), *self.named_buffers()])
        teacher = dict([*self.teacher.named_parameters(), *self.teacher.named_buffers()])
        return [(tensor, student[name]) for name, tensor in teacher.items()]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of the network that predicts, under nnU-Net's names, and nothing else."""
        return _stock(self.teacher if self.predict_with_teacher else self).state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights of nnU-Net's network, to start from: into the student, and into the teacher where there is one.

        What only training needs stays as it is.
        """
        loaded = _stock(self).load_state_dict(state_dict, *args, **kwargs)
        if "teacher" in self.training_only:
            with torch.no_grad():
                for mine, students in self._teacher_pairs():
                    mine.copy_(students)
        return loaded

    def training_state(self) -> dict[str, Tensor]:
        """All that a training needs to continue and ``state_dict`` does not hold."""
        everything = dict([*self.named_parameters(), *self.named_buffers()])
        prefix = "training_only.teacher." if self.predict_with_teacher else ""
        in_state_dict = (f"{prefix}encoder.", f"{prefix}decoder.")
        state = {name: tensor.detach() for name, tensor in everything.items() if not name.startswith(in_state_dict)}
        if "teacher" in self.training_only:
            state[_UPDATES] = torch.tensor(self.teacher.updates)
        return state

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`training_state`, after ``load_state_dict`` of the same checkpoint.

        Raises:
            KeyError, ValueError: it is of another network; the text names the tensors.
        """
        expected = self.training_state()
        if set(expected) != set(state):
            raise KeyError(f"tensors that are missing or unknown: {some_of(sorted(set(expected) ^ set(state)), 3)}")
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(state[name])
        if "teacher" in self.training_only:
            self.teacher.updates = int(state[_UPDATES])


class _Teacher(TrainingNetwork):
    """A copy of the student that no optimizer moves.

    Attributes:
        updates: how often it was moved. On the host, since its moves depend on it.
    """

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__(copy.deepcopy(network), head=copy.deepcopy(head))
        self.requires_grad_(False)
        self.updates = 0


def check_supported(network: nn.Module) -> UNet:
    """The network, if it has an encoder and a decoder that can be run apart.

    Raises:
        NotImplementedError: it is none of nnU-Net's U-Nets.
    """
    if isinstance(network, tuple(SUPPORTED.values())):
        return network
    raise unsupported(type(network).__name__)


def check_architecture(configuration: ConfigurationManager) -> None:
    """Refuse plans that name anything but networks and layers, before a network is built from them.

    nnU-Net looks these names up in all of Python and calls what it finds: in a plans file from elsewhere,
    ``"nonlin": "os.system"`` would be a command.

    Raises:
        UserError: a name is none of a network or layer of PyTorch or of dynamic_network_architectures.
    """
    options = configuration.network_arch_init_kwargs
    named = {name: options.get(name) for name in configuration.network_arch_init_kwargs_req_import}
    for entry, name in {"network_class_name": configuration.network_arch_class_name, **named}.items():
        if name is not None and not _is_layer(name):
            raise UserError(
                f"The plans' architecture has {entry} = {name!r}, which is no network or layer of torch.nn or "
                "dynamic_network_architectures. nnU-Net would import and call it, whatever it is. If the plans come "
                "from elsewhere, do not use them (SECURITY.md)."
            )


def _is_layer(name: object) -> bool:
    if not isinstance(name, str) or not name.startswith(_HOMES_OF_LAYERS):
        return False
    # A path through modules can lead out of the package again, to what one of them imports.
    found = pydoc.locate(name)
    if found is None:
        return True  # nnU-Net then looks for it in dynamic_network_architectures
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(_HOMES_OF_LAYERS)


def unsupported(architecture: str) -> NotImplementedError:
    """What to raise for an architecture that is none of nnU-Net's U-Nets."""
    return NotImplementedError(
        f"Semi-supervised training needs a network with an encoder and a decoder that it can run apart. The trainer "
        f"and its plans make a {architecture}; supported are {' and '.join(SUPPORTED)}."
    )


def _images_of(streams: Mapping[str, Stream]) -> list[str]:
    return list(dict.fromkeys(stream.image for stream in streams.values()))


def _stock(network: TrainingNetwork) -> nn.Module:
    # nnU-Net's network again, of the same parts.
    stock = nn.Module()
    stock.encoder, stock.decoder = network.encoder, network.decoder
    return stock


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    # torch.cat copies, a single tensor too.
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _split(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    # The backward pass of split copies, that of a single part too.
    return [tensor] if len(sizes) == 1 else tensor.split(sizes)


def _checkpoint(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(run, *tensors, use_reentrant=False)


def _decoder_levels(
    decoder: UNetDecoder, skips: Sequence[Tensor], *, coarse_rows: int, checkpointing: bool
) -> tuple[list[Tensor], Tensor]:
    """nnU-Net's decoder up to its last features, and the logits of its lower resolutions, lowest first.

    ``UNetDecoder.forward`` with one difference: the heads of lower resolutions are only run for the first
    ``coarse_rows`` samples, since no other stream has a loss there.
    """
    coarse = []
    x = skips[-1]
    for level, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):

        def run(x: Tensor, skip: Tensor, upsample: nn.Module = upsample, stage: nn.Module = stage) -> Tensor:
            return stage(torch.cat((upsample(x), skip), 1))

        last = level == len(decoder.stages) - 1
        skip = skips[-(level + 2)]
        x = _checkpoint(run, x, skip) if checkpointing and not last else run(x, skip)
        if coarse_rows and not last:
            coarse.append(pointwise(decoder.seg_layers[level], x[:coarse_rows]))
    return coarse, x


def draw_dropout_masks(network: TrainingNetwork, streams: Mapping[str, Stream], images: Mapping[str, Tensor]) -> Masks:
    """Channel dropout for every stream that has it: 0, or 1 / (1 - p), per sample and channel.

    The masks are drawn before the passes, so that both memory modes use the same ones and a compiled forward draws
    nothing.
    """
    channels = network.encoder.output_channels

    def draw(stream: Stream, place: str, count: int) -> Tensor | None:
        if place not in stream.dropout_on:
            return None
        image, keep = images[stream.image], 1 - stream.dropout
        return image.new_empty(len(image), count, *[1] * (image.ndim - 2)).bernoulli_(keep) / keep

    return {
        name: StreamMasks(
            [*(draw(stream, "skips", count) for count in channels[:-1]), draw(stream, "bottleneck", channels[-1])],
            draw(stream, "features", channels[0]),
        )
        for name, stream in streams.items()
        if stream.dropout
    }


def drop_channels(skips: Sequence[Tensor], masks: StreamMasks | None) -> list[Tensor]:
    """The encoder's features with a stream's dropout, or as they are."""
    if masks is None:
        return list(skips)
    return [_times(skip, mask) for skip, mask in zip(skips, masks.levels, strict=True)]


def _times(features: Tensor, mask: Tensor | None) -> Tensor:
    return features if mask is None else features * mask.to(features.dtype)
