"""Which positions of two models belong together where their tokenizers cut a text differently.

A valid position stands at a boundary of the answer: so many bytes of it are still to come. Two boundaries, one of each
model, are aligned when as many bytes of the same turn are to come at both. Bytes are counted from the end of a turn, since
its first token may begin earlier on one side: it may stand across the seam of prompt and answer, or hold the space that
SentencePiece puts before a text, or white space that one chat template writes and the other does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from hf_semalign.errors import InputError
from hf_semalign.method.prefix_classes import PrefixClasses
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.tokenization import IGNORED

MAX_LEFT_OUT = 0.1  # share of the rows
SHOWN = 5  # rows that a message names
AROUND = 20  # bytes of both answers that it shows
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRow:
    """One row as one model reads it: ``ids`` ``[T]`` and ``labels`` ``[T]``, which are -100 where nothing is supervised."""

    ids: Sequence[int]
    labels: Sequence[int]

    @cached_property
    def supervised(self) -> np.ndarray:
        """``[T]`` bool: the tokens that are supervised."""
        return np.asarray(self.labels) != IGNORED


@dataclass(frozen=True)
class Alignment:
    """The aligned positions of one row, in their order.

    The start of a turn is always aligned, and so is its end, where both models predict a token that ends it.

    Attributes:
        pairs: ``[P, 2]`` int32: rank among the source's valid positions, position of the target.
        comparable: ``[P]`` bool: the tokens that come next are of one class, so that both predictions can be compared. They
            are not where one tokenizer writes an indentation as three spaces and a word with a fourth one, and the other as
            four spaces, and seldom at the start of a turn whose first token begins earlier on one side.
    """

    pairs: np.ndarray
    comparable: np.ndarray


@dataclass(frozen=True)
class _Turn:
    """A run of supervised tokens up to the one that ends it.

    Attributes:
        first: place of the first token in the row.
        text: what the tokens before the end spell.
        read: ``[n]``, bytes before each token; with ``ended`` the last token is the one that ends the turn.
        ended: whether there is one.
    """

    first: int
    text: bytes
    read: np.ndarray
    ended: bool


def align_rows(
    source_rows: Iterable[TokenRow],
    target_rows: Iterable[TokenRow],
    source: TokenBytes,
    target: TokenBytes,
    classes: PrefixClasses,
    *,
    split: str,
    max_length: int | None = None,
) -> list[Alignment | None]:
    """Aligned positions of each row of a split.

    Args:
        source_rows: rows as the source reads them, whole.
        target_rows: the same rows as the target reads them.
        source: what the source's tokens spell.
        target: what the target's tokens spell.
        classes: of the tokens of both.
        split: name for messages.
        max_length: longer sequences are going to be cut at the end, and what is aligned there drops out.

    Returns:
        One alignment a row; ``None`` for rows to leave out, whose answers spell different bytes on the two sides. They are
        named in the log.

    Raises:
        ValueError: too many of them, with the places where the first ones part.
    """
    alignments: list[Alignment | None] = []
    reasons: list[str] = []
    for row, (ours, theirs) in enumerate(zip(source_rows, target_rows, strict=True)):
        alignments.append(align_row(ours, theirs, source, target, classes, max_length))
        if alignments[-1] is None and len(reasons) < SHOWN:
            reasons.append(f"{split}[{row}]: {_parting(ours, theirs, source, target)}")
    left_out = alignments.count(None)
    if left_out:
        message = (
            f"In {left_out} of {len(alignments)} rows of the {split} split the answer is not the same bytes for both "
            "tokenizers and chat templates, or max_length cuts it away:\n  " + "\n  ".join(reasons)
        )
        if left_out > MAX_LEFT_OUT * len(alignments):
            raise InputError(
                f"{message}\nAt most {MAX_LEFT_OUT:.0%} of the rows may be left out for this. Give the rows as prompt and "
                "completion in plain text, take special tokens out of the answers, or choose a pair of one tokenizer."
            )
        logger.warning("%s\nThey are left out.", message)
    return alignments


def align_row(
    source_row: TokenRow,
    target_row: TokenRow,
    source: TokenBytes,
    target: TokenBytes,
    classes: PrefixClasses,
    max_length: int | None = None,
) -> Alignment | None:
    """Aligned positions of one row; ``None`` where its answers spell different bytes. Arguments as in :func:`align_rows`."""
    ours, theirs = _turns(source_row, source), _turns(target_row, target)
    if not ours or not theirs or len(ours) != len(theirs) or not all(map(_agree, ours, theirs)):
        return None
    tokens = np.concatenate(list(map(_meetings, ours, theirs)))
    kept = (tokens > 0).all(1)  # nothing predicts the first token of a row
    if max_length is not None:
        kept &= (tokens < max_length).all(1)
    if not kept.any():
        return None
    our_places, their_places = tokens[kept].T
    rank = np.cumsum(source_row.supervised[1:]) - 1
    our_next, their_next = np.asarray(source_row.ids)[our_places], np.asarray(target_row.ids)[their_places]
    return Alignment(
        pairs=np.stack([rank[our_places - 1], their_places - 1], axis=1).astype(np.int32),
        comparable=classes.source.numpy()[our_next] == classes.target.numpy()[their_next],
    )


def _turns(row: TokenRow, spelling: TokenBytes) -> list[_Turn] | None:
    """The answers of a row, each up to its end; ``None`` where one of their tokens spells nothing that is known."""
    inside = np.concatenate([[False], row.supervised, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    turns = []
    for first, stop in edges.reshape(-1, 2).tolist():
        tokens = row.ids[first:stop]
        spelled = [spelling.spelled[token] for token in tokens]
        end = spelled.index(None) if None in spelled else None
        if end is not None and tokens[end] not in spelling.ends:
            return None
        known = cast(list[bytes], spelled[:end])
        read = np.cumsum([0, *map(len, known)])
        turns.append(_Turn(first, b"".join(known), read if end is not None else read[:-1], end is not None))
    return turns


def _cores(one: _Turn, other: _Turn) -> tuple[bytes, bytes]:
    """Both texts, without the white space at their ends where that is not the same."""
    ours, theirs = one.text.rstrip(), other.text.rstrip()
    same = one.text[len(ours) :] == other.text[len(theirs) :]
    return (one.text, other.text) if same else (ours, theirs)


def _agree(one: _Turn, other: _Turn) -> bool:
    """Whether two turns end with the same text, which is all of one of them."""
    ours, theirs = _cores(one, other)
    return bool(ours) == bool(theirs) and (ours.endswith(theirs) or theirs.endswith(ours))


def _meetings(one: _Turn, other: _Turn) -> np.ndarray:
    """``[P, 2]`` places in both rows of the tokens that come next where two turns are aligned."""
    ours, theirs = _cores(one, other)
    our_rest, their_rest = len(ours) - one.read, len(theirs) - other.read
    left, k, j = np.intersect1d(our_rest[our_rest > 0], their_rest[their_rest > 0], assume_unique=True, return_indices=True)
    parts = [np.stack([k, j], axis=1)[::-1]]
    later_start = min(len(ours), len(theirs))
    if later_start and later_start not in left:
        parts.insert(0, np.array([[0, 0]]))
    if one.ended and other.ended:
        parts.append(np.array([[len(one.read), len(other.read)]]) - 1)
    return np.concatenate(parts) + np.array([one.first, other.first])


def _parting(source_row: TokenRow, target_row: TokenRow, source: TokenBytes, target: TokenBytes) -> str:
    """Where the answers of a row part, in words."""
    for role, row, spelling in (("source", source_row, source), ("target", target_row, target)):
        for token in np.asarray(row.ids)[row.supervised].tolist():
            if spelling.spelled[token] is None and token not in spelling.ends:
                return f"the {role} has the token {spelling.names[token]!r} in the answer"
    ours, theirs = _turns(source_row, source) or [], _turns(target_row, target) or []
    if len(ours) != len(theirs):
        return f"the source has {len(ours)} answers, the target {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not _agree(one, other):
            place = next((k for k, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b), 0)
            around = slice(max(0, place - AROUND), place + AROUND)
            return f"the source reads {one.text[around]!r} where the target reads {other.text[around]!r}"
    return "nothing of the answer is left"
