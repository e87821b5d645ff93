"""Splits: encode rows, keep splits disjoint, and collate batches (method, section 0).

Position ``i`` is *valid* if ``labels[i + 1] != -100``, i.e. if it predicts a supervised token. The method uses valid positions
only.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import get_temporary_cache_files_directory
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError, brief
from hf_semalign.tokenization import IGNORED, Record, check_text, form_of, prompt_of, source_record, tokenize

HELD_OUT = 20  # size of LaTen's extract splits
ROWS = 100  # rows of a data set held in memory at a time
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int64()), "labels": pa.list_(pa.int64()), "example_id": pa.int64()})
COLUMNS = ("input_ids", "labels", "example_id", "source_id", "source_rank", "answer_bytes")  # columns that training reads
DATED = re.compile("strftime_now")
logger = logging.getLogger(__name__)


def valid_positions(labels: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` bool: positions whose next token is supervised; the last position is never valid."""
    valid = torch.zeros_like(labels, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] != IGNORED
    return valid


def taught_positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[B, T]`` bool: the valid positions that have source signals. If the source reads rows of its own, these are the aligned
    ones.
    """
    valid = valid_positions(batch["labels"])
    return valid & (batch["source_rank"] >= 0) if "source_rank" in batch else valid


def tensors_of(
    batch: Mapping[str, torch.Tensor], rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check a batch and return its ``input_ids, attention_mask, labels`` on a device, ``[B, T]`` each.

    Args:
        batch: batch with these three tensors; others are ignored.
        rows: rows of the model's token embeddings.
        device: device of the model.

    Raises:
        ValueError: a tensor is missing or has the wrong shape or dtype, or a token has no embedding.
    """
    names = ("input_ids", "attention_mask", "labels")
    given = {name: batch.get(name) for name in names} if isinstance(batch, Mapping) else {}
    tensors = [tensor for tensor in given.values() if isinstance(tensor, torch.Tensor) and tensor.dim() == 2]
    if len({tensor.shape for tensor in tensors}) != 1 or len(tensors) != 3 or any(map(torch.is_floating_point, tensors)):
        found = {
            name: f"{one.dtype} {list(one.shape)}" if isinstance(one, torch.Tensor) else one for name, one in given.items()
        }
        raise InputError(
            f"A batch has {brief(found or type(batch).__name__)}: expected {', '.join(names)} as integer tensors of one shape "
            "[B, T]."
        )
    ids, mask, labels = (tensor.to(device) for tensor in tensors)
    for tokens in (ids, labels[labels != IGNORED]):
        if len(odd := tokens[(tokens < 0) | (tokens >= rows)]):
            raise InputError(f"A batch has the token id {odd[0].item()}: the model has embeddings for {rows} tokens.")
    return ids, mask, labels


def check_disjoint(splits: Mapping[str, Sequence[Record] | Dataset]) -> None:
    """Check that no two splits share a prompt. Memory holds an eight-byte digest per prompt, not its text.

    Args:
        splits: rows by split name.

    Raises:
        ValueError: two splits share prompts; the message names up to five of the rows.
    """
    prompts = {
        name: np.fromiter((_digest(prompt_of(record)) for record in records), np.int64, len(records))
        for name, records in splits.items()
    }
    clashes = [
        f"{first}[{row}] = {second}[{other}]: {prompt_of(splits[first][row])[:60]!r}"
        for first, second in combinations(prompts, 2)
        for row, other in zip(*np.intersect1d(prompts[first], prompts[second], return_indices=True)[1:], strict=True)
    ]
    if clashes:
        shown = "\n  ".join(clashes[:5])
        raise InputError(
            f"Overlapping splits: {len(clashes)} prompts are in more than one of {list(splits)}, which must be disjoint:\n"
            f"  {shown}\nRemove these rows from all splits but one."
        )


def encode(
    records: Sequence[Record] | Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: str,
    max_length: int | None = None,
    for_source: bool = False,
) -> Dataset:
    """Encode rows to a data set of ``input_ids``, ``labels`` and ``example_id``. Only answers are supervised.

    Args:
        records: rows with TRL's ``prompt`` and ``completion`` (strings, or lists of messages), with ``messages`` (every
            assistant turn is supervised), or with ``input_ids`` and ``labels``, which are kept except for padding marked by an
            ``attention_mask``.
        tokenizer: needed unless the rows hold token ids.
        split: name of the split, for messages.
        max_length: longer sequences are truncated at the end.
        for_source: encode what the source reads, see :func:`hf_semalign.tokenization.source_record`.

    Returns:
        One encoded row per record, in a memory-mapped temporary file that lasts for this session. ``example_id`` is a 63-bit
        digest of ids and labels, so equal rows have equal ids in any order.

    Raises:
        ValueError: there are no rows, a row has unknown columns or no valid position, or the tokenizer is missing.
    """
    check_rows(records, split)
    problems = _Problems(f"{split} (source)" if for_source else split, tokenizer, max_length)

    def encoded() -> Iterator[tuple[list[int], list[int], int]]:
        for row, given in enumerate(records):
            record = source_record(given) if for_source else given
            ids, labels = _tokenized(record, tokenizer, f"{split}[{row}]" + " for the source" * for_source)
            problems.note(record, ids, labels)
            ids, labels = ids[:max_length], labels[:max_length]
            yield ids, labels, example_digest(ids, labels)

    dataset = write_rows(encoded(), SCHEMA)
    problems.report()
    return dataset


@dataclass
class _Problems:
    """Counts problems with the rows of a split while they are encoded.

    Attributes:
        split: name of the split.
        tokenizer: tokenizer of the rows, if any.
        max_length: length at which rows are truncated.
        rows: rows seen so far.
        empty: rows without a valid position.
        cut: rows that are truncated.
        seamless: rows whose prompt and completion would run together in one word.
        endless: rows of text without a supervised EOS.
        undated: conversations that leave the date to the chat template.
    """

    split: str
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None
    rows: int = 0
    empty: list[int] = field(default_factory=list)
    cut: int = 0
    seamless: int = 0
    endless: int = 0
    undated: int = 0

    def note(self, record: Record, ids: list[int], labels: list[int]) -> None:
        """Look at the next row, given its ids and labels before truncation."""
        if self.tokenizer is not None and (form := form_of(record)) != "ids":
            self.seamless += form == "prompt" and _is_seamless(record["prompt"], record["completion"])
            self.endless += self.tokenizer.eos_token_id not in labels
            in_chat = form == "messages" or not isinstance(record["prompt"], str)
            self.undated += in_chat and "date_string" not in (record.get("chat_template_kwargs") or {})
        self.cut += self.max_length is not None and len(ids) > self.max_length
        if all(label == IGNORED for label in labels[: self.max_length][1:]):
            self.empty.append(self.rows)
        self.rows += 1

    def report(self) -> None:
        """Log warnings, and refuse rows without a valid position."""
        if self.cut:
            logger.warning(
                "%d of %d rows of the %s split are truncated at max_length %d.",
                self.cut, self.rows, self.split, self.max_length,
            )  # fmt: skip
        if 2 * self.seamless > self.rows:
            logger.warning(
                "In %d of %d rows of the %s split, the prompt ends and the completion begins with a letter or digit. The texts "
                "are joined as they are: add the missing space or line break to one of them.",
                self.seamless, self.rows, self.split,
            )  # fmt: skip
        if self.endless == self.rows:
            logger.warning(
                "No row of the %s split has a supervised %r, so the target does not learn where an answer ends. Set eos_token "
                "to the token that ends a turn in the chat template, or use a template that writes it.",
                self.split, _eos(self.tokenizer),
            )  # fmt: skip
        if self.undated and self.tokenizer is not None and DATED.search(str(self.tokenizer.chat_template)):
            logger.warning(
                "The chat template of %s writes today's date, so the rows of the %s split will be different data tomorrow: the "
                "run could not resume then, and would not find its signals. Fix the date, for example with "
                "chat_template_kwargs {'date_string': '1 Jan 2026'} in each row, if the template supports it.",
                self.tokenizer.name_or_path, self.split,
            )  # fmt: skip
        if self.empty:
            raise InputError(
                f"No valid positions in {len(self.empty)} of {self.rows} rows of the {self.split} split (rows "
                f"{self.empty[:5]}): they have no supervised answer token. Add an answer to these rows, or raise max_length "
                f"(now {self.max_length})."
            )


def write_rows(rows: Iterator[tuple], schema: pa.Schema) -> Dataset:
    """Write rows to a data set on disk; 100,000 rows of Python integers would take gigabytes of memory."""
    folder = get_temporary_cache_files_directory()
    with (
        tempfile.NamedTemporaryFile(dir=folder, suffix=".arrow", delete=False) as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        while some := list(islice(rows, ROWS)):
            columns = zip(*some, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema))
    return Dataset.from_file(file.name)


def column_chunks(rows: Dataset, name: str) -> Iterator[pa.Array]:
    """Iterate over a column of an encoded split as Arrow arrays, ``ROWS`` rows at a time."""
    for table in rows.with_format("arrow").iter(ROWS):
        yield table[name].combine_chunks()


def is_encoded(rows: Any) -> bool:
    """Whether rows come from :func:`encode`; a user's own ``example_id`` column does not count."""
    if not (isinstance(rows, Dataset) and len(rows) and set(SCHEMA.names) <= set(rows.column_names)):
        return False
    first = rows[0]
    return first["example_id"] == example_digest(list(first["input_ids"]), list(first["labels"]))


def check_rows(rows: Any, split: str) -> None:
    """Check that a split is a non-empty data set or list of rows.

    Raises:
        ValueError: it is something else; the message says what.
    """
    sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not sized or isinstance(rows, (str, bytes, Mapping)):
        hint = ""
        if isinstance(rows, Mapping):
            hint = f" It has {sorted(map(str, rows))}: pass a single row in a list, or one of several splits."
        elif not isinstance(rows, (str, bytes)):
            hint = " Rows are read more than once: convert it to a list."
        raise InputError(f"The {split} split is a {type(rows).__name__}: expected a Dataset or a list of rows.{hint}")
    if len(rows) == 0:
        raise InputError(f"The {split} split has no rows.")
    if not isinstance(rows[0], Mapping):
        raise InputError(f"{split}[0] is a {type(rows[0]).__name__}: expected a row, a dict of its columns.")


def _digest(content: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "big") >> 1


def example_digest(ids: list[int], labels: list[int]) -> int:
    """63-bit digest of ids and labels that identifies an example."""
    return _digest((ids, labels))


def _tokenized(record: Record, tokenizer: PreTrainedTokenizerBase | None, where: str) -> tuple[list[int], list[int]]:
    """Tokenize a row; errors from templates and tokenizers name it."""
    try:
        return tokenize(record, tokenizer, where)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where} cannot be encoded ({type(error).__name__}: {reason}). Correct or remove this row."
        ) from error


def _is_seamless(prompt: Any, completion: Any) -> bool:
    """Whether joining two texts would run two words or numbers together."""
    if not isinstance(prompt, str) or not prompt or not completion:
        return False
    return (prompt[-1] + completion[0]).isalnum() and (prompt[-1] + completion[0]).isascii()


def _eos(tokenizer: PreTrainedTokenizerBase | None) -> str:
    return "EOS" if tokenizer is None or tokenizer.eos_token is None else str(tokenizer.eos_token)


def check_token_ids(
    splits: Mapping[str, Dataset], embedded: Mapping[str, int], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Check that every model has embeddings for all token ids and labels, also for tokens added to only one of the models.

    Args:
        splits: encoded rows by split name.
        embedded: number of embeddings by model.
        tokenizer: tokenizer that names the token in the message.

    Raises:
        ValueError: a token has no embedding; the message gives the largest id, its token and the split.
    """
    for split, rows in splits.items():
        largest = max(ids.flatten().to_numpy().max() for name in ("input_ids", "labels") for ids in column_chunks(rows, name))
        for model, count in embedded.items():
            if largest >= count:
                token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(int(largest))!r})"
                raise InputError(
                    f"Token id {largest}{token} in the {split} split: the {model} has embeddings for {count} tokens only. Both "
                    "models read every token of the data: remove this token from the rows, or choose another pair."
                )


def hold_out(rows: Dataset | Sequence[Record]) -> tuple[Dataset | list[Record], Dataset | list[Record]]:
    """Split an extract split off the training data: the last 20 rows, at most a fifth of all, and all rows with their prompts.

    Args:
        rows: the training rows.

    Returns:
        The remaining training rows, and the extract split.

    Raises:
        ValueError: there are fewer than five rows, or no rows would remain because they share the held-out prompts.
    """
    check_rows(rows, "align")
    for row, record in enumerate(rows):
        check_text(record, f"align[{row}]")
    count = min(HELD_OUT, len(rows) // 5)
    if count == 0:
        raise InputError(f"{len(rows)} training rows are too few to split off an extract split: pass extract_dataset.")
    held = {prompt_of(rows[row]) for row in range(len(rows) - count, len(rows))}
    is_held = np.fromiter((prompt_of(record) in held for record in rows), bool, len(rows))
    train, extract = (
        rows.select(chosen) if isinstance(rows, Dataset) else [rows[int(row)] for row in chosen]
        for chosen in (np.flatnonzero(~is_held), np.flatnonzero(is_held))
    )
    if not len(train):
        raise InputError(f"All {len(rows)} training rows share the prompts of the last {count}: pass extract_dataset.")
    logger.warning("No extract_dataset: %d of %d training rows are held out for layer attribution.", len(extract), len(rows))
    return train, extract


def fingerprint(rows: Dataset) -> str:
    """Digest of an encoded split; it depends on the order of the rows."""
    ids = (", ".join(map(str, some.to_pylist())) for some in column_chunks(rows, "example_id"))
    return hashlib.sha256(f"[{', '.join(ids)}]".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Collator:
    """Collates rows of :func:`encode` to ``input_ids, attention_mask, labels`` ``[B, T]`` and ``example_id`` ``[B]``.

    If the source reads rows of its own, the batch also has ``source_rank`` ``[B, T]`` and ``source_id`` ``[B]``, and with two
    tokenizers ``answer_bytes`` ``[B]``, see :class:`hf_semalign.training.source_rows.PairedSplit`.

    Attributes:
        pad_token_id: token for padding on the right; masked in attention and labels.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Record]) -> dict[str, torch.Tensor]:
        """Collate rows, padded to the longest one."""
        tensors = [
            {name: torch.as_tensor(row[name]) for name in COLUMNS if name in row}
            | {"attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.long)}
            for row in rows
        ]
        return self._padded(tensors)

    def by_length(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Regroup the rows of several batches by length to reduce padding; number and sizes of the batches stay the same.

        Args:
            batches: the batches of one optimizer step. Its gradient is a mean over all rows, so grouping does not change it.
        """
        lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).tolist()  # the only GPU synchronisation
        rows = [
            {name: tensor[place] for name, tensor in batch.items()}
            for batch in batches
            for place in range(len(batch["labels"]))
        ]
        cut = [
            {name: tensor[:length] if tensor.dim() else tensor for name, tensor in row.items()}
            for row, length in zip(rows, lengths, strict=True)
        ]
        order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
        dealt, start = [], 0
        for batch in batches:
            chosen = order[start : start + len(batch["labels"])]
            start += len(chosen)
            dealt.append(self._padded([cut[k] for k in chosen]))
        return dealt

    def _padded(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad sequences, and stack columns that have one value per row."""
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED, "source_rank": -1}
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fillers[name])
            if name in fillers
            else torch.stack([row[name] for row in rows])
            for name in rows[0]
        }
