"""Paired comparison of two models on the same problems. With a few hundred problems, comparing two scores says little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_semalign.errors import InputError

RESAMPLES = 10_000
CONFIDENCE = 0.95


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two models over the same problems, with its bootstrap interval.

    Problems are drawn with replacement ``RESAMPLES`` times from a fixed seed, each with the outcomes of both models (Koehn,
    2004). The interval covers the middle ``CONFIDENCE`` of the differences. The models differ if it excludes zero.

    Args:
        ours: outcome of each problem, 0 or 1, or its mean over seeds.
        theirs: outcomes of the other model on the same problems in the same order.

    Returns:
        The difference, and the lower and upper end of the interval.

    Raises:
        ValueError: the numbers of problems differ, or are zero.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise InputError(f"Got outcomes of {len(ours)} and {len(theirs)} problems: expected the same problems, at least one.")
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(differences[drawn].mean(1), [tail, 100 - tail])
    return float(differences.mean()), float(low), float(high)
