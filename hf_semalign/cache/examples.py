"""The distinct examples of a data set, in the order of a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset

from hf_semalign.splits import column_chunks
from hf_semalign.tokenization import IGNORED

SHARD_TOKENS = 2**14  # a pass holds a shard of every column in memory, and an interrupted one loses at most that
Collate = Callable[[list[dict]], dict[str, torch.Tensor]]


class Examples:
    """The distinct examples of a data set, longest first: a pass pads little, and its largest batch comes first.

    Args:
        dataset: rows of :func:`hf_semalign.splits.encode`. Rows with the same content count once.

    Attributes:
        ids: example ids ``[E]``.
        tokens: tokens of each example ``[E]``.
        answers: valid positions of each example ``[E]``.
        shards: slices of the examples with about equally many tokens.
        shard_tokens: tokens of a shard, approximately.
        starts: first example of each shard.
        offsets: number of positions before each example, ``[E + 1]``; of all positions (``True``) or of valid ones (``False``).
    """

    def __init__(self, dataset: Dataset) -> None:
        tokens, answers = _counts(dataset)
        self._known, first = np.unique(
            np.concatenate([ids.to_numpy() for ids in column_chunks(dataset, "example_id")]), return_index=True
        )
        order = np.lexsort((self._known, -tokens[first]))
        self._places = np.argsort(order)  # of the known ids
        self.ids, self._rows = self._known[order], first[order]
        self.tokens, self.answers = tokens[self._rows], answers[self._rows]
        self.dataset, self.shard_tokens = dataset, SHARD_TOKENS
        self.shards = _cut(self.tokens)
        self.starts = np.array([shard.start for shard in self.shards])
        counts = {True: self.tokens, False: self.answers}
        self.offsets = {key: np.concatenate([[0], np.cumsum(values)]) for key, values in counts.items()}

    def __contains__(self, example_id: int) -> bool:
        return bool(self._known[self._known.searchsorted(example_id) % len(self._known)] == example_id)

    def places(self, example_ids: torch.Tensor) -> np.ndarray:
        """Places of some examples by their ids.

        Raises:
            KeyError: an example of another data set.
        """
        wanted = example_ids.cpu().numpy()
        found = self._known.searchsorted(wanted) % len(self._known)
        if (unknown := wanted[self._known[found] != wanted]).size:
            raise KeyError(int(unknown[0]))
        return self._places[found]

    @cached_property
    def digest(self) -> str:
        """Digest of ids, which identify the content, and of counts."""
        return hashlib.sha256(np.stack([self.ids, self.tokens, self.answers]).tobytes()).hexdigest()[:32]

    def within(self, number: int, places: np.ndarray | None = None) -> np.ndarray:
        """Places of a shard's examples; with ``places``, which are sorted, only those among them."""
        shard = self.shards[number]
        if places is None:
            return np.arange(shard.start, shard.stop)
        first, last = places.searchsorted([shard.start, shard.stop])
        return places[first:last]

    def batches(self, number: int, size: int, places: np.ndarray | None = None) -> list[np.ndarray]:
        """Places of each batch of a shard: of all its examples, or of those among ``places``."""
        inside = self.within(number, places)
        return [inside[start : start + size] for start in range(0, len(inside), size)]

    def rows(self, places: np.ndarray) -> list[dict]:
        """The rows of some examples."""
        return self.dataset.__getitems__(self._rows[places].tolist())

    def positions(self, places: np.ndarray | None, *, everywhere: bool) -> int:
        """Number of positions of some examples or of all, with or without positions that are not valid."""
        counts = self.tokens if everywhere else self.answers
        return int((counts if places is None else counts[places]).sum())


def _counts(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid positions of each row, as arrays: as Python integers, 100,000 rows would take gigabytes."""
    tokens, answers = [], []
    for labels in column_chunks(dataset, "labels"):
        lengths = np.diff(labels.offsets.to_numpy())
        supervised = labels.flatten().to_numpy() != IGNORED
        supervised[np.cumsum(lengths) - lengths] = False  # nothing predicts a first token
        row = np.repeat(np.arange(len(lengths)), lengths)
        tokens.append(lengths)
        answers.append(np.bincount(row, weights=supervised, minlength=len(lengths)))
    return np.concatenate(tokens).astype(np.int64), np.concatenate(answers).astype(np.int64)


def _cut(tokens: np.ndarray) -> list[slice]:
    shards, start, size = [], 0, 0
    for place, count in enumerate(tokens):
        if size and size + count > SHARD_TOKENS:
            shards.append(slice(start, place))
            start, size = place, 0
        size += int(count)
    return [*shards, slice(start, len(tokens))]
