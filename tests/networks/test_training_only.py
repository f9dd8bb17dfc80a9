"""What only training needs: more decoders, a head, a teacher; hidden from nnU-Net and kept for a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_network import step_images, unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ssl.networks.decoders import interpolating_decoder
from nnunet_ssl.networks.heads import BoundaryHead, coarse_grid
from nnunet_ssl.networks.passes import SplitOutputs, StackedOutputs
from nnunet_ssl.networks.streams import Stream
from nnunet_ssl.networks.training_network import TrainingNetwork

EVERYWHERE = ("skips", "bottleneck", "features")
STREAMS = {
    "x": Stream("x", deep_supervision=True, head=True, features=True),
    "x_b": Stream("x", decoder="b", deep_supervision=True, features=True),
    "u_b": Stream("u", decoder="b", dropout=0.3, features=True, bottleneck=True),
    "u": Stream("u", dropout=0.5, dropout_on=EVERYWHERE, head=True, bottleneck=True),
    "t": Stream("s", dropout=0.5, dropout_on=EVERYWHERE, head=True, bottleneck=True, gradient=False, teacher=True),
}


class Head(nn.Module):
    """Depends on the image, so that a wrong image would be noticed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = (nn.Conv2d if dim == 2 else nn.Conv3d)(4, 2, 1)

    def forward(self, image, features):
        return {"map": self.layer(features) * (1 + image), "mean": features.flatten(2).mean(2)}


def network_of(dim: int, *, residual: bool = False, **options) -> TrainingNetwork:
    stock = unet(dim, residual)
    other = interpolating_decoder(stock.decoder, upsampling="linear")
    network = TrainingNetwork(stock, decoders={"b": other}, head=Head(dim), teacher=True, **options)
    with torch.no_grad():
        for parameter in network.teacher.parameters():
            parameter.mul_(0.8)
    return network


def losses(outputs):
    """Each pair of streams learns from the other."""
    teacher = outputs["t"]
    peeked = outputs.peek("x_b").logits[0]
    x = outputs["x"]
    yield sum(level.square().mean() for level in x.logits) + (x.logits[0] - peeked).abs().mean() + x.head["map"].mean()
    x = x.detach()
    x_b = outputs["x_b"]
    yield (
        sum(level.abs().mean() for level in x_b.logits)
        + (x_b.logits[0].mean(1) * (x_b.features - x.features).mean(1)).mean()
    )
    u_b = outputs["u_b"]
    yield u_b.logits.square().mean() + u_b.bottleneck.square().mean()
    u = outputs["u"]
    yield (u.head["map"] - teacher.head["map"]).square().mean() + (u.bottleneck * teacher.bottleneck).mean() * 3


def run(network, outputs_class, images, masks) -> dict[str, torch.Tensor]:
    network.zero_grad()
    outputs = outputs_class(network, images, STREAMS, masks)
    for loss in losses(outputs):
        outputs.backward(loss)
    outputs.finish()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_split_gives_the_gradients_of_stacked(dim, residual):
    network = network_of(dim, residual=residual)
    images = step_images(dim)
    masks = network.draw_dropout_masks(STREAMS, images)
    stacked, split = (run(network, kind, images, masks) for kind in (StackedOutputs, SplitOutputs))
    assert set(stacked) == set(split) == {n for n, p in network.named_parameters() if p.requires_grad}
    assert not any("teacher" in name for name in stacked)
    scale = max(g.abs().max() for g in stacked.values()).item()
    for name, gradient in stacked.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("outputs_class", [StackedOutputs, SplitOutputs])
def test_each_stream_returns_what_it_asks_for_of_the_right_network(outputs_class):
    network, images = network_of(2), step_images(2)
    masks = network.draw_dropout_masks(STREAMS, images)
    outputs = outputs_class(network, images, STREAMS, masks)
    for name, stream in STREAMS.items():
        branch = network.teacher if stream.teacher else network
        decoder = network.training_only["decoder_b"] if stream.decoder else branch.decoder
        image = images[stream.image]
        # By hand, from nnU-Net's parts.
        skips = branch.encoder(image)
        if name in masks:
            skips = [s if m is None else s * m for s, m in zip(skips, masks[name].levels, strict=True)]
        x, levels = skips[-1], []
        for level in range(2):
            x = decoder.stages[level](torch.cat((decoder.transpconvs[level](x), skips[-(level + 2)]), 1))
            if level == 1 and name in masks and masks[name].features is not None:
                x = x * masks[name].features
            levels.insert(0, decoder.seg_layers[level](x))
        output = outputs[name]
        if stream.deep_supervision:
            assert len(output.logits) == 2
            for ours, theirs in zip(output.logits, levels, strict=True):
                torch.testing.assert_close(ours, theirs)
        else:
            torch.testing.assert_close(output.logits, levels[0])
        assert (output.features is not None) == stream.features
        if stream.features:
            torch.testing.assert_close(output.features, x)
            assert not output.features.requires_grad
        assert (output.bottleneck is not None) == stream.bottleneck
        if stream.bottleneck:
            torch.testing.assert_close(output.bottleneck, skips[-1])
        assert (output.head is not None) == stream.head
        if stream.head:
            for key, tensor in branch.training_only["head"](image, x).items():
                torch.testing.assert_close(output.head[key], tensor)
        assert torch.is_tensor(output.logits) is not stream.deep_supervision
        assert (output.logits if torch.is_tensor(output.logits) else output.logits[0]).requires_grad == stream.gradient


def test_peeking_is_a_pass_without_gradient_and_leaves_the_streams_turn():
    network, images = network_of(2), step_images(2)
    outputs = SplitOutputs(network, images, STREAMS, network.draw_dropout_masks(STREAMS, images))
    peeked = outputs.peek("x_b")
    assert not peeked.logits[0].requires_grad and not peeked.features.requires_grad
    own = outputs["x_b"]
    assert own.logits[0].requires_grad
    torch.testing.assert_close(own.logits[0], peeked.logits[0])
    assert outputs.peek("x_b").logits[0].data_ptr() == own.logits[0].data_ptr()  # no second pass


def test_a_teachers_stream_with_a_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient=False"):
        Stream("u", teacher=True)


@pytest.mark.parametrize("upsampling", ["linear", "nearest"])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_interpolating_decoder_takes_every_stride_and_its_own_weights(dim, upsampling):
    stock = unet(dim)  # in 3D the last stride is (1, 2, 2)
    before = copy.deepcopy(stock.state_dict())
    other = interpolating_decoder(stock.decoder, upsampling=upsampling)
    image = step_images(dim)["x"]
    skips = stock.encoder(image)
    logits = other(skips)
    assert logits.shape == stock.decoder(skips)[0].shape
    mode = {"nearest": "nearest", "linear": {2: "bilinear", 3: "trilinear"}[dim]}[upsampling]
    for sequence, transposed in zip(other.transpconvs, stock.decoder.transpconvs, strict=True):
        upsample, convolution = sequence
        assert upsample.mode == mode and tuple(upsample.scale_factor) == tuple(map(float, transposed.stride))
        assert not upsample.align_corners
        assert convolution.kernel_size == (3,) * dim
        assert (convolution.in_channels, convolution.out_channels) == (transposed.in_channels, transposed.out_channels)
    # nnU-Net's own is as it was, none of its weights is shared or copied, and the encoder is not part of the other.
    assert stock.decoder.encoder is stock.encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    shared = {id(p) for p in stock.parameters()} & {id(p) for p in other.parameters()}
    assert not shared and len(list(other.parameters())) == len(list(stock.decoder.parameters())) - len(
        list(stock.encoder.parameters())
    )
    for stage, other_stage in zip(stock.decoder.stages, other.stages, strict=True):
        assert not torch.equal(stage.convs[0].conv.weight, other_stage.convs[0].conv.weight)


@pytest.mark.parametrize("predict_with_teacher", [False, True])
def test_the_state_dict_is_stock_and_both_states_restore_everything(predict_with_teacher):
    network = network_of(2)
    network.predict_with_teacher = predict_with_teacher
    network.update_teacher(0.5)
    network.update_teacher(0.5)
    weights, rest = network.state_dict(), network.training_state()
    assert list(weights) == list(unet(2).state_dict())
    chosen = network.teacher if predict_with_teacher else network
    assert torch.equal(
        weights["encoder.stages.0.0.convs.0.conv.weight"], chosen.encoder.stages[0][0].convs[0].conv.weight
    )
    weights, rest = copy.deepcopy(weights), copy.deepcopy(rest)
    expected = {n: t.clone() for n, t in [*network.named_parameters(), *network.named_buffers()]}

    other = network_of(2)
    other.predict_with_teacher = predict_with_teacher
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(weights)
    other.load_training_state(rest)
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        assert torch.equal(tensor, expected[name]), name
    assert other.teacher.updates == 2 and torch.equal(rest["training_only.teacher.updates"], torch.tensor(2))


def test_a_training_state_of_another_network_is_refused_by_name():
    network = network_of(2)
    state = network.training_state()
    with pytest.raises(KeyError, match="stranger"):
        network.load_training_state({**state, "stranger": torch.zeros(1)})
    wrong = {**state, "training_only.head.layer.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"head\.layer\.bias has the shape \(7,\), not \(2,\)"):
        network.load_training_state(wrong)


def test_the_teacher_moves_and_takes_no_gradient():
    network = network_of(2)
    student, before = dict(network.named_parameters()), {n: p.clone() for n, p in network.teacher.named_parameters()}
    network.update_teacher(0.9)  # copies
    assert all(torch.equal(p, student[n]) for n, p in network.teacher.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in network.teacher.named_parameters())
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(1.0)
    mine = network.teacher.encoder.stages[0][0].convs[0].conv.weight.clone()
    network.update_teacher(0.9)  # 1 - 1/2
    torch.testing.assert_close(network.teacher.encoder.stages[0][0].convs[0].conv.weight, mine + 0.5)
    assert not any(p.requires_grad for p in network.teacher.parameters())


def test_the_teacher_moves_in_one_operation():
    """One for each parameter would be hundreds of small kernels on a GPU."""
    operations = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func)
            return func(*args, **(kwargs or {}))

    network = network_of(2)
    with Operations():
        network.update_teacher(0.9)
    assert operations == [torch.ops.aten._foreach_lerp_.Scalar]


@given(st.lists(st.integers(1, 200), min_size=2, max_size=3), st.integers(1, 600))
def test_the_coarse_grid_is_the_finest_that_fits(patch, positions):
    grid = coarse_grid(patch, positions=positions)

    def size(g):
        return int(torch.tensor(g).prod())

    assert size(grid) <= positions and all(1 <= g <= p for g, p in zip(grid, patch, strict=True))
    finer = [g for s in range(1, 201) if size(g := tuple(max(1, p // s) for p in patch)) <= positions]
    assert size(grid) == max(map(size, finer))


def test_a_grid_without_positions_is_refused():
    with pytest.raises(ValueError, match="positions is 0"):
        coarse_grid((8, 8), positions=0)


@pytest.mark.parametrize("spatial", [(16, 24), (8, 12, 16)])
def test_the_boundary_head(spatial):
    head = BoundaryHead(image_channels=2, features=5, maps=3, projection=10, grid=(2, 3, 4)[: len(spatial)])
    image, features = torch.randn(2, 2, *spatial), torch.randn(2, 5, *spatial)
    found = head(image, features)
    assert found["distance"].shape == (2, 3, *spatial) and found["distance"].abs().max() < 1
    positions = 6 if len(spatial) == 2 else 24
    assert found["projection"].shape == (2, positions, 10)
    torch.testing.assert_close(found["projection"].norm(dim=-1), torch.ones(2, positions))
    changed = head(image + torch.randn_like(image), features)
    assert not torch.allclose(changed["projection"], found["projection"]) and torch.equal(
        changed["distance"], found["distance"]
    )
