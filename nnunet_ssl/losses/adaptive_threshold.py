"""A threshold of confidence for each class, which follows how confident the network is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_ssl.distributed import mean_over_ranks
from nnunet_ssl.losses.probabilities import probabilities
from nnunet_ssl.losses.pseudo_labels import PseudoLabel


class AdaptiveThreshold(nn.Module):
    """FreeMatch's threshold τ_t(k) = τ_t p̃_t(k) / max p̃_t, for the class k that a voxel is predicted as.

    Source: Wang et al., FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning, ICLR 2023, arXiv
    2205.07246. There a sample is an image; here it is a voxel.

    As an entry of a training network's ``training_only`` it is kept in checkpoints.

    Args:
        channels: C classes, background included, or R regions.
        regions: whether they are regions. **[choice]** Each is a problem of two classes: its complement and itself.

    Attributes:
        confidence: τ_t, a moving average of the mean confidence; a scalar that begins at 1 / C.
        frequency: p̃_t, that of each class's mean probability, (1, C), or of each region's two classes, (R, 2); all
            begin at 1 / C.

    >>> threshold = AdaptiveThreshold(2, regions=False)
    >>> threshold.confidence.fill_(0.9), threshold.frequency.copy_(torch.tensor([[0.8, 0.4]]))
    (tensor(0.9000), tensor([[0.8000, 0.4000]]))
    >>> threshold(torch.tensor([[[0, 1]]]))
    tensor([[[0.9000, 0.4500]]])
    """

    confidence: Tensor
    frequency: Tensor

    def __init__(self, channels: int, *, regions: bool) -> None:
        super().__init__()
        self.regions = regions
        groups, classes = (channels, 2) if regions else (1, channels)
        self.register_buffer("confidence", torch.tensor(1 / classes))
        self.register_buffer("frequency", torch.full((groups, classes), 1 / classes))
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, target: Tensor) -> Tensor:
        """The least confidence of each voxel.

        Args:
            target: of a pseudo-label: classes (U, 1, *spatial), or regions (U, R, *spatial), bool.

        Returns:
            Like ``target``, float32.
        """
        table = self.confidence * self.frequency / self.frequency.amax(1, keepdim=True)
        if not self.regions:
            return table[0][target.long()]
        of_complement, of_region = table.view(-1, 2, *[1] * (target.ndim - 2)).unbind(1)
        return torch.where(target, of_region, of_complement)

    @torch.no_grad()
    def see(self, logits: Tensor, label: PseudoLabel) -> None:
        """Take the means over all voxels of the batch and all ranks, which :meth:`follow` moves towards.

        Args:
            logits: (U, C, *spatial).
            label: their pseudo-label.
        """
        mean = probabilities(logits, regions=self.regions).mean([0, *range(2, logits.ndim)])
        frequency = torch.stack((1 - mean, mean), 1) if self.regions else mean[None]
        self._seen = mean_over_ranks(label.confidence.mean()), mean_over_ranks(frequency)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """τ_t = λ τ_t-1 + (1 - λ) mean c, and p̃_t = λ p̃_t-1 + (1 - λ) mean p, by the batch that was seen last."""
        assert self._seen is not None
        confidence, frequency = self._seen
        self.confidence.lerp_(confidence, 1 - decay)
        self.frequency.lerp_(frequency, 1 - decay)
