"""Align the positions of two models that read the same answer in rows of their own.

**Two tokenizers.** A valid position is a token boundary in the answer. A boundary of the source and one of the target are
aligned if the same number of bytes of the same turn follow both. Bytes are counted from the end of a turn, because its first
token may begin earlier on one side: it may span the end of the prompt, or contain the space that SentencePiece puts before a
text, or white space that only one of the chat templates writes.

**One tokenizer, two prompts.** Two positions are aligned if the same answer tokens follow both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from hf_semalign.errors import InputError
from hf_semalign.method.prefix_classes import PrefixClasses
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.tokenization import IGNORED

MAX_LEFT_OUT = 0.1  # largest share of rows that may be left out
SHOWN = 5  # rows that a message names
AROUND = 20  # bytes that it shows before and after a difference
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRow:
    """One row in the tokens of one model: ``ids`` ``[T]``, and ``labels`` ``[T]`` with -100 for unsupervised tokens."""

    ids: Sequence[int]
    labels: Sequence[int]

    @cached_property
    def supervised(self) -> np.ndarray:
        """``[T]`` bool: which tokens are supervised."""
        return np.asarray(self.labels) != IGNORED

    @cached_property
    def answers(self) -> list[np.ndarray]:
        """The places of the supervised tokens, one array for each run of them."""
        inside = np.concatenate([[False], self.supervised, [False]])
        edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)
        return [np.arange(first, stop) for first, stop in edges]


@dataclass(frozen=True)
class Alignment:
    """The aligned positions of one row, in order.

    The start of a turn is always aligned. Its end is aligned too if both models predict a token that ends the turn.

    Attributes:
        pairs: ``[P, 2]`` int32: rank among the source's valid positions, and position in the target's tokens.
        comparable: ``[P]`` bool: both next tokens are in the same class, so the two predictions can be compared. They are not
            if one tokenizer splits an indentation into three spaces and a word with a leading space, and the other writes four
            spaces. At the start of a turn whose first token begins earlier on one side, they seldom are.
    """

    pairs: np.ndarray
    comparable: np.ndarray


@dataclass(frozen=True)
class _Turn:
    """A run of supervised tokens, up to the token that ends the turn.

    Attributes:
        first: index of the first token in the row.
        text: bytes that the tokens before the end spell.
        read: ``[n]``, number of bytes before each token; with ``ended``, the last token is the one that ends the turn.
        ended: whether the turn has such a token.
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
    """Align the positions of each row of a split.

    Args:
        source_rows: rows in the source's tokens, not truncated.
        target_rows: the same rows in the target's tokens.
        source: bytes of the source's tokens.
        target: bytes of the target's tokens.
        classes: classes of both models' tokens.
        split: name of the split, for messages.
        max_length: sequences will be truncated at this length; positions behind it are not aligned.

    Returns:
        One alignment per row. ``None`` for rows to leave out, because the two sides spell different bytes in the answer; the
        log names them.

    Raises:
        ValueError: more than 10 % of the rows would be left out; the message shows where the first of them differ.
    """
    return _aligned(
        source_rows,
        target_rows,
        lambda ours, theirs: align_row(ours, theirs, source, target, classes, max_length),
        lambda ours, theirs: _parting(ours, theirs, source, target),
        f"of the {split} split, the two tokenizers and chat templates do not give the same bytes for the answer, or max_length "
        "cuts it off",
        "Give the rows as prompt and completion in plain text, remove special tokens from the answers, or choose a pair with "
        "one tokenizer.",
        split,
    )


def align_prompts(
    source_rows: Iterable[TokenRow], target_rows: Iterable[TokenRow], *, split: str, max_length: int | None = None
) -> list[Alignment | None]:
    """Align the positions of each row of a split that both models read with one tokenizer, but after different prompts.

    Arguments, result and errors are those of :func:`align_rows`. A row is left out if the two sides have other numbers of
    answers, or if no answer has a last token in common within ``max_length``.
    """
    return _aligned(
        source_rows,
        target_rows,
        lambda ours, theirs: _align_ends(ours, theirs, max_length),
        lambda ours, theirs: f"{len(ours.ids)} tokens of the source, {len(theirs.ids)} of the target",
        f"of the {split} split, source and target do not read the same answer tokens, or max_length ({max_length}) cuts them "
        "off",
        "Raise max_length, or give the source a shorter prompt.",
        split,
    )


def _aligned(
    source_rows: Iterable[TokenRow],
    target_rows: Iterable[TokenRow],
    align: Callable[[TokenRow, TokenRow], Alignment | None],
    parting: Callable[[TokenRow, TokenRow], str],
    problem: str,
    advice: str,
    split: str,
) -> list[Alignment | None]:
    """Align row by row. The log names rows that cannot be aligned, and more than 10 % of them are refused."""
    alignments: list[Alignment | None] = []
    reasons: list[str] = []
    for row, (ours, theirs) in enumerate(zip(source_rows, target_rows, strict=True)):
        alignments.append(align(ours, theirs))
        if alignments[-1] is None and len(reasons) < SHOWN:
            reasons.append(f"{split}[{row}]: {parting(ours, theirs)}")
    left_out = alignments.count(None)
    if left_out:
        message = f"In {left_out} of {len(alignments)} rows {problem}:\n  " + "\n  ".join(reasons)
        if left_out > MAX_LEFT_OUT * len(alignments):
            raise InputError(f"{message}\nAt most {MAX_LEFT_OUT:.0%} of the rows may be left out. {advice}")
        logger.warning("%s\nThese rows are left out.", message)
    return alignments


def align_row(
    source_row: TokenRow,
    target_row: TokenRow,
    source: TokenBytes,
    target: TokenBytes,
    classes: PrefixClasses,
    max_length: int | None = None,
) -> Alignment | None:
    """Align the positions of one row; ``None`` if its answers spell different bytes. Arguments as in :func:`align_rows`."""
    ours, theirs = _turns(source_row, source), _turns(target_row, target)
    if not ours or not theirs or len(ours) != len(theirs) or not all(map(_agree, ours, theirs)):
        return None
    tokens = np.concatenate(list(map(_meetings, ours, theirs)))
    pairs = _pairs(tokens, source_row, max_length)
    if pairs is None:
        return None
    kept, ranks = pairs
    our_next, their_next = (np.asarray(row.ids)[kept[:, side]] for side, row in enumerate((source_row, target_row)))
    return Alignment(ranks, classes.source.numpy()[our_next] == classes.target.numpy()[their_next])


def _align_ends(source_row: TokenRow, target_row: TokenRow, max_length: int | None) -> Alignment | None:
    """Align each answer of two rows from its last token, as far back as the tokens are equal; ``None`` if no token is left."""
    ours, theirs = (row.answers for row in (source_row, target_row))
    if len(ours) != len(theirs):
        return None
    parts = [np.zeros((0, 2), int)]
    for one, other in zip(ours, theirs, strict=True):
        count = min(len(one), len(other))
        one, other = one[-count:], other[-count:]
        differ = np.flatnonzero(np.asarray(source_row.ids)[one] != np.asarray(target_row.ids)[other])
        parts.append(np.stack([one, other], axis=1)[differ[-1] + 1 if len(differ) else 0 :])
    pairs = _pairs(np.concatenate(parts), source_row, max_length)
    return None if pairs is None else Alignment(pairs[1], np.ones(len(pairs[1]), bool))


def _pairs(tokens: np.ndarray, source_row: TokenRow, max_length: int | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The aligned tokens ``[P, 2]`` that something predicts and ``max_length`` leaves, and the pairs of an
    :class:`Alignment`; ``None`` if there are none.
    """
    kept = tokens[(tokens > 0).all(1)]  # nothing predicts the first token of a row
    if max_length is not None:
        kept = kept[(kept < max_length).all(1)]
    if not len(kept):
        return None
    rank = np.cumsum(source_row.supervised[1:]) - 1
    return kept, np.stack([rank[kept[:, 0] - 1], kept[:, 1] - 1], axis=1).astype(np.int32)


def _turns(row: TokenRow, spelling: TokenBytes) -> list[_Turn] | None:
    """The answers of a row, each up to its end; ``None`` if one of them has a token with unknown bytes."""
    turns = []
    for places in row.answers:
        first, stop = int(places[0]), int(places[-1]) + 1
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
    """Both texts, without their trailing white space if it differs."""
    ours, theirs = one.text.rstrip(), other.text.rstrip()
    same = one.text[len(ours) :] == other.text[len(theirs) :]
    return (one.text, other.text) if same else (ours, theirs)


def _agree(one: _Turn, other: _Turn) -> bool:
    """Whether one turn's text is a suffix of the other's, up to white space at the end."""
    ours, theirs = _cores(one, other)
    return bool(ours) == bool(theirs) and (ours.endswith(theirs) or theirs.endswith(ours))


def _meetings(one: _Turn, other: _Turn) -> np.ndarray:
    """``[P, 2]`` indices, in both rows, of the tokens that follow the aligned positions of two turns."""
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
    """Describe where the answers of a row begin to differ."""
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
    return "no answer position is left"
