"""The largest connected component of each class in a predicted label."""

from __future__ import annotations

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# As an operator of PyTorch it runs on every device, and has a shape where tensors have no content.
_LIBRARY = torch.library.Library("nnunet_ssl", "DEF")
_LIBRARY.define("largest_components(Tensor label) -> Tensor")


def largest_components(label: Tensor) -> Tensor:
    """Keep each class's largest connected component in each patch; all else becomes background.

    Neighbors touch at a face, an edge or a corner. Components are found on the host, which takes 10 to 20 ms for a
    million voxels: on a GPU the label goes there and back. docs/explanation/bcp.md has the command that measures it.

    Args:
        label: classes (B, 1, *spatial), integer, 0 is background; or regions (B, R, *spatial), bool, each for itself.

    Returns:
        Like ``label``, without gradient.

    >>> largest_components(torch.tensor([[[[1, 0, 2, 2, 0, 1, 1]]]]))
    tensor([[[[0, 0, 2, 2, 0, 1, 1]]]])
    """
    return torch.ops.nnunet_ssl.largest_components(label.detach())


def _on_the_host(label: Tensor) -> Tensor:
    # No dataset has 32,768 classes, and a quarter of the bytes leaves a GPU and comes back.
    patches = label.to(torch.int16).cpu().numpy().reshape(-1, *label.shape[2:])
    kept = np.stack([_largest(patch) for patch in patches]).reshape(tuple(label.shape))
    return torch.from_numpy(kept).to(label.device).to(label.dtype)


def _largest(label: NDArray[np.int16]) -> NDArray[np.int16]:
    """Of one patch (*spatial)."""
    components, count = cc3d.connected_components(label, connectivity=8 if label.ndim == 2 else 26, return_N=True)
    # Most of a patch is background: the foreground's voxels alone take a third of the time.
    foreground = np.flatnonzero(label)
    classes, component = label.ravel()[foreground], components.ravel()[foreground]
    voxels = np.bincount(component, minlength=count + 1)
    class_of = np.zeros(count + 1, dtype=label.dtype)
    class_of[component] = classes
    keep = np.zeros(count + 1, dtype=bool)
    for value in np.unique(class_of[1:]):
        of_class = np.flatnonzero(class_of == value)
        keep[of_class[np.argmax(voxels[of_class])]] = True
    inside = keep[component]
    kept = np.zeros(label.size, dtype=label.dtype)
    kept[foreground[inside]] = classes[inside]
    return kept.reshape(label.shape)


def _without_content(label: Tensor) -> Tensor:
    return torch.empty_like(label)


_LIBRARY.impl("largest_components", _on_the_host, "CompositeExplicitAutograd")
_LIBRARY.impl("largest_components", _without_content, "Meta")
