"""Schedules of the unsupervised weight."""

from __future__ import annotations

import math


def gaussian_ramp_up(progress: float, *, length: float, start: float = 0.0) -> float:
    """Weight that rises from exp(-5) to 1: exp(-5 (1 - t)²), t = clip((progress - start) / length, 0, 1).

    Source: Laine and Aila, Temporal Ensembling, ICLR 2017, section 2.1. The papers of the methods give the length in
    iterations of trainings that are far shorter than nnU-Net's; here it is a fraction of the planned training.

    Args:
        progress: share of the planned training that is done, in [0, 1].
        length: share of the planned training over which it rises; 0 means 1 from ``start`` on.
        start: share of the planned training at which it begins to rise; 0 before, where this is above 0.

    >>> [round(gaussian_ramp_up(progress, length=0.4), 4) for progress in (0.0, 0.2, 0.4, 1.0)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    if start > 0 and progress < start:
        return 0.0
    if length == 0:
        return 1.0
    t = min(max((progress - start) / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - t) ** 2)
