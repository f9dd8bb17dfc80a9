"""A convolution of kernel size 1 as a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_ssl.networks.pointwise import pointwise


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize(("layer", "spatial"), [(nn.Conv2d, (6, 5)), (nn.Conv3d, (4, 3, 5))])
def test_values_and_gradients_are_those_of_the_convolution(layer, spatial, classes) -> None:
    torch.manual_seed(0)
    convolution = layer(7, classes, 1).double()
    features = torch.randn(3, 7, *spatial, dtype=torch.double, requires_grad=True)
    inputs = (features, convolution.weight, convolution.bias)
    expected, found = convolution(features), pointwise(convolution, features)
    assert found.shape == expected.shape and "Baddbmm" in type(found.grad_fn.next_functions[0][0]).__name__
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 2, 3, padding=1),
        nn.Conv2d(4, 2, 1, stride=2),
        nn.Conv2d(4, 2, 1, padding=1),
        nn.Conv2d(4, 2, 1, groups=2),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.Tanh()),
        nn.ConvTranspose2d(4, 2, 1, stride=2),
    ],
)
def test_other_layers_run_as_they_are(layer) -> None:
    features = torch.randn(2, 4, 6, 5)
    assert torch.equal(pointwise(layer, features), layer(features))
