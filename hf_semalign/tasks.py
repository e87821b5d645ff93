"""Tasks: a task name to the records of its three splits.

Prompts and answers follow the public data of LaTen (Tan et al., ACL 2025). Rows come from the Hub, or from local files
of the same content; two rows are the same when ``prompt_of`` reads the same prompt in both.
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_semalign.splits import check_text, prompt_of
from hf_semalign.symbols import SKILLS, make_records

LETTERS = "ABCD"
Row = dict[str, Any]
Files = Mapping[str, str]


@dataclass(frozen=True)
class TaskData:
    """Records of the three splits, with ``messages``, or with ``prompt`` and ``completion``.

    Attributes:
        extract: for attribution only.
        align: for training only.
        eval: seen by neither.
    """

    extract: list[Row]
    align: list[Row]
    eval: list[Row]


def load_task(
    task: str,
    *,
    extract: int,
    align: int,
    eval: int,
    files: Files | None = None,
    seed: int = 42,
    skills: Sequence[str] | None = None,
) -> TaskData:
    """Load the three splits of a task, disjoint by normalised prompt.

    Args:
        task: one of :data:`TASKS`; ``symbols`` is made on the spot, ``records`` reads the user's own files.
        extract: rows of the extract split; for ``records`` an upper limit, as are the next two.
        align: rows of the align split.
        eval: rows of the eval split.
        files: local path by role, instead of the Hub: ``train`` and ``eval``; for ``humaneval`` only ``train``, whose
            tail is held out; for ``records`` ``extract``, ``align`` and ``eval``, of which the first rows are kept.
        seed: seed of the draw; the same seed gives the same rows in the same order.
        skills: of ``symbols``, some of its skills; by default all.

    Returns:
        The records. Those of ``records`` are not compared with each other here: ``check_disjoint`` does that.

    Raises:
        ValueError: unknown task, count below 1, wrong roles in ``files``, malformed rows, or too few of them.
        FileNotFoundError: a path of ``files`` that is not there.
    """
    counts = {"extract": extract, "align": align, "eval": eval}
    _check_task(task, counts, skills)
    if task == "symbols":
        _check_files(task, files, ())
        return _draw_symbols(counts, seed, skills or tuple(SKILLS))
    if task == "records":
        files = files or {}
        _check_files(task, files, tuple(counts))
        return TaskData(**{split: _read_records(Path(files[split]))[:count] for split, count in counts.items()})
    _check_files(task, files, tuple(BENCHMARKS[task].splits))
    return _draw_benchmark(task, counts, files, seed)


def load_held_out(
    task: str, *, eval: int, files: Files | None = None, seed: int = 42, skills: Sequence[str] | None = None
) -> list[Row]:
    """Rows of a task's eval split alone: of one that is not transferred, to see what the target forgets.

    Args:
        task: one of :data:`TASKS`.
        eval: number of rows; for ``records`` an upper limit.
        files: local path by role, instead of the Hub, see :func:`load_task`; of ``records`` only ``eval``.
        seed: seed of the draw.
        skills: of ``symbols``, some of its skills.

    Raises:
        ValueError: as :func:`load_task`.
        FileNotFoundError: likewise.
    """
    counts = {"eval": eval}
    _check_task(task, counts, skills)
    if task == "symbols":
        _check_files(task, files, ())
        return make_records(eval, seed, skills=skills or tuple(SKILLS))
    if task == "records":
        _check_files(task, files or {}, ("eval",))
        return _read_records(Path((files or {})["eval"]))[:eval]
    _check_files(task, files, tuple(BENCHMARKS[task].splits))
    role = "eval" if "eval" in BENCHMARKS[task].splits else "train"
    rows = list(_load_records(task, role, files).values())
    if len(rows) < eval:
        raise ValueError(f"Task {task!r} has {len(rows)} rows for eval, but {eval} were asked for: lower the count.")
    random.Random(seed).shuffle(rows)
    return rows[:eval]


def _check_task(task: str, counts: Mapping[str, int], skills: Sequence[str] | None) -> None:
    if task not in TASKS:
        nearest = "".join(f" Did you mean {name!r}?" for name in difflib.get_close_matches(task, TASKS, n=1))
        raise ValueError(f"Unknown task {task!r}: expected one of {', '.join(TASKS)}.{nearest}")
    if min(counts.values()) < 1:
        raise ValueError(f"Every split needs at least one row, got {dict(counts)}: raise the counts below 1.")
    if skills is not None and (task != "symbols" or isinstance(skills, str) or not skills or set(skills) - set(SKILLS)):
        raise ValueError(
            f"skills of task {task!r} are {skills!r}: only symbols has any, and they are a list of {list(SKILLS)}."
        )


def _check_files(task: str, files: Files | None, roles: Sequence[str]) -> None:
    if files is not None and not (isinstance(files, Mapping) and set(files) == set(roles)):
        wanted = f"exactly {', '.join(roles)}" if roles else "none, so leave files out"
        given = sorted(files) if isinstance(files, Mapping) else files
        raise ValueError(f"Task {task!r} got files for {given}; the roles that it reads are {wanted}.")
    for role, path in (files or {}).items():
        if not Path(str(path)).exists():
            raise FileNotFoundError(f"Task {task!r}: {path} does not exist; correct the path of the {role!r} files.")


def _draw_symbols(counts: Mapping[str, int], seed: int, skills: Sequence[str]) -> TaskData:
    splits: dict[str, list[Row]] = {}
    taken: set[str] = set()
    for index, (split, count) in enumerate(counts.items()):
        splits[split] = make_records(count, len(counts) * seed + index, exclude=taken, skills=skills)
        taken |= {record["prompt"] for record in splits[split]}
    return TaskData(**splits)


def _draw_benchmark(task: str, counts: Mapping[str, int], files: Files | None, seed: int) -> TaskData:
    pools = {role: _load_records(task, role, files) for role in BENCHMARKS[task].splits}
    if "eval" not in pools:
        pool = list(pools["train"].items())
        pools = {"train": dict(pool[: -counts["eval"]]), "eval": dict(pool[-counts["eval"] :])}
    train = [record for prompt, record in pools["train"].items() if prompt not in pools["eval"]]
    held_out = list(pools["eval"].values())
    first, last = counts["extract"], counts["extract"] + counts["align"]
    for names, rows, wanted in (("extract and align", train, last), ("eval", held_out, counts["eval"])):
        if len(rows) < wanted:
            raise ValueError(
                f"Task {task!r} has {len(rows)} rows for {names}, but {wanted} were asked for (repeated prompts, and"
                " train prompts that are also in eval, do not count): lower the counts, or name larger files."
            )
        random.Random(seed).shuffle(rows)
    return TaskData(extract=train[:first], align=train[first:last], eval=held_out[: counts["eval"]])


def _load_records(task: str, role: str, files: Files | None) -> dict[str, Row]:
    benchmark = BENCHMARKS[task]
    if files is None:
        origin = f"{benchmark.hub_id}, {benchmark.splits[role]}"
        try:
            rows = datasets.load_dataset(benchmark.hub_id, benchmark.config, split=benchmark.splits[role]).to_list()
        except OSError as error:
            wanted = ", ".join(benchmark.splits)
            raise ValueError(f"Task {task!r} cannot be read ({error}): name local files for {wanted} by data.files.") from error
    else:
        origin = files[role]
        rows = benchmark.read(Path(origin))
    records: dict[str, Row] = {}
    for number, row in enumerate(rows):
        missing = [column for column in benchmark.columns if column not in row]
        if missing:
            raise ValueError(
                f"Row {number} of {origin} lacks the columns {missing}: it has {sorted(row)}. Rename them, or use task"
                " 'records' with prompts of your own."
            )
        if role not in benchmark.task_ids or row["task_id"] in benchmark.task_ids[role]:
            record = benchmark.render(row)
            records.setdefault(prompt_of(record), record)
    return records


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}): expected one JSON object a line.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected one JSON object a line, got {line[:60]!r}.") from error
    return rows


def _read_mmlu_folder(folder: Path) -> list[Row]:
    rows = []
    for table in sorted(folder.glob("*_*.csv")):
        subject = table.stem.rpartition("_")[0]
        with table.open(encoding="utf-8", newline="") as lines:
            for number, cells in enumerate(csv.reader(lines), start=1):
                if len(cells) != 6 or cells[5] not in tuple(LETTERS):
                    raise ValueError(f"{table}, row {number} is {cells}: expected question, A, B, C, D, answer letter.")
                question, *choices, letter = cells
                answer = LETTERS.index(letter)
                rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    if not rows:
        raise ValueError(f"No rows in {folder}: expected a folder of <subject>_<split>.csv files.")
    return rows


def _read_records(path: Path) -> list[Row]:
    formats = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix == ".jsonl":
        rows = _read_json_lines(path)
    elif path.suffix in formats:
        try:
            rows = datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train").to_list()
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}: expected .jsonl, {', '.join(formats)}.")
    if not rows:
        raise ValueError(f"{path} has no rows: every split needs at least one.")
    for number, row in enumerate(rows):
        if "messages" not in row and not {"prompt", "completion"} <= row.keys():
            raise ValueError(f"Row {number} of {path} has {sorted(row)}: expected prompt and completion, or messages.")
        check_text(row, f"Row {number} of {path}")
    return rows


def _chat(user: str, assistant: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _fence(code: str) -> str:
    lines = code.replace("\r\n", "\n").rstrip()
    return f"```python\n{lines}\n```"


def _render_gsm8k(row: Row) -> Row:
    rationale, mark, answer = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    if not mark:
        raise ValueError(f"Expected a GSM8K answer that ends in a line '#### N', got {row['answer']!r}.")
    rationale = rationale.strip().replace("\n", " ")
    stop = "" if rationale.endswith((".", "!", "?")) else "."
    user = f"Answer the following question.\n\nQuestion: {row['question']}"
    return _chat(user, f"Answer: {rationale}{stop} So the answer is {answer.strip()}.")


def _render_mmlu(row: Row) -> Row:
    subject = row["subject"].replace("_", " ")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {subject}."
    return _chat(f"{head}\n\n{row['question']}\n{options}\nAnswer:", f"The answer is: {LETTERS[row['answer']]}")


def _render_mbpp(row: Row) -> Row:
    user = f"Complete the following python function.\n\n\n{row['text']}\n{_header(row['code'], row['test_list'])}"
    return _chat(user, f"Here is the completed function:\n\n{_fence(row['code'])}")


def _header(code: str, tests: Sequence[str]) -> str:
    """The imports of a reference solution, and the signature of the first of its functions that the tests call."""
    try:
        body = ast.parse(code).body
        nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    except SyntaxError as error:
        raise ValueError(f"Expected Python code and tests, got {error} in {code!r} or in its tests.") from error
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    name = next((name for name in called if name in functions), None)
    if name is None:
        raise ValueError(f"Expected tests of one of the functions {list(functions)}, but they call {called}: {code!r}.")
    imports = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join([*imports, f"def {name}({ast.unparse(functions[name].args)})"])


def _render_instruction(row: Row) -> Row:
    user = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    answer = row["output"]  # some are prose around a fenced block already
    return _chat(user, answer if "```" in answer else _fence(answer))


@dataclass(frozen=True)
class Benchmark:
    """Where a task's rows come from, and how one becomes a record.

    Attributes:
        hub_id: data set on the Hub.
        config: its configuration.
        splits: its split by role; without ``eval``, the tail of ``train`` is held out.
        columns: what every row must have.
        render: row to record.
        read: local path to rows.
        task_ids: the rows of a role, where one table holds those of all.
    """

    hub_id: str
    config: str | None
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    render: Callable[[Row], Row]
    read: Callable[[Path], list[Row]] = _read_json_lines
    task_ids: Mapping[str, range] = field(default_factory=dict)


# HumanEval and the test ids of MBPP, 11 to 510, are for scoring alone: the instruction pairs stand in for the former.
BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        "openai/gsm8k", "main", {"train": "train", "eval": "test"}, ("question", "answer"), _render_gsm8k
    ),
    "mmlu": Benchmark(
        "cais/mmlu", "all", {"train": "dev+validation", "eval": "test"},
        ("question", "subject", "choices", "answer"), _render_mmlu, read=_read_mmlu_folder,
    ),
    "humaneval": Benchmark(
        "iamtarun/python_code_instructions_18k_alpaca", None, {"train": "train"},
        ("instruction", "output"), _render_instruction,
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp", "full", {"train": "train", "eval": "validation"},
        ("task_id", "text", "code", "test_list"), _render_mbpp,
        task_ids={"train": range(601, 975), "eval": range(511, 601)},
    ),
}  # fmt: skip
TASKS: tuple[str, ...] = ("symbols", *BENCHMARKS, "records")
