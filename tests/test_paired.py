"""The paired bootstrap, against what can be worked out by hand."""

import math
import random

import pytest

from hf_semalign.experiments.paired import paired_difference


def test_the_same_outcomes_do_not_differ():
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0, 0.0)


def test_a_constant_lead_has_no_spread():
    assert paired_difference([1, 1, 1, 1], [0, 0, 0, 0]) == (1.0, 1.0, 1.0)


def test_the_interval_is_the_normal_one_of_the_differences():
    draw = random.Random(0)
    theirs = [draw.random() < 0.4 for _ in range(2000)]
    ours = [one or draw.random() < 0.1 for one in theirs]
    mean, low, high = paired_difference(ours, theirs)
    gained = sum(a != b for a, b in zip(ours, theirs, strict=True)) / 2000
    error = math.sqrt(gained * (1 - gained) / 2000)
    assert mean == pytest.approx(gained)
    assert (low, high) == pytest.approx((gained - 1.96 * error, gained + 1.96 * error), abs=0.1 * error)
    # Two models that solve different problems: much wider than the pairs above, with the same scores.
    shuffled = draw.sample(ours, len(ours))
    _, wide_low, wide_high = paired_difference(shuffled, theirs)
    assert wide_high - wide_low > 2 * (high - low)


def test_order_of_the_models_turns_the_sign():
    ours, theirs = [1, 0, 1, 1, 0.5], [0, 1, 0, 1, 0]
    mean, low, high = paired_difference(ours, theirs)
    assert paired_difference(theirs, ours) == pytest.approx((-mean, -high, -low), abs=0.1)


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1], [1, 0])])
def test_other_problems_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="expected the same problems"):
        paired_difference(ours, theirs)
