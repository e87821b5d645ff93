"""Rows that the source reads differently from the target: in tokens of its own, or after a prompt of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.method.alignment import Alignment, TokenRow, align_prompts, align_rows
from hf_semalign.method.prefix_classes import PrefixClasses, prefix_classes
from hf_semalign.method.vocabularies import rows_by_bytes
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.splits import SCHEMA, column_chunks, encode, example_digest, write_rows
from hf_semalign.tokenization import IGNORED, OF_SOURCE, Record, form_of

logger = logging.getLogger(__name__)
PAIRED = pa.schema([*SCHEMA, ("source_id", pa.int64()), ("source_rank", pa.list_(pa.int64()))])
WITH_BYTES = pa.schema([*PAIRED, ("answer_bytes", pa.int64())])


@dataclass(frozen=True)
class TokenizerPair:
    """Two different tokenizers and the correspondence of their tokens.

    Attributes:
        source_tokenizer: the source's tokenizer.
        source: bytes of the source's tokens.
        target: bytes of the target's tokens.
        classes: token classes of both heads, for the output loss.
        map_rows: rows of both heads whose tokens spell the same bytes, for the semantic map.
    """

    source_tokenizer: PreTrainedTokenizerBase
    source: TokenBytes
    target: TokenBytes
    classes: PrefixClasses
    map_rows: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(
        cls,
        source_tokenizer: PreTrainedTokenizerBase,
        target_tokenizer: PreTrainedTokenizerBase,
        *,
        source_rows: int,
        target_rows: int,
        width: int,
    ) -> TokenizerPair:
        """Compare two tokenizers.

        Args:
            source_tokenizer: the source's tokenizer.
            target_tokenizer: the target's tokenizer.
            source_rows: rows of the source's head.
            target_rows: rows of the target's head.
            width: channels of the target.

        Raises:
            ValueError: the bytes of a tokenizer's tokens cannot be determined, or the two share too few tokens.
        """
        tables = TokenBytes.of(source_tokenizer), TokenBytes.of(target_tokenizer)
        classes = prefix_classes(*tables, source_rows, target_rows)
        return cls(source_tokenizer, *tables, classes, rows_by_bytes(*tables, source_rows, target_rows, width=width))


@dataclass(frozen=True)
class PairedSplit:
    """A split encoded for both models, row by row.

    Attributes:
        source: rows of :func:`hf_semalign.splits.encode` that the source reads.
        target: the same rows as the target reads them, with more columns: ``source_id``, the source row's ``example_id``;
            ``source_rank`` ``[T]``, the rank of the aligned source position among the source's valid positions, or -1; and with
            two tokenizers ``answer_bytes``, the number of bytes in the supervised tokens.
        aligned: share of the target's valid positions that are used: aligned, and with two tokenizers of one class with the
            source's.
        own_prompts: number of rows with a column that only the source reads.
    """

    source: Dataset
    target: Dataset
    aligned: float
    own_prompts: int


def has_source_columns(rows: Sequence[Record] | Dataset) -> bool:
    """Whether a row has a column that only the source reads, see :func:`hf_semalign.tokenization.source_record`."""
    if isinstance(rows, Dataset) and rows.format["type"] != "custom":
        names = [name for name in OF_SOURCE if name in rows.column_names]
        return bool(names) and any(map(_is_for_source, rows.select_columns(names)))
    return any(map(_is_for_source, rows))


def _is_for_source(record: Record) -> bool:
    return isinstance(record, Mapping) and any(record.get(name) is not None for name in OF_SOURCE)


def encode_paired(
    rows: Sequence[Record] | Dataset,
    source_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase | None,
    two: TokenizerPair | None,
    *,
    split: str,
    max_length: int | None,
) -> PairedSplit:
    """Encode a split for both models, and align their positions.

    Args:
        rows: rows with ``prompt`` and ``completion``, or with ``messages``.
        source_tokenizer: the tokenizer that the source reads with.
        tokenizer: the target's tokenizer.
        two: the correspondence of the two; ``None`` if they are one tokenizer.
        split: name of the split, for messages.
        max_length: longer sequences are truncated at the end, on each side.

    Raises:
        ValueError: the rows hold token ids, the two sides read different answers in too many rows, or no position is aligned.
    """
    if form_of(rows[0]) == "ids":
        reason = "the source has prompts of its own" if two is None else "source and target have different tokenizers"
        raise InputError(
            f"The {split} split has rows of token ids, but {reason}: give the rows as text, in prompt and completion or in "
            "messages."
        )
    ours = encode(rows, tokenizer, split=split)  # first, because it checks the columns of the source
    theirs = encode(rows, source_tokenizer, split=split, for_source=True)
    source_rows, target_rows = ((TokenRow(one["input_ids"], one["labels"]) for one in side) for side in (theirs, ours))
    if two is None:
        found = align_prompts(source_rows, target_rows, split=split, max_length=max_length)
    else:
        spelling = two.source, two.target, two.classes
        found = align_rows(source_rows, target_rows, *spelling, split=split, max_length=max_length)
    for role, side in (("source", theirs), ("target", ours)):
        longer = sum(
            np.count_nonzero(np.diff(ids.offsets.to_numpy()) > (max_length or np.inf)) for ids in column_chunks(side, "labels")
        )
        if longer:
            logger.warning(
                "%d of %d rows of the %s split are truncated at max_length %d for the %s.",
                longer, len(side), split, max_length, role,
            )  # fmt: skip
    counts = np.zeros(2, int)
    source = write_rows(_cut(theirs, found, max_length), SCHEMA)
    target = _paired(ours, source, found, max_length, None if two is None else two.target, counts)
    written = write_rows(target, PAIRED if two is None else WITH_BYTES)
    aligned, valid = counts.tolist()
    if aligned == 0:
        raise InputError(
            f"No answer token of the {split} split is aligned: the tokenizers split all of its answers differently. Use "
            "longer answers, or choose a pair with one tokenizer."
        )
    logger.info(
        "%.1f %% of the target's answer tokens in the %s split are used: %s.",
        100 * aligned / valid, split, "aligned" if two is None else "aligned, and of one class with the source's",
    )  # fmt: skip
    own_prompts = 0
    if has_source_columns(rows):
        own_prompts = sum(_is_for_source(row) for row, alignment in zip(rows, found, strict=True) if alignment is not None)
    return PairedSplit(source, written, aligned / valid, own_prompts)


def _paired(
    rows: Dataset,
    source: Dataset,
    found: Sequence[Alignment | None],
    max_length: int | None,
    spelling: TokenBytes | None,
    counts: np.ndarray,
) -> Iterator[tuple]:
    """Yield target rows with their source columns. Adds the numbers of aligned and valid positions to ``counts``."""
    kept = [alignment for alignment in found if alignment is not None]
    for (ids, labels, example_id), other, alignment in zip(_cut(rows, found, max_length), source, kept, strict=True):
        ranks = np.full(len(ids), -1)
        pairs = alignment.pairs[alignment.comparable]
        ranks[pairs[:, 1]] = pairs[:, 0]
        supervised = [label for label in labels[1:] if label != IGNORED]
        counts += len(pairs), len(supervised)
        answer_bytes = [] if spelling is None else [sum(len(spelling.spelled[label] or b"") for label in supervised)]
        yield ids, labels, example_id, other["example_id"], ranks.tolist(), *answer_bytes


def _cut(
    rows: Dataset, found: Sequence[Alignment | None], max_length: int | None
) -> Iterator[tuple[list[int], list[int], int]]:
    """Yield the aligned rows, truncated to ``max_length``."""
    for row, alignment in zip(rows, found, strict=True):
        if alignment is not None:
            ids, labels = row["input_ids"][:max_length], row["labels"][:max_length]
            yield ids, labels, example_digest(ids, labels)
