"""Linear interpolation by slices against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from test_training_network import unet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ssl.networks.decoders import interpolating_decoder
from nnunet_ssl.networks.linear_upsample import LinearUpsample, linear_by_slices

MODES = {2: "bilinear", 3: "trilinear"}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spatial", "factors"),
    [
        ((4, 6), (2.0, 2.0)),
        ((5, 3), (2.0, 2.0)),
        ((1, 7), (2.0, 1.0)),
        ((4, 6, 8), (2.0, 2.0, 2.0)),
        ((3, 5, 7), (2.0, 2.0, 2.0)),
        ((5, 4, 3), (1.0, 2.0, 2.0)),
        ((1, 1, 1), (2.0, 2.0, 2.0)),
    ],
)
def test_slices_give_the_values_and_gradients_of_interpolation(spatial, factors):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, *spatial, generator=generator, requires_grad=True)
    expected = interpolate(features, scale_factor=factors, mode=MODES[len(spatial)])
    weights = torch.randn(expected.shape, generator=generator)
    (gradient,) = torch.autograd.grad(expected, features, weights)
    with Operations() as seen:
        found = linear_by_slices(features, factors)
        (by_slices,) = torch.autograd.grad(found, features, weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_slices, gradient, atol=1e-6, rtol=1e-6)
    # What a compiler makes atomics of.
    assert seen.names and not any(word in name for name in seen.names for word in ("upsample", "index", "scatter"))


@pytest.mark.parametrize(
    ("device", "factors", "interpolates"),
    [("cpu", (2.0, 2.0), True), ("cuda", (2.0, 2.0), False), ("cuda", (4.0, 2.0), True)],
)
def test_a_cpu_and_other_factors_keep_pytorchs_own(device, factors, interpolates):
    with FakeTensorMode(), Operations() as seen:
        found = LinearUpsample(scale_factor=factors, mode="bilinear")(torch.empty(2, 3, 4, 6, device=device))
    assert found.shape == (2, 3, 4 * factors[0], 6 * factors[1])
    assert any("upsample" in name for name in seen.names) == interpolates


@pytest.mark.parametrize("dim", [2, 3])
def test_the_decoder_that_interpolates_linearly_goes_by_slices_on_a_gpu(dim):
    stock = unet(dim)
    linear, nearest = (interpolating_decoder(stock.decoder, upsampling=way) for way in ("linear", "nearest"))
    assert list(linear.state_dict()) == list(nearest.state_dict())
    assert all(isinstance(sequence[0], LinearUpsample) for sequence in linear.transpconvs)
    assert not any(isinstance(sequence[0], LinearUpsample) for sequence in nearest.transpconvs)
