"""Rows of the public benchmarks and of the data around them, from the Hub or local files; what two sets of rows share."""

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
GRAM = 13  # words, as in the papers of GPT-3 and of the harness
LISTED = 5
Row = dict[str, Any]


def read_json_lines(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, which may be packed with gzip (``.gz``).

    Raises:
        ValueError: it cannot be read, or a line is no object.
    """
    rows = []
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(
            "utf-8-sig"
        )  # some have a byte order mark
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): expected one JSON object a line.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: expected one JSON object a line, got {line[:60]!r}.") from error
    return rows


def read_mmlu_folder(folder: Path) -> list[Row]:
    """Rows of all ``<subject>_<split>.csv`` in a folder: question, A, B, C, D and the answer's letter, without a header.

    Raises:
        ValueError: there are none, or a row is malformed.
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
    """A data set of rows of one kind.

    Attributes:
        hub_id: data set on the Hub.
        config: its configuration.
        columns: what every row must have.
        question: what a row asks, without the words that all prompts share.
        answer: what it says to that.
        read: local path to rows.
        task_ids: of the rows of a split, where one local file holds those of all.
    """

    hub_id: str
    config: str | None
    columns: tuple[str, ...]
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    read: Callable[[Path], list[Row]] = read_json_lines
    task_ids: dict[str, Container[int]] = field(default_factory=dict)

    def load(self, split: str, path: str | Path | None = None) -> list[Row]:
        """Rows of a split, each with its ``task_id``: its own, or its number.

        Args:
            split: name on the Hub.
            path: local file or folder, instead of the Hub.

        Raises:
            ValueError: they cannot be read, or lack a column.
        """
        origin = f"{self.hub_id}, {split}" if path is None else str(path)
        if path is None:
            try:
                rows = datasets.load_dataset(self.hub_id, self.config, split=split).to_list()
            except OSError as error:
                raise InputError(f"{origin} cannot be read ({error}): name local files by data.files instead.") from error
        else:
            rows = self.read(Path(path))
        for number, row in enumerate(rows):
            missing = [column for column in self.columns if column not in row]
            if missing:
                raise InputError(
                    f"Row {number} of {origin} lacks the columns {missing}: it has {sorted(row)}. Rename them, or use task"
                    " 'records' with prompts of your own."
                )
        if split in self.task_ids:
            return [row for row in rows if row["task_id"] in self.task_ids[split]]
        return [{"task_id": number, **row} for number, row in enumerate(rows)]

    def item(self, row: Row) -> Item:
        """A row, to be compared with others."""
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
    """What of a row is compared with others.

    Attributes:
        task_id: its name in messages.
        question: rows of the same question, by :func:`hf_semalign.tokenization.normalise_prompt`, are the same.
        text: question and answer.
    """

    task_id: int | str
    question: str
    text: str

    def grams(self) -> list[tuple[str, ...]]:
        """All :data:`GRAM` words of the text that stand beside each other; none of a shorter one."""
        words = re.findall(r"\w+", normalise_prompt(self.text))
        return list(zip(*(words[start:] for start in range(GRAM)), strict=False))


@dataclass(frozen=True)
class Overlap:
    """What rows have in common with a benchmark's test rows.

    Attributes:
        rows: number of rows.
        test_rows: number of test rows.
        exact: ids of rows that ask what a test row asks, each with that of the test row.
        share: of the rows, those with 13 words in a row that also stand in a test row, in 0 to 1.
        worst: up to five of these: id, id of the test row that has most of it, and the share of its 13-grams in test rows.
    """

    rows: int
    test_rows: int
    exact: list[tuple[int | str, int | str]]
    share: float
    worst: list[tuple[int | str, int | str, float]]


def same_questions(items: Iterable[Item], tests: Iterable[Item]) -> dict[int | str, int | str]:
    """Ids of items that ask what a test row asks, each with the id of the first such test row."""
    asked = {normalise_prompt(test.question): test.task_id for test in reversed(list(tests))}
    found = ((item.task_id, asked.get(normalise_prompt(item.question))) for item in items)
    return {name: test for name, test in found if test is not None}


def overlap(items: Sequence[Item], tests: Sequence[Item]) -> Overlap:
    """Compare rows with a benchmark's test rows, in time linear in both.

    Args:
        items: the rows.
        tests: the test rows.

    Raises:
        ValueError: one of them is empty.
    """
    if not items or not tests:
        raise InputError(f"There are {len(items)} rows and {len(tests)} test rows: expected at least one of each.")
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
    worst = sorted(shared, key=lambda entry: -entry[2])[:LISTED]
    return Overlap(len(items), len(tests), list(same_questions(items, tests).items()), len(shared) / len(items), worst)
