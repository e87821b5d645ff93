"""A pair of models that cut text differently: what their tokenizers share, and each row as both of them read it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError
from hf_semalign.method.alignment import Alignment, TokenRow, align_rows
from hf_semalign.method.prefix_classes import PrefixClasses, prefix_classes
from hf_semalign.method.semantic_map import rows_by_bytes
from hf_semalign.models.token_bytes import TokenBytes
from hf_semalign.splits import SCHEMA, column_chunks, encode, example_digest, write_rows
from hf_semalign.tokenization import IGNORED, Record, form_of

logger = logging.getLogger(__name__)
PAIRED = pa.schema([*SCHEMA, ("source_id", pa.int64()), ("source_rank", pa.list_(pa.int64())), ("answer_bytes", pa.int64())])


@dataclass(frozen=True)
class PairedSplit:
    """A split as both models read it, row by row.

    Attributes:
        source: rows of :func:`hf_semalign.splits.encode` by the source's tokenizer.
        target: the same by the target's, with three more columns: ``source_id``, the source's ``example_id``; ``source_rank``
            ``[T]``, for each position of the target the aligned position of the source, counted among its valid ones, and -1
            where there is none; and ``answer_bytes``.
        aligned: share of the target's valid positions that are aligned.
    """

    source: Dataset
    target: Dataset
    aligned: float


@dataclass(frozen=True)
class TokenizerPair:
    """What two tokenizers share.

    Attributes:
        source_tokenizer: the source's.
        source: what its tokens spell.
        target: what the target's tokens spell.
        classes: of the tokens of both heads, for the output loss.
        map_rows: rows of both heads that spell the same bytes, for the map.
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
            source_tokenizer: the source's.
            target_tokenizer: the target's.
            source_rows: rows of the source's head.
            target_rows: rows of the target's head.
            width: channels of the target.

        Raises:
            ValueError: a tokenizer whose tokens do not tell their bytes, or too few tokens in common.
        """
        tables = TokenBytes.of(source_tokenizer), TokenBytes.of(target_tokenizer)
        classes = prefix_classes(*tables, source_rows, target_rows)
        return cls(source_tokenizer, *tables, classes, rows_by_bytes(*tables, source_rows, target_rows, width=width))

    def encode(
        self, rows: Sequence[Record] | Dataset, tokenizer: PreTrainedTokenizerBase, *, split: str, max_length: int | None
    ) -> PairedSplit:
        """A split in the tokens of both models.

        Args:
            rows: rows with ``prompt`` and ``completion``, or with ``messages``.
            tokenizer: the target's.
            split: name for messages.
            max_length: longer sequences are cut at the end, on each side.

        Raises:
            ValueError: rows of token ids; too many rows whose answers are other bytes for the two tokenizers; no position that
                is aligned.
        """
        if form_of(rows[0]) == "ids":
            raise InputError(
                f"The {split} split has rows of token ids, and source and target have different tokenizers: give the rows as "
                "text, in prompt and completion or in messages."
            )
        whole = [encode(rows, one, split=split) for one in (self.source_tokenizer, tokenizer)]
        theirs, ours = ((TokenRow(one["input_ids"], one["labels"]) for one in side) for side in whole)
        found = align_rows(theirs, ours, self.source, self.target, self.classes, split=split, max_length=max_length)
        for role, side in zip(("source", "target"), whole, strict=True):
            longer = sum(
                np.count_nonzero(np.diff(ids.offsets.to_numpy()) > (max_length or np.inf))
                for ids in column_chunks(side, "labels")
            )
            if longer:
                logger.warning(
                    "%d of %d rows of the %s split are cut at max_length %d for the %s.",
                    longer,
                    len(side),
                    split,
                    max_length,
                    role,
                )
        counts = np.zeros(2, int)
        source = write_rows(_cut(whole[0], found, max_length), SCHEMA)
        target = write_rows(self._paired(whole[1], source, found, max_length, counts), PAIRED)
        aligned, valid = counts.tolist()
        if aligned == 0:
            raise InputError(
                f"No answer token of the {split} split is aligned: the tokenizers cut all of its answers differently. Give "
                "longer answers, or choose a pair of one tokenizer."
            )
        logger.info("%.1f %% of the target's answer tokens in the %s split are aligned.", 100 * aligned / valid, split)
        return PairedSplit(source, target, aligned / valid)

    def _paired(
        self,
        rows: Dataset,
        source: Dataset,
        found: Sequence[Alignment | None],
        max_length: int | None,
        counts: np.ndarray,
    ) -> Iterator[tuple]:
        """Rows of the target with what belongs to them on the other side; ``counts`` gets aligned and valid positions."""
        kept = [alignment for alignment in found if alignment is not None]
        for (ids, labels, example_id), other, alignment in zip(_cut(rows, found, max_length), source, kept, strict=True):
            ranks = np.full(len(ids), -1)
            pairs = alignment.pairs[alignment.comparable]
            ranks[pairs[:, 1]] = pairs[:, 0]
            supervised = [label for label in labels[1:] if label != IGNORED]
            counts += len(pairs), len(supervised)
            answer_bytes = sum(len(self.target.spelled[label] or b"") for label in supervised)
            yield ids, labels, example_id, other["example_id"], ranks.tolist(), answer_bytes


def _cut(
    rows: Dataset, found: Sequence[Alignment | None], max_length: int | None
) -> Iterator[tuple[list[int], list[int], int]]:
    """Rows that are aligned, cut at their end."""
    for row, alignment in zip(rows, found, strict=True):
        if alignment is not None:
            ids, labels = row["input_ids"][:max_length], row["labels"][:max_length]
            yield ids, labels, example_digest(ids, labels)
