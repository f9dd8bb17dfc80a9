"""Schedules of the unsupervised weight."""

from __future__ import annotations

import math


def gaussian_ramp_up(progress: float, *, length: float) -> float:
    """Weight that rises from exp(-5) to 1: exp(-5 (1 - t)²), t = clip(progress / length, 0, 1).

    Source: Laine and Aila, Temporal Ensembling, ICLR 2017, section 2.1. The papers of the methods give the length in
    iterations of trainings that are far shorter than nnU-Net's; here it is a fraction of the planned training.

    Args:
        progress: share of the planned training that is done, in [0, 1].
        length: share of the planned training after which the weight is 1; 0 means 1 from the first step.
    """
    if length == 0:
        return 1.0
    t = min(max(progress / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - t) ** 2)
