"""Layer pairing: one source layer for each target layer (method, section 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path

from hf_semalign.errors import InputError
from hf_semalign.files import read_json
from hf_semalign.kinds import check_kinds
from hf_semalign.method.attribution import LayerScores

STRATEGIES = ("attribution", "proportional", "uniform", "last", "banded")
NEEDS_SCORES = ("attribution", "banded")


@dataclass(frozen=True)
class LayerPairing:
    """Which source layer supervises which target layer.

    Attributes:
        source_layers: 0-based source layers, ascending; entry ``k`` is paired with target layer ``k``.
        num_source_layers: number of layers of the source.
        strategy: how the layers were chosen; ``explicit`` for a given list.
        scores: attribution scores of the source layers, if the strategy used them.
        source_id: Hub id or name of the source.
        target_id: Hub id or name of the target.
    """

    source_layers: tuple[int, ...]
    num_source_layers: int
    strategy: str
    scores: tuple[float, ...] | None = None
    source_id: str | None = None
    target_id: str | None = None

    def __post_init__(self) -> None:
        if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in self.source_layers):
            raise InputError(f"source_layers is {self.source_layers}: expected whole numbers.")
        _check_order(self.source_layers, self.num_source_layers)
        if self.scores is not None and len(self.scores) != self.num_source_layers:
            raise InputError(
                f"There are {len(self.scores)} scores for {self.num_source_layers} source layers: expected one each."
            )

    def named(self, source_id: str, target_id: str) -> LayerPairing:
        """Copy of the pairing with the ids of both models."""
        return replace(self, source_id=source_id, target_id=target_id)

    def to_dict(self) -> dict:
        """Convert to plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict, where: str = "the pairing") -> LayerPairing:
        """Rebuild from the output of :meth:`to_dict`, also after JSON.

        Raises:
            ValueError: the values do not describe a pairing; the message uses ``where`` to name them.
        """
        check_kinds(record, cls, where)
        known = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        scores = record.get("scores")
        lists = {"source_layers": tuple(record["source_layers"]), "scores": None if scores is None else tuple(scores)}
        return cls(**{**known, **lists})

    def to_json(self, path: str | Path) -> None:
        """Write the pairing to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2))

    @classmethod
    def from_json(cls, path: str | Path) -> LayerPairing:
        """Read what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is damaged, or contains something else.
        """
        return cls.from_dict(read_json(path), str(path))


def pair_layers(
    scores: LayerScores | Sequence[float] | int, num_target_layers: int, strategy: str | Sequence[int] = "attribution"
) -> LayerPairing:
    """Pair each target layer with one source layer.

    With ``S`` source and ``L`` target layers, the strategies choose:

    - ``attribution`` (the paper): the ``L`` source layers with the highest scores, in order of depth.
    - ``banded``: the layer with the highest score in each of ``L`` equal depth bands.
    - ``proportional`` (version 1 of the paper): layer ``round(k S / L)``, counted from 1; repeats layers if ``S < L``.
    - ``uniform``: evenly spaced from the first to the last source layer.
    - ``last``: the ``L`` deepest source layers.
    - a sequence: these 0-based source layers, ascending.

    Args:
        scores: scores of the source layers, or their number if the strategy needs no scores.
        num_target_layers: ``L``.
        strategy: a name from above, or an explicit sequence.

    Raises:
        ValueError: the strategy is unknown; scores are missing; the source is shallower than the target (allowed only under
            ``proportional`` and for an explicit list); or an explicit list has the wrong length, is out of range or is not
            ascending.
    """
    counts = [num_target_layers, scores] if isinstance(scores, int) else [num_target_layers]
    if isinstance(scores, Mapping) or not all(isinstance(count, Integral) and count > 0 for count in counts):
        raise InputError(
            f"scores is {scores!r} and num_target_layers is {num_target_layers!r}: expected one score per source layer, or the "
            "number of source layers; and the number of target layers, at least 1."
        )
    values = () if isinstance(scores, int) else tuple(map(float, scores.values if isinstance(scores, LayerScores) else scores))
    depth, width = scores if isinstance(scores, int) else len(values), num_target_layers
    if not all(map(math.isfinite, values)):
        raise InputError(f"The layer scores {values} contain nan or inf: compute them in a wider dtype.")
    if not isinstance(strategy, str):
        return LayerPairing(_explicit(strategy, depth, width), depth, "explicit", values or None)
    if strategy not in STRATEGIES:
        raise InputError(f"Pairing strategy {strategy!r} is unknown: use one of {STRATEGIES} or a list of source layers.")
    if strategy in NEEDS_SCORES and not values:
        raise InputError(f"Pairing strategy {strategy!r} needs scores from attribute_layers; got only a layer count.")
    if depth < width and strategy != "proportional":
        raise InputError(
            f"The source has {depth} layers and the target {width}: {strategy!r} pairing needs a source at least as deep as "
            "the target. Use 'proportional', which can repeat a source layer, or an explicit list."
        )
    if strategy == "attribution":
        chosen = sorted(sorted(range(depth), key=lambda layer: -values[layer])[:width])
    elif strategy == "banded":
        bands = [range(k * depth // width, (k + 1) * depth // width) for k in range(width)]
        chosen = [max(band, key=lambda layer: values[layer]) for band in bands]
    elif strategy == "proportional":
        chosen = [max(1, (2 * (k + 1) * depth + width) // (2 * width)) - 1 for k in range(width)]
    elif strategy == "uniform":
        chosen = [(2 * k * (depth - 1) + width - 1) // (2 * (width - 1)) if width > 1 else depth - 1 for k in range(width)]
    else:
        chosen = list(range(depth - width, depth))
    return LayerPairing(tuple(chosen), depth, strategy, values if strategy in NEEDS_SCORES else None)


def _explicit(layers: Sequence[int], depth: int, width: int) -> tuple[int, ...]:
    if any(isinstance(layer, (bool, str)) or layer != int(layer) for layer in layers):
        raise InputError(f"The pairing lists {list(layers)}: expected whole numbers.")
    chosen = tuple(int(layer) for layer in layers)
    if len(chosen) != width:
        raise InputError(f"The pairing lists {len(chosen)} source layers, but the target has {width} layers: list one each.")
    _check_order(chosen, depth)
    return chosen


def _check_order(chosen: Sequence[int], depth: int) -> None:
    if list(chosen) != sorted(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise InputError(f"The pairing {list(chosen)} must be ascending 0-based source layers between 0 and {depth - 1}.")
