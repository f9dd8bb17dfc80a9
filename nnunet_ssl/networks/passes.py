"""The outputs of a step's streams, and their gradients: all streams stacked, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nnunet_ssl.compiled import compiled
from nnunet_ssl.errors import MethodError
from nnunet_ssl.networks.streams import Masks, Stream, StreamOutput
from nnunet_ssl.networks.training_network import TrainingNetwork

_Encoding: TypeAlias = tuple[str | None, str]
"""A pass of an encoder: the network's name and the image's."""


class Outputs(Mapping[str, StreamOutput]):
    """What the streams of one step return, by name.

    A method asks for outputs and makes a loss of them; the trainer hands each loss to :meth:`backward` as soon as the
    method has it, and calls :meth:`finish` after the last one.

    >>> from dynamic_network_architectures.architectures.unet import PlainConvUNet
    >>> unet = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, 2, 1)
    >>> streams, images = {"x": Stream("x")}, {"x": torch.zeros(1, 1, 8, 8)}
    >>> outputs: Outputs = SplitOutputs(TrainingNetwork(unet), images, streams, masks={})
    >>> outputs.peek("x").logits.requires_grad, outputs["x"].logits.requires_grad
    (False, True)
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams
        # Those that had their backward pass, in memory mode split; in stacked a method has to do without them too.
        self._spent: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, name: object) -> bool:
        # Without running the stream.
        return name in self._streams

    def peek(self, name: str) -> StreamOutput:
        """What a stream will return, without gradient, before it is asked for.

        With little memory this is a pass of its own: two streams that learn from each other then never hold their
        graphs at once.
        """
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Take in a loss of outputs that no earlier loss has used."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the gradients of all parameters."""
        raise NotImplementedError

    def _stream(self, name: str) -> Stream:
        if name not in self:
            raise MethodError(
                f"loss_terms() asks for the stream {name!r}, which streams() does not return; it returns "
                f"{', '.join(map(repr, self)) or 'none'}."
            )
        return self._streams[name]

    def _unspent(self, name: str) -> Stream:
        stream = self._stream(name)
        if name in self._spent:
            raise MethodError(
                f"loss_terms() asks for the stream {name!r} again, after a part of the loss was yielded. If that part "
                "used it, its graph is gone in memory mode split: yield all that needs its gradient in one part, or "
                "keep a detached value. If not, keep the output in a variable, or ask for it after that yield."
            )
        return stream


class StackedOutputs(Outputs):
    """All streams in one pass: the fastest on a GPU.

    Args:
        network: the training network, or a compiled one.
        images: by name, (N, C, *spatial).
        streams: by name.
        masks: of :func:`~nnunet_ssl.networks.streams.draw_dropout_masks`.
    """

    def __init__(
        self, network: nn.Module, images: Mapping[str, Tensor], streams: Mapping[str, Stream], masks: Masks
    ) -> None:
        super().__init__(streams)
        # The dropout is in the masks. A compiled network would have a graph for each probability, which may change.
        drawn = {name: replace(stream, dropout=0.0) for name, stream in streams.items()}
        self._outputs = network(images, drawn, masks)
        self._losses: list[Tensor] = []
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> StreamOutput:
        if self._unspent(name).gradient:
            self._asked.add(name)
        return self._outputs[name]

    def peek(self, name: str) -> StreamOutput:
        """The output, which is there already."""
        self._stream(name)
        return self._outputs[name].detach()

    def backward(self, loss: Tensor) -> None:
        """Keep the loss for the one backward pass."""
        self._losses.append(loss)
        self._spent |= self._asked

    def finish(self) -> None:
        """One backward pass of the sum of the losses."""
        torch.stack(self._losses).sum().backward()


class SplitOutputs(Outputs):
    """One stream at a time, when it is asked for: the least memory, and the fastest on a CPU.

    Each image is encoded once. Its streams decode detached features, whose gradients gather until the last stream of
    the image had its backward pass; then the encoder has its own, once. At any time there are the graphs of one
    decoder pass and of one encoder pass, and no pass is done twice but for those that a method peeks at.

    Args:
        network: the training network itself, since encoder and decoder are called apart.
        images: by name, (N, C, *spatial).
        streams: by name.
        masks: of :func:`~nnunet_ssl.networks.streams.draw_dropout_masks`.
    """

    def __init__(
        self,
        network: TrainingNetwork,
        images: Mapping[str, Tensor],
        streams: Mapping[str, Stream],
        masks: Masks,
        *,
        compile_passes: bool = False,
    ) -> None:
        super().__init__(streams)
        self._network = network
        self._pass = compiled if compile_passes else _as_it_is
        self._images = images
        self._masks = masks
        self._outputs: dict[str, StreamOutput] = {}
        # The streams that the present backward pass has reached.
        self._reached: set[str] = set()
        self._features: dict[_Encoding, tuple[list[Tensor], list[Tensor]]] = {}
        self._pending = {
            _encoding_of(stream): {
                name
                for name, other in streams.items()
                if other.gradient and _encoding_of(other) == _encoding_of(stream)
            }
            for stream in streams.values()
        }

    def __getitem__(self, name: str) -> StreamOutput:
        stream = self._unspent(name)
        if name not in self._outputs:
            self._outputs[name] = self._run(name, gradient=stream.gradient)
        return self._outputs[name]

    def peek(self, name: str) -> StreamOutput:
        """The output of a pass without gradient, or of the stream's own if it has already run."""
        if name in self._outputs:
            return self._outputs[name].detach()
        return self._run(name, gradient=False)

    def _run(self, name: str, *, gradient: bool) -> StreamOutput:
        stream = self._stream(name)
        branch = self._network.branch_of(stream)
        image = self._images[stream.image]
        skips = self._features_without_gradient(stream) if stream.teacher else self._features_of(stream)
        decode = self._pass(type(branch).decode_alone)
        with torch.set_grad_enabled(gradient):
            output = decode(branch, stream.kind, image, skips, self._masks.get(name))
            if output.bottleneck is not None and output.bottleneck.is_leaf:
                # Without dropout it is the features that all streams of the image decode: this stream gets its own.
                output = output._replace(bottleneck=output.bottleneck.view_as(output.bottleneck))
        pending = self._pending[_encoding_of(stream)]
        for tensor in _tensors_of(output) if gradient else ():
            tensor.register_hook(partial(_note, self._reached, pending, name))
        if not gradient:
            # Autocast keeps the weights it casts. Older PyTorch keeps them without gradient, for the next stream too.
            torch.clear_autocast_cache()
        return output

    def _features_of(self, stream: Stream) -> list[Tensor]:
        encoding = _encoding_of(stream)
        if encoding not in self._features:
            with torch.set_grad_enabled(bool(self._pending[encoding])):
                skips = self._encode(stream)
            self._features[encoding] = skips, [skip.detach().requires_grad_() for skip in skips]
        return self._features[encoding][1]

    @torch.no_grad()
    def _features_without_gradient(self, stream: Stream) -> list[Tensor]:
        return self._encode(stream)

    def _encode(self, stream: Stream) -> list[Tensor]:
        branch = self._network.branch_of(stream)
        return self._pass(type(branch).encode)(branch, self._images[stream.image])

    def backward(self, loss: Tensor) -> None:
        """Backward through the decoders of the streams in the loss, and through each encoder that is then complete.

        A stream that was asked for, but is not in the loss, may be in a later one.
        """
        self._reached.clear()
        try:
            loss.backward()
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise _used_before() from None
        asked = {name for name in self._outputs if self._streams[name].gradient}
        self._spent |= asked
        for name in asked:
            del self._outputs[name]
        for encoding, pending in self._pending.items():
            if pending & self._reached:
                pending -= self._reached
                if not pending:
                    self._encoder_backward(encoding)

    def _encoder_backward(self, encoding: _Encoding) -> None:
        skips, detached = self._features.pop(encoding)
        used = [(skip, leaf.grad) for skip, leaf in zip(skips, detached, strict=True) if leaf.grad is not None]
        if used:
            tensors, gradients = zip(*used, strict=True)
            torch.autograd.backward(tensors, gradients)

    def finish(self) -> None:
        """Backward through the encoders of images with a stream that no loss was taken of."""
        for encoding in list(self._features):
            self._encoder_backward(encoding)
        self._outputs.clear()


def _encoding_of(stream: Stream) -> _Encoding:
    return stream.network, stream.image


def _tensors_of(output: StreamOutput) -> list[Tensor]:
    """Those that carry a gradient."""
    logits = output.logits if isinstance(output.logits, list) else [output.logits]
    others = [output.bottleneck, *(output.head or {}).values()]
    return [tensor for tensor in [*logits, *others] if tensor is not None and tensor.grad_fn is not None]


def _note(reached: set[str], pending: set[str], name: str, gradient: Tensor) -> None:
    # The bottleneck has no graph of its own that could be gone, but its encoder had its backward pass.
    if name not in pending:
        raise _used_before()
    reached.add(name)


def _used_before() -> MethodError:
    return MethodError(
        "A part of the loss uses, with gradient, the output of a stream that an earlier part has used. In memory mode "
        "split its graph is gone then: yield both in one part, or detach the earlier output."
    )


def _as_it_is(run: Callable[..., Any]) -> Callable[..., Any]:
    return run
