"""InfoNCE between two lists of features of which equal positions belong together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(queries: Tensor, keys: Tensor, *, temperature: float, first: int = 0) -> Tensor:
    """Mean over positions i of -log( exp(q_i·k_i/τ) / Σ_j exp(q_i·k_j/τ) ), j over all positions of the same list.

    Source: van den Oord, Li, Vinyals, Representation learning with contrastive predictive coding, arXiv 1807.03748,
    equation 4.

    Args:
        queries: (..., P, D), of unit length.
        keys: (..., P', D), P' >= P: like ``queries``, or the keys of all ranks where several processes train.
        temperature: τ.
        first: position of the first query's own key.

    Returns:
        A scalar, float32; log P' where all similarities are equal.

    >>> info_nce(torch.ones(1, 4, 2), torch.ones(1, 4, 2), temperature=0.5)  # nothing tells the four apart: log 4
    tensor(1.3863)
    """
    # Float32: under autocast the product would be rounded to half precision.
    with torch.autocast(queries.device.type, enabled=False):
        similarities = queries.float() @ keys.float().transpose(-1, -2) / temperature
    rows = similarities.flatten(0, -2)
    own = torch.arange(similarities.shape[-2], device=rows.device) + first
    own = own.expand(similarities.shape[:-1]).flatten()
    return functional.cross_entropy(rows, own)
