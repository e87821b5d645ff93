"""Paired comparison of two models on the same problems: with some hundred problems, two scores alone decide little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_semalign.errors import InputError

RESAMPLES = 10_000
CONFIDENCE = 0.95


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The mean difference of two models over the problems that both were given, with its bootstrap interval.

    Problems are drawn with replacement, both models' outcomes of a problem together (Koehn, 2004), ``RESAMPLES`` times from one
    seed; the interval holds the middle ``CONFIDENCE`` of the differences. Two models differ where it does not hold zero.

    Args:
        ours: outcome of each problem, 0 or 1, or its mean over seeds.
        theirs: the other model's, of the same problems in the same order.

    Returns:
        Difference, lower and upper end.

    Raises:
        ValueError: two numbers of problems, or none.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise InputError(
            f"Outcomes of {len(ours)} and {len(theirs)} problems: expected those of the same problems, at least one."
        )
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(differences[drawn].mean(1), [tail, 100 - tail])
    return float(differences.mean()), float(low), float(high)
