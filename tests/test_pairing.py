"""Layer pairing: every strategy worked by hand, ascending, and clear about what it cannot pair."""

import pytest
import torch

from hf_semalign.method.attribution import LayerScores
from hf_semalign.method.pairing import STRATEGIES, LayerPairing, pair_layers

SCORES = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.05]  # best first: 0, 2, 4, 6, 5, 3, 1, 7


@pytest.mark.parametrize(
    ("strategy", "scores", "targets", "expected"),
    [
        ("attribution", SCORES, 1, (0,)),
        ("attribution", SCORES, 3, (0, 2, 4)),
        ("attribution", SCORES, 5, (0, 2, 4, 5, 6)),
        ("attribution", SCORES, 8, tuple(range(8))),
        ("attribution", SCORES[::-1], 3, (3, 5, 7)),
        ("attribution", [-3.0, -1.0, -2.0], 2, (1, 2)),
        ("attribution", [1.0, 1.0, 1.0, 2.0], 2, (0, 3)),  # of equals the shallower
        ("banded", SCORES, 1, (0,)),
        ("banded", SCORES, 2, (0, 4)),  # 0-3, 4-7
        ("banded", SCORES, 4, (0, 2, 4, 6)),  # 0-1, 2-3, 4-5, 6-7
        ("banded", SCORES, 3, (0, 2, 6)),  # 0-1, 2-4, 5-7
        ("banded", SCORES[::-1], 3, (1, 3, 7)),
        ("proportional", 8, 4, (1, 3, 5, 7)),
        ("proportional", 8, 3, (2, 4, 7)),  # 2.67, 5.33, 8, counted from 1
        ("proportional", 6, 4, (1, 2, 4, 5)),  # 1.5, 3, 4.5, 6: halves go up
        ("proportional", 40, 32, None),
        ("proportional", 5, 5, (0, 1, 2, 3, 4)),
        ("proportional", 2, 4, (0, 0, 1, 1)),  # 0.5, 1, 1.5, 2
        ("proportional", 2, 5, (0, 0, 0, 1, 1)),  # 0.4 is raised to 1; 0.8, 1.2, 1.6, 2
        ("proportional", 1, 3, (0, 0, 0)),
        ("uniform", 9, 3, (0, 4, 8)),
        ("uniform", 8, 3, (0, 4, 7)),  # 0, 3.5, 7: halves go up
        ("uniform", 6, 4, (0, 2, 3, 5)),  # 0, 1.67, 3.33, 5
        ("uniform", 4, 4, (0, 1, 2, 3)),
        ("uniform", 4, 1, (3,)),
        ("last", 8, 3, (5, 6, 7)),
        ("last", 3, 3, (0, 1, 2)),
        ([0, 3, 3], 8, 3, (0, 3, 3)),
        ((1, 1, 1, 1), 2, 4, (1, 1, 1, 1)),
    ],
)
def test_strategies_worked_by_hand(strategy, scores, targets, expected):
    pairing = pair_layers(scores, targets, strategy)
    if expected is None:  # LLaMA 13B to 7B, from the definition
        expected = tuple(int(k * 40 / 32 + 0.5) - 1 for k in range(1, 33))
    assert pairing.source_layers == expected
    assert pairing.num_source_layers == (scores if isinstance(scores, int) else len(scores))
    assert pairing.strategy == (strategy if isinstance(strategy, str) else "explicit")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("depth", "targets"), [(4, 4), (5, 4), (7, 3), (12, 5), (40, 32)])
def test_pairs_ascend_within_the_source(strategy, depth, targets):
    layers = pair_layers([float((7 * layer) % depth) for layer in range(depth)], targets, strategy).source_layers
    assert len(layers) == targets == len(set(layers))
    assert list(layers) == sorted(layers) and set(layers) <= set(range(depth))
    if strategy in ("proportional", "uniform", "last"):
        assert layers[-1] == depth - 1


@pytest.mark.parametrize(("depth", "targets"), [(4, 4), (7, 3), (12, 5), (40, 32)])
def test_banded_takes_the_best_of_each_equal_depth_band(depth, targets):
    values = [float((7 * layer) % depth) for layer in range(depth)]
    for k, layer in enumerate(pair_layers(values, targets, "banded").source_layers):
        band = range(k * depth // targets, (k + 1) * depth // targets)
        assert layer in band and values[layer] == max(values[i] for i in band)


def test_scores_are_kept_where_they_were_used():
    scores = LayerScores(values=tuple(SCORES), deviations=(0.1,) * 8, num_examples=4, aggregate="dot")
    for strategy in ("attribution", "banded"):
        assert pair_layers(scores, 3, strategy) == pair_layers(SCORES, 3, strategy)
        assert pair_layers(scores, 3, strategy).scores == tuple(SCORES)
    for strategy in ("proportional", "uniform", "last"):
        assert pair_layers(scores, 3, strategy) == pair_layers(8, 3, strategy)
        assert pair_layers(scores, 3, strategy).scores is None
    assert pair_layers(scores, 3) == pair_layers(scores, 3, "attribution")


@pytest.mark.parametrize("strategy", ["attribution", "banded", "uniform", "last"])
def test_a_source_shallower_than_the_target_is_refused(strategy):
    with pytest.raises(ValueError, match=r"source has 2 layers and the target 3.*'proportional'"):
        pair_layers([0.5, 0.6], 3, strategy)


@pytest.mark.parametrize("strategy", ["attribution", "banded"])
def test_a_strategy_without_its_scores_is_refused(strategy):
    with pytest.raises(ValueError, match=rf"'{strategy}' needs scores from attribute_layers"):
        pair_layers(8, 3, strategy)


@pytest.mark.parametrize("strategy", ["attribution", "banded"])
def test_scores_that_are_no_numbers_are_refused(strategy):
    with pytest.raises(ValueError, match="nan"):
        pair_layers([1.0, float("nan"), 3.0, 2.0], 2, strategy)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"'random' is unknown: use one of .*'banded'"):
        pair_layers(8, 3, "random")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 1], "lists 2 source layers, but the target has 3"),
        ([0, 1, 2, 3], "lists 4 source layers, but the target has 3"),
        ([0, 2, 1], r"\[0, 2, 1\] must be ascending"),
        ([0, 1, 8], "between 0 and 7"),
        ([-1, 0, 1], "between 0 and 7"),
    ],
)
def test_a_bad_explicit_list_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        pair_layers(8, 3, layers)


@pytest.mark.parametrize("pairing", [pair_layers(SCORES, 3), pair_layers(8, 3, "last"), pair_layers(8, 3, [1, 2, 2])])
def test_json_round_trip(tmp_path, pairing):
    named = pairing.named("org/large", "org/small")
    assert (named.source_id, named.target_id, named.source_layers) == ("org/large", "org/small", pairing.source_layers)
    for written in (pairing, named):
        written.to_json(tmp_path / "pairing.json")
        read = LayerPairing.from_json(tmp_path / "pairing.json")
        assert read == written and hash(read) == hash(written)


def test_scores_may_be_a_tensor():
    pairing = pair_layers(torch.tensor([0.5, 2.0, 1.0]), 2)
    assert pairing.source_layers == (1, 2) and pairing.scores == (0.5, 2.0, 1.0)
