"""The training network is nnU-Net's, and its two ways to run a step give the same gradients."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_ssl.errors import MethodError, UserError
from nnunet_ssl.networks.passes import SplitOutputs, StackedOutputs
from nnunet_ssl.networks.streams import Stream, draw_dropout_masks, drop_channels
from nnunet_ssl.networks.training_network import TrainingNetwork

STREAMS = {
    "x": Stream("x", deep_supervision=True),
    "u": Stream("u", gradient=False),
    "u_weak": Stream("u", dropout=0.25),
    "u_strong": Stream("u", dropout=0.75),
    "s": Stream("s"),
}


def unet(dim: int, residual: bool = False, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
    instance_norm = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim]
    blocks = {"n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 1, 1]}
    return (ResidualEncoderUNet if residual else PlainConvUNet)(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 6, 8],
        conv_op=conv,
        kernel_sizes=3,
        strides=[1, 2, (1, 2, 2)[:dim] if dim == 3 else 2],
        num_classes=3,
        n_conv_per_stage_decoder=[1, 1],
        conv_bias=True,
        norm_op=instance_norm if norm else None,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **blocks,
    )


def step_images(dim: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spatial = (8, 12, 16)[:dim]
    sizes = {"x": 2, "u": 3, "s": 3}
    return {name: torch.randn(n, 1, *spatial, generator=generator) for name, n in sizes.items()}


def parts(outputs):
    """A loss of every kind of output, in parts, as a method yields them."""
    yield sum(level.square().mean() for level in outputs["x"].logits)
    teacher = outputs["u"].logits.detach()
    yield (outputs["u_weak"].logits - teacher).square().mean()
    yield (outputs["u_strong"].logits - teacher).abs().mean() + outputs["u_strong"].logits.mean()
    yield (outputs["s"].logits.softmax(1)[:, 1] - teacher[:, 1]).square().mean()


def gradients(network, outputs) -> dict[str, torch.Tensor]:
    network.zero_grad()
    for part in parts(outputs):
        outputs.backward(part)
    outputs.finish()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_split_gives_the_gradients_of_stacked(dim, residual):
    network = TrainingNetwork(unet(dim, residual))
    images = step_images(dim)
    masks = network.draw_dropout_masks(STREAMS, images)
    stacked = gradients(network, StackedOutputs(network, images, STREAMS, masks))
    split = gradients(network, SplitOutputs(network, images, STREAMS, masks))
    # Biases before a normalisation have no gradient but rounding noise, which is measured against the largest.
    scale = max(g.abs().max() for g in stacked.values())
    assert set(split) == set(stacked)
    for name, gradient in stacked.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


def test_every_pass_is_made_once():
    network = TrainingNetwork(unet(2))
    calls = {"encoder": 0, "decoder": 0}
    network.encoder.register_forward_hook(lambda *_: calls.__setitem__("encoder", calls["encoder"] + 1))
    network.decoder.stages[0].register_forward_hook(lambda *_: calls.__setitem__("decoder", calls["decoder"] + 1))
    images = step_images(2)
    gradients(
        network,
        SplitOutputs(network, images, STREAMS, network.draw_dropout_masks(STREAMS, images)),
    )
    assert calls == {"encoder": 3, "decoder": 5}
    calls.update(encoder=0, decoder=0)
    gradients(
        network,
        StackedOutputs(network, images, STREAMS, network.draw_dropout_masks(STREAMS, images)),
    )
    assert calls == {"encoder": 1, "decoder": 2}


@pytest.mark.parametrize("outputs_class", [StackedOutputs, SplitOutputs])
def test_outputs_without_dropout_are_the_stock_networks(outputs_class):
    stock = unet(3)
    network = TrainingNetwork(stock)
    images = step_images(3)
    outputs = outputs_class(network, images, STREAMS, network.draw_dropout_masks(STREAMS, images))
    for ours, theirs in zip(outputs["x"].logits, stock(images["x"]), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(outputs["u"].logits, stock(images["u"])[0])
    assert not outputs["u"].logits.requires_grad


@pytest.mark.parametrize("outputs_class", [StackedOutputs, SplitOutputs])
def test_the_teacher_stream_has_no_gradient_and_the_encoder_gets_one(outputs_class):
    network = TrainingNetwork(unet(2))
    images = {"u": step_images(2)["u"]}
    streams = {"u": Stream("u", gradient=False), "student": Stream("u", dropout=0.5)}
    outputs = outputs_class(network, images, streams, network.draw_dropout_masks(streams, images))
    outputs.backward((outputs["student"].logits - outputs["u"].logits).square().mean())
    outputs.finish()
    assert all(p.grad is not None for p in network.encoder.parameters())


def test_autocast_casts_kept_by_a_pass_without_gradient_are_not_used_by_the_next():
    network = TrainingNetwork(unet(2))
    images = step_images(2)
    masks = network.draw_dropout_masks(STREAMS, images)
    outputs = SplitOutputs(network, images, STREAMS, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _ = outputs["u"]
        loss = outputs["u_weak"].logits.float().square().mean()
    network.zero_grad()
    outputs.backward(loss)
    outputs.finish()
    missing = [n for n, p in network.named_parameters() if p.grad is None and "seg_layers.0" not in n]
    assert not missing


@pytest.mark.parametrize("mode", [SplitOutputs, StackedOutputs])
def test_asking_for_an_output_after_its_backward_pass_is_an_error(mode):
    network = TrainingNetwork(unet(2))
    images = step_images(2)
    outputs = mode(network, images, STREAMS, network.draw_dropout_masks(STREAMS, images))
    outputs.backward(outputs["s"].logits.mean())
    with pytest.raises(MethodError, match="stream 's' again, after a part of the loss was yielded"):
        outputs["s"]
    assert not outputs.peek("s").logits.requires_grad


def test_an_output_that_is_asked_for_before_its_part_keeps_its_gradient():
    """As a method does that names all its outputs first."""
    images = step_images(2)
    found = []
    for mode in (StackedOutputs, SplitOutputs):
        network = TrainingNetwork(unet(2))
        outputs = mode(network, images, STREAMS, {})
        early, weak = outputs["s"].logits, outputs["u_weak"].logits
        outputs.backward(outputs["x"].full_resolution.square().mean() + outputs["u_strong"].logits.square().mean())
        outputs.backward(weak.square().mean())
        outputs.backward(early.square().mean())
        outputs.finish()
        found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    stacked, split = found
    assert set(split) == set(stacked)
    scale = max(g.abs().max() for g in stacked.values())
    for name, gradient in stacked.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


def test_state_dict_and_stock_forward_are_nnunets():
    stock = unet(3, residual=True)
    network = TrainingNetwork(stock)
    assert list(network.state_dict()) == list(stock.state_dict())
    image = step_images(3)["x"]
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), stock(image))


def test_dropout_drops_whole_channels_and_keeps_the_mean():
    network = TrainingNetwork(unet(3))
    images = {"x": torch.zeros(2000, 1, 2, 2, 2)}
    masks = draw_dropout_masks(
        network.encoder.output_channels, {"a": Stream("x", dropout=0.75), "b": Stream("x")}, images
    )
    assert set(masks) == {"a"}
    assert masks["a"].features is None
    assert [m.shape for m in masks["a"].levels] == [(2000, c, 1, 1, 1) for c in (4, 6, 8)]
    assert set(masks["a"].levels[0].unique().tolist()) == {0.0, 4.0}
    assert torch.cat([m.flatten() for m in masks["a"].levels]).mean().item() == pytest.approx(1, abs=0.05)


def test_masks_differ_between_streams_and_reach_every_level():
    network = TrainingNetwork(unet(2))
    images = {"x": torch.randn(64, 1, 8, 12)}
    streams = {"a": Stream("x", dropout=0.5), "b": Stream("x", dropout=0.5)}
    masks = network.draw_dropout_masks(streams, images)
    assert all(not torch.equal(*pair) for pair in zip(masks["a"].levels, masks["b"].levels, strict=True))
    skips = network.encoder(images["x"])
    for skip, mask, dropped in zip(skips, masks["a"].levels, drop_channels(skips, masks["a"]), strict=True):
        assert torch.equal(dropped, skip * mask) and (dropped.flatten(2).abs().sum(2) == 0).any()


def test_other_networks_are_refused_by_name():
    with pytest.raises(UserError, match=r"Sequential.*PlainConvUNet and ResidualEncoderUNet"):
        TrainingNetwork(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_compile_takes_all_streams_in_one_graph_and_never_again():
    network = TrainingNetwork(unet(3))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]
    images = step_images(3)
    before = graphs["unique_graphs"]
    for _ in range(3):
        streams = {name: Stream(**vars(stream)) for name, stream in STREAMS.items()}
        masks = network.draw_dropout_masks(streams, images)
        found = gradients(network, StackedOutputs(compiled, images, streams, masks))
        expected = gradients(network, StackedOutputs(network, images, streams, masks))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
    assert graphs["unique_graphs"] == before + 1
