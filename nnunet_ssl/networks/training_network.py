"""nnU-Net's network as training sees it: many passes in one forward, and what only training needs in addition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.errors import MethodError, returned
from nnunet_ssl.networks.branch import Branch
from nnunet_ssl.networks.streams import Logits, Masks, Stream, StreamMasks, StreamOutput, draw_dropout_masks
from nnunet_ssl.networks.teacher import Teacher
from nnunet_ssl.text import some_of

_UPDATES = "training_only.teacher.updates"


class TrainingNetwork(Branch):
    """nnU-Net's own encoder and decoder, under their own names, and in addition what only training needs.

    Its state dict is the stock network's. Called with one tensor it is the network that predicts, for nnU-Net's
    validation. Called with images and streams it runs all streams of a training step at once, so that
    ``torch.compile`` sees one forward.

    Args:
        network: the network that nnU-Net built from the plans.
        decoders: more decoders of the same encoder, by name.
        head: called as ``head(image, features)`` with a stream's image and its decoder's last features; returns
            tensors (N, ...) by name.
        networks: more whole networks, each with an encoder of its own, by name.
        teacher: whether to keep a teacher, a copy of network and head that :meth:`update_teacher` moves.

    Attributes:
        predict_with_teacher: whether the teacher is the network that predicts and that ``state_dict`` holds. The
            trainer sets it, as the setting ``predict_with`` says.

    Raises:
        UnsupportedNetworkError: a network is none of nnU-Net's U-Nets.
        MethodError: a decoder or network has no weights of its own.

    >>> from dynamic_network_architectures.architectures.unet import PlainConvUNet
    >>> unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1)
    >>> network = TrainingNetwork(unet, teacher=True)
    >>> streams = {"u": Stream("u"), "u_teacher": Stream("u", teacher=True, gradient=False)}
    >>> outputs = network({"u": torch.zeros(1, 1, 8, 8)}, streams, masks={})
    >>> bool((outputs["u"].logits == outputs["u_teacher"].logits).all())  # a teacher begins as the student
    True
    >>> set(network.state_dict()) == set(unet.state_dict())
    True
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        decoders: Mapping[str, nn.Module] | None = None,
        head: nn.Module | None = None,
        networks: Mapping[str, nn.Module] | None = None,
        teacher: bool = False,
    ) -> None:
        super().__init__(network, decoders=decoders, head=head)
        self.predict_with_teacher = False
        _check_apart(self.encoder, self.decoder, decoders or {}, networks or {})
        for name, other in (networks or {}).items():
            self.training_only[f"network_{name}"] = Branch(other)
        if teacher:
            self.training_only["teacher"] = Teacher(network, head)

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return "teacher" in self.training_only

    @property
    def teacher(self) -> Teacher:
        """The teacher, of a network that has one."""
        teacher = self.training_only["teacher"]
        assert isinstance(teacher, Teacher)
        return teacher

    def branch_of(self, stream: Stream) -> Branch:
        """The network that runs a stream: this one, another whole network, or the teacher."""
        if stream.teacher:
            return self.teacher
        branch = self if stream.network is None else self.training_only[f"network_{stream.network}"]
        assert isinstance(branch, Branch)
        return branch

    def check_streams(self, streams: Mapping[str, Stream]) -> None:
        """Whether all that streams ask for is there.

        Raises:
            MethodError: a teacher, network, decoder or head is not.
        """
        for name, stream in streams.items():
            if stream.teacher and not self.has_teacher:
                raise _absent(name, "a teacher", "TrainingNetwork(network, teacher=True)")
            if stream.network is not None and f"network_{stream.network}" not in self.training_only:
                made = f"TrainingNetwork(network, networks={{{stream.network!r}: another_network(network)}})"
                raise _absent(name, f"the network {stream.network!r}", made)
            parts = self.branch_of(stream).training_only
            if stream.decoder is not None and f"decoder_{stream.decoder}" not in parts:
                if stream.teacher:
                    raise MethodError(f"The stream {name!r} is the teacher's, which has nnU-Net's own decoder alone.")
                made = f"TrainingNetwork(network, decoders={{{stream.decoder!r}: another_decoder(network.decoder)}})"
                raise _absent(name, f"the decoder {stream.decoder!r}", made)
            if stream.head and "head" not in parts:
                raise _absent(name, "a head", "TrainingNetwork(network, head=...)")

    def draw_dropout_masks(self, streams: Mapping[str, Stream], images: Mapping[str, Tensor]) -> Masks:
        """Of every stream as wide as its network: see :func:`~nnunet_ssl.networks.streams.draw_dropout_masks`."""
        masks: dict[str, StreamMasks] = {}
        for name, stream in streams.items():
            masks |= draw_dropout_masks(self.branch_of(stream).encoder.output_channels, {name: stream}, images)
        return masks

    def set_activation_checkpointing(self, on: bool) -> None:
        """Switch it on or off in all networks that learn."""
        for module in self.modules():
            if isinstance(module, Branch):
                module.activation_checkpointing = on

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
            masks: of :func:`~nnunet_ssl.networks.streams.draw_dropout_masks`.

        Returns:
            What nnU-Net's network returns, or the output of each stream by name.
        """
        if streams is None:
            assert isinstance(images, Tensor)
            return self.predict(images)
        assert isinstance(images, Mapping) and masks is not None
        outputs: dict[str, StreamOutput] = {}
        for place in dict.fromkeys((stream.network, stream.teacher) for stream in streams.values()):
            group = {name: one for name, one in streams.items() if (one.network, one.teacher) == place}
            outputs |= _run(self.branch_of(next(iter(group.values()))), group, images, masks)
        return outputs

    def predict(self, image: Tensor) -> Logits:
        """What nnU-Net's network returns for an image (N, C, *spatial); deep supervision as set on the decoder."""
        if not self.predict_with_teacher:
            return self.decoder(self.encoder(image))
        # nnU-Net switches deep supervision on the decoder it knows.
        self.teacher.decoder.deep_supervision = self.decoder.deep_supervision
        return self.teacher.decoder(self.teacher.encoder(image))

    # ---- weights ----------------------------------------------------------------------------------------------------

    def update_teacher(self, max_decay: float) -> None:
        """Move the teacher towards the student: see :meth:`~nnunet_ssl.networks.teacher.Teacher.follow`."""
        self.teacher.follow(self, max_decay)

    def check_teacher_moved(self) -> None:
        """Whether the teacher, if there is one, follows the student; called after steps that moved the student.

        Raises:
            MethodError: it was never moved.
        """
        if self.has_teacher and self.teacher.updates == 0:
            raise MethodError(
                "The network has a teacher, which after_optimizer_step() did not move. Call "
                "self.training_network.update_teacher(decay) there, or do not override it: by default the teacher "
                "moves with the setting ema_decay."
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of the network that predicts, under nnU-Net's names, and nothing else."""
        return (self.teacher if self.predict_with_teacher else self).stock().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights of nnU-Net's network, to start from: into the student, and into the teacher where there is one.

        What only training needs stays as it is.
        """
        loaded = self.stock().load_state_dict(state_dict, *args, **kwargs)
        if self.has_teacher:
            self.teacher.copy_from(self)
        return loaded

    def training_state(self) -> dict[str, Tensor]:
        """All that a training needs to continue and ``state_dict`` does not hold."""
        everything = dict([*self.named_parameters(), *self.named_buffers()])
        prefix = "training_only.teacher." if self.predict_with_teacher else ""
        in_state_dict = (f"{prefix}encoder.", f"{prefix}decoder.")
        state = {name: tensor.detach() for name, tensor in everything.items() if not name.startswith(in_state_dict)}
        if self.has_teacher:
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
        if self.has_teacher:
            self.teacher.updates = int(state[_UPDATES])


def training_network_of(made: Any) -> TrainingNetwork:
    """What ``build_training_network()`` has returned.

    Raises:
        MethodError: it is no training network, as where a ``return`` was forgotten, or has a teacher that is none.
    """
    network: TrainingNetwork = returned("build_training_network", made, TrainingNetwork, "Return a TrainingNetwork.")
    if network.has_teacher and not isinstance(network.training_only["teacher"], Teacher):
        raise MethodError(
            "training_only['teacher'] is the package's own teacher. Make it with TrainingNetwork(network, "
            "teacher=True), or give your module another name."
        )
    return network


def _check_apart(
    encoder: nn.Module, decoder: nn.Module, decoders: Mapping[str, nn.Module], networks: Mapping[str, nn.Module]
) -> None:
    """Whether each decoder and network has weights that none before it has, nnU-Net's own being the first."""
    shared = set(encoder.parameters())
    taken = shared | set(decoder.parameters())
    for what, made, others in (
        ("decoder", "another_decoder(network.decoder)", decoders),
        ("network", "another_network(network)", networks),
    ):
        for name, other in others.items():
            # nnU-Net's decoders hold their encoder.
            own = set(other.parameters()) - shared
            if own <= taken:
                raise MethodError(f"The {what} {name!r} has no weights of its own. Make it with {made}.")
            taken |= own


def _absent(stream: str, what: str, made: str) -> MethodError:
    return MethodError(
        f"The stream {stream!r} asks for {what}, which build_training_network() has not made. Make it there: {made}."
    )


@contextmanager
def predicted_by_the_other(network: TrainingNetwork) -> Iterator[str]:
    """Within, of student and teacher the one predicts that otherwise does not; gives its name."""
    before = network.predict_with_teacher
    network.predict_with_teacher = not before
    try:
        yield "student" if before else "teacher"
    finally:
        network.predict_with_teacher = before


def _run(
    branch: Branch, streams: Mapping[str, Stream], images: Mapping[str, Tensor], masks: Masks
) -> dict[str, StreamOutput]:
    """All streams of one network: those with gradient stacked, one decoder after the other; the others one by one."""
    outputs: dict[str, StreamOutput] = {}
    learning = {name: stream for name, stream in streams.items() if stream.gradient}
    skips = branch.encode_stacked({stream.image: images[stream.image] for stream in learning.values()})
    for decoder in dict.fromkeys(stream.decoder for stream in learning.values()):
        group = {name: stream for name, stream in learning.items() if stream.decoder == decoder}
        outputs |= branch.decode(group, images, skips, masks)
    with torch.no_grad():
        # An image that nothing is learned from keeps no activations.
        others = {stream.image: images[stream.image] for stream in streams.values() if stream.image not in skips}
        skips = {name: [level.detach() for level in levels] for name, levels in skips.items()}
        skips |= branch.encode_stacked(others)
        for name, stream in streams.items():
            if not stream.gradient:
                outputs |= branch.decode({name: stream}, images, {stream.image: skips[stream.image]}, masks)
    return outputs
