"""Rows of the public benchmarks and their training data, from the Hub or local files, and the overlap of two sets of rows."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from hf_semalign.errors import InputError
from hf_semalign.tokenization import normalise_prompt

LETTERS = "ABCD"
GRAM = 13  # words, as in the GPT-3 paper and the lm-evaluation-harness
WORST_LISTED = 5
Row = dict[str, Any]


def read_json_lines(path: Path) -> list[Row]:
    """Read a JSON-lines file, which may be compressed with gzip (``.gz``).

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object.
    """
    rows = []
    try:
        content = path.read_bytes()
        unpacked = gzip.decompress(content) if path.suffix == ".gz" else content
        text = unpacked.decode("utf-8-sig")  # some files start with a byte order mark
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): expected one JSON object per line.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: expected one JSON object per line, got {line[:60]!r}.") from error
    return rows


def read_mmlu_folder(folder: Path) -> list[Row]:
    """Read all ``<subject>_<split>.csv`` in a folder. Rows are question, A, B, C, D and answer letter, without a header.

    Raises:
        ValueError: there are no such files, or a row is malformed.
    """
    rows = []
    for table in sorted(folder.glob("*_*.csv")):
        subject = table.stem.rpartition("_")[0]
        with table.open(encoding="utf-8", newline="") as lines:
            for number, cells in enumerate(csv.reader(lines), start=1):
                if len(cells) != 6 or cells[5] not in tuple(LETTERS):
                    raise InputError(f"{table}, row {number} is {cells}: expected question, A, B, C, D, answer letter.")
                question, *choices, letter = cells
                answer = LETTERS.index(letter)
                rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    if not rows:
        raise InputError(f"No rows in {folder}: expected a folder of <subject>_<split>.csv files.")
    return rows


@dataclass(frozen=True)
class Table:
    """A data set and how to read it.

    Attributes:
        hub_id: data set on the Hub.
        config: configuration of the data set.
        columns: columns that every row must have.
        question: extracts a row's question, without the words that all prompts share.
        answer: extracts a row's answer.
        read: reads rows from a local path.
        task_ids: task ids of each split, for data sets with all splits in one local file.
    """

    hub_id: str
    config: str | None
    columns: tuple[str, ...]
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    read: Callable[[Path], list[Row]] = read_json_lines
    task_ids: dict[str, Container[int]] = field(default_factory=dict)

    def load(self, split: str, path: str | Path | None = None) -> list[Row]:
        """Load the rows of a split. A row without a ``task_id`` gets its number.

        Args:
            split: name of the split on the Hub.
            path: local file or folder to read instead of the Hub.

        Raises:
            ValueError: the rows cannot be read, or lack a column.
        """
        origin = f"{self.hub_id}, {split}" if path is None else str(path)
        if path is None:
            try:
                rows = datasets.load_dataset(self.hub_id, self.config, split=split).to_list()
            except OSError as error:
                raise InputError(f"{origin} cannot be read ({error}): set data.files to local files instead.") from error
        else:
            rows = self.read(Path(path))
        for number, row in enumerate(rows):
            missing = [column for column in self.columns if column not in row]
            if missing:
                raise InputError(
                    f"Row {number} of {origin} lacks the columns {missing}: it has {sorted(row)}. Rename them, or use the task"
                    " 'records' with your own prompts."
                )
        if split in self.task_ids:
            return [row for row in rows if row["task_id"] in self.task_ids[split]]
        return [{"task_id": number, **row} for number, row in enumerate(rows)]

    def item(self, row: Row) -> Item:
        """The question and the text of a row, to compare it with other rows."""
        return Item(row["task_id"], self.question(row), f"{self.question(row)}\n{self.answer(row)}")


GSM8K = Table(
    "openai/gsm8k", "main", ("question", "answer"),
    question=lambda row: row["question"],
    answer=lambda row: row["answer"],
)  # fmt: skip
MMLU = Table(
    "cais/mmlu", "all", ("question", "subject", "choices", "answer"),
    question=lambda row: "\n".join([row["question"], *row["choices"]]),
    answer=lambda row: "",
    read=read_mmlu_folder,
)  # fmt: skip
MBPP = Table(
    "google-research-datasets/mbpp", "full", ("task_id", "text", "code", "test_list"),
    question=lambda row: row["text"],
    answer=lambda row: row["code"],
    task_ids={"train": range(601, 975), "validation": range(511, 601), "test": range(11, 511)},
)  # fmt: skip
HUMANEVAL = Table(
    "openai/openai_humaneval", None, ("task_id", "prompt", "entry_point", "canonical_solution", "test"),
    question=lambda row: row["prompt"],
    answer=lambda row: row["canonical_solution"],
)  # fmt: skip
PAIRS = Table(
    "iamtarun/python_code_instructions_18k_alpaca", None, ("instruction", "output"),
    question=lambda row: "\n".join(part for part in (row["instruction"], row.get("input")) if part),
    answer=lambda row: row["output"],
)  # fmt: skip
TESTS: dict[str, Table] = {"mmlu": MMLU, "gsm8k": GSM8K, "humaneval": HUMANEVAL, "mbpp": MBPP}  # by benchmark; split test


@dataclass(frozen=True)
class Item:
    """The parts of a row that are compared with other rows.

    Attributes:
        task_id: name of the row in messages.
        question: rows are equal if their questions are, after :func:`hf_semalign.tokenization.normalise_prompt`.
        text: question and answer.
    """

    task_id: int | str
    question: str
    text: str

    def grams(self) -> list[tuple[str, ...]]:
        """All sequences of :data:`GRAM` consecutive words. A shorter text has none."""
        words = re.findall(r"\w+", normalise_prompt(self.text))
        return list(zip(*(words[start:] for start in range(GRAM)), strict=False))


@dataclass(frozen=True)
class Overlap:
    """The overlap between rows and a benchmark's test rows.

    Attributes:
        rows: number of rows.
        test_rows: number of test rows.
        exact: id pairs of a row and a test row that ask the same question.
        share: share, from 0 to 1, of rows that have 13 consecutive words in common with a test row.
        worst: up to five of these rows, each as its id, the id of the test row that shares most 13-grams with it, and the
            share of its 13-grams that occur in test rows.
    """

    rows: int
    test_rows: int
    exact: list[tuple[int | str, int | str]]
    share: float
    worst: list[tuple[int | str, int | str, float]]


def same_questions(items: Iterable[Item], tests: Iterable[Item]) -> dict[int | str, int | str]:
    """Map the id of each item that asks the same question as a test row to the id of the first such test row."""
    asked = {normalise_prompt(test.question): test.task_id for test in reversed(list(tests))}
    found = ((item.task_id, asked.get(normalise_prompt(item.question))) for item in items)
    return {name: test for name, test in found if test is not None}


def overlap(items: Sequence[Item], tests: Sequence[Item]) -> Overlap:
    """Compare rows with a benchmark's test rows. The time is linear in the size of both.

    Args:
        items: the rows.
        tests: the test rows.

    Raises:
        ValueError: there are no rows or no test rows.
    """
    if not items or not tests:
        raise InputError(f"Got {len(items)} rows and {len(tests)} test rows: expected at least one of each.")
    grams = [set(item.grams()) for item in items]
    wanted = set().union(*grams)
    seen: dict[tuple[str, ...], int] = {}
    for number, test in enumerate(tests):
        for gram in wanted.intersection(test.grams()):
            seen.setdefault(gram, number)
    shared = []
    for item, own in zip(items, grams, strict=True):
        if found := Counter(seen[gram] for gram in own if gram in seen):
            most = min(found, key=lambda number: (-found[number], number))
            shared.append((item.task_id, tests[most].task_id, found.total() / len(own)))
    worst = sorted(shared, key=lambda entry: -entry[2])[:WORST_LISTED]
    return Overlap(len(items), len(tests), list(same_questions(items, tests).items()), len(shared) / len(items), worst)
