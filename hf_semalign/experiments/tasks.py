"""Tasks: load the three splits of a task by name.

Prompts and answers follow the public data of LaTen (Tan et al., ACL 2025). Rows come from the Hub or from local files with
the same content. Two rows are equal if ``prompt_of`` gives the same prompt for both. Splits contain no row of the benchmark's
test set and no row that asks the same question, because the test set is only used for scoring
(:mod:`hf_semalign.experiments.benchmarks.harness`).
"""

from __future__ import annotations

import ast
import csv
import difflib
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.experiments.rows import (
    GSM8K,
    LETTERS,
    MBPP,
    MMLU,
    PAIRS,
    TESTS,
    Item,
    Overlap,
    Row,
    Table,
    overlap,
    read_json_lines,
    same_questions,
)  # fmt: skip
from hf_semalign.experiments.symbols import SKILLS, make_records
from hf_semalign.tokenization import check_text, form_of, prompt_of

logger = logging.getLogger(__name__)
Files = Mapping[str, str]


@dataclass(frozen=True)
class TaskData:
    """Records of the three splits, with ``messages``, or with ``prompt`` and ``completion``.

    Attributes:
        extract: rows for attribution.
        align: rows for training.
        eval: held-out rows.
        overlap: overlap of all three splits with the benchmark's test rows. It is ``None`` if the test rows are not available
            or the task is not a benchmark.
    """

    extract: list[Row]
    align: list[Row]
    eval: list[Row]
    overlap: Overlap | None = None


def load_task(
    task: str,
    *,
    extract: int,
    align: int,
    eval: int,
    files: Files | None = None,
    seed: int = 42,
    skills: Sequence[str] | None = None,
    prompts_only: bool = False,
) -> TaskData:
    """Load the three splits of a task, disjoint by normalised prompt.

    Args:
        task: one of :data:`TASKS`. ``symbols`` is generated, and ``records`` reads your own files.
        extract: rows of the extract split. For ``records`` with one file per split, this is an upper limit. The same holds for
            the other two splits.
        align: rows of the align split.
        eval: rows of the eval split.
        files: local paths by role, to use instead of the Hub. For a benchmark: ``train`` supplies all splits (for ``mbpp``,
            ``eval`` is selected by ``task_id``). The optional ``test`` holds the benchmark's test rows, which are excluded from
            the splits. Without ``test`` a warning is logged and nothing is excluded, except for ``mbpp``, where ``train`` may
            contain the test rows. For ``records``: either ``train``, from which all splits are drawn, or ``extract``,
            ``align`` and ``eval``, which supply their first rows.
        seed: seed of the splits. The same seed gives the same rows in the same order.
        skills: for ``symbols``, a subset of its skills. By default all.
        prompts_only: allow ``align`` rows of ``records`` without answers, because a model will write them.

    Returns:
        The records. The splits of ``records`` may overlap; ``check_disjoint`` checks them.

    Raises:
        ValueError: the task is unknown, a count is below 1, ``files`` has the wrong roles, or rows are malformed or too few.
        FileNotFoundError: a path in ``files`` does not exist.
    """
    counts = {"extract": extract, "align": align, "eval": eval}
    _check_task(task, counts, skills)
    if task == "symbols":
        _check_files(task, files, ())
        return _draw_symbols(counts, seed, skills or tuple(SKILLS))
    if task == "records":
        files = files or {}
        bare = {"align"} if prompts_only else set()
        if set(files) == {"train"}:
            _check_files(task, files, ("train",))
            rows = _draw_records(Path(files["train"]), counts, seed)
            return TaskData(rows["extract"], rows["align"], rows["eval"])
        _check_files(task, files, tuple(counts))
        rows = {split: _read_records(Path(files[split]), split not in bare)[:count] for split, count in counts.items()}
        return TaskData(rows["extract"], rows["align"], rows["eval"])
    _check_files(task, files, ("train",), optional=("test",))
    return _draw_benchmark(task, counts, files, seed)


def load_held_out(
    task: str, *, eval: int, files: Files | None = None, seed: int = 42, skills: Sequence[str] | None = None
) -> list[Row]:
    """Load only the eval split of a task, to measure forgetting on a task that is not transferred.

    Args:
        task: one of :data:`TASKS`.
        eval: number of rows. For ``records`` it is an upper limit.
        files: local paths by role, see :func:`load_task`. ``records`` takes only ``eval``.
        seed: seed of the split.
        skills: for ``symbols``, a subset of its skills.

    Raises:
        ValueError: see :func:`load_task`.
        FileNotFoundError: see :func:`load_task`.
    """
    counts = {"eval": eval}
    _check_task(task, counts, skills)
    if task == "symbols":
        _check_files(task, files, ())
        return make_records(eval, seed, skills=skills or tuple(SKILLS))
    if task == "records":
        _check_files(task, files or {}, ("eval",))
        return _read_records(Path((files or {})["eval"]))[:eval]
    _check_files(task, files, ("train",), optional=("test",))
    split = BENCHMARKS[task].eval or BENCHMARKS[task].train
    path = None if files is None else files["train"]
    rows = list(_usable_rows(task, split, path, _load_tests(task, files)).values())
    if len(rows) < eval:
        raise InputError(f"Task {task!r} has {len(rows)} rows for eval, but {eval} were requested: lower the count.")
    random.Random(seed).shuffle(rows)
    return [BENCHMARKS[task].render(row) for row in rows[:eval]]


def _check_task(task: str, counts: Mapping[str, int], skills: Sequence[str] | None) -> None:
    if task not in TASKS:
        nearest = "".join(f" Did you mean {name!r}?" for name in difflib.get_close_matches(task, TASKS, n=1))
        raise InputError(f"Unknown task {task!r}: expected one of {', '.join(TASKS)}.{nearest}")
    if min(counts.values()) < 1:
        raise InputError(f"Every split needs at least one row, got {dict(counts)}: raise the counts below 1.")
    if skills is not None and (task != "symbols" or isinstance(skills, str) or not skills or set(skills) - set(SKILLS)):
        raise InputError(
            f"skills of task {task!r} is {skills!r}: only symbols has skills, and expects a list with some of {list(SKILLS)}."
        )


def _check_files(task: str, files: Files | None, roles: Sequence[str], optional: Sequence[str] = ()) -> None:
    if files is not None and not (isinstance(files, Mapping) and set(roles) <= set(files) <= {*roles, *optional}):
        wanted = f"exactly {', '.join(roles)}" if roles else "none, so leave files out"
        wanted += ", or train alone (data.files.train=FILE)" if "align" in roles else ""
        wanted += "".join(f", and optionally {role}" for role in optional)
        given = sorted(files) if isinstance(files, Mapping) else files
        raise InputError(f"Task {task!r} got files for {given or 'nothing'}: expected {wanted}.")
    for role, path in (files or {}).items():
        if not Path(str(path)).exists():
            raise MissingFileError(f"Task {task!r}: {path} does not exist. Correct the path in data.files.{role}.")


def _draw_symbols(counts: Mapping[str, int], seed: int, skills: Sequence[str]) -> TaskData:
    splits: list[list[Row]] = []
    taken: set[str] = set()
    for index, count in enumerate(counts.values()):
        splits.append(make_records(count, len(counts) * seed + index, exclude=taken, skills=skills))
        taken |= {record["prompt"] for record in splits[-1]}
    extract, align, evaluation = splits
    return TaskData(extract, align, evaluation)


def _draw_records(path: Path, counts: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """Draw the splits from one file. Of rows with the same prompt, only the first is used."""
    distinct = {prompt_of(row): row for row in reversed(_read_records(path))}
    rows, wanted = list(reversed(distinct.values())), sum(counts.values())
    if len(rows) < wanted:
        raise InputError(
            f"{path} has {len(rows)} distinct prompts, but {wanted} were requested ({dict(counts)}): lower the counts."
        )
    random.Random(seed).shuffle(rows)
    drawn = iter(rows)
    return {split: [next(drawn) for _ in range(count)] for split, count in counts.items()}


def _draw_benchmark(task: str, counts: Mapping[str, int], files: Files | None, seed: int) -> TaskData:
    benchmark = BENCHMARKS[task]
    path = None if files is None else files["train"]
    tests = _load_tests(task, files)
    held_out = {} if benchmark.eval is None else _usable_rows(task, benchmark.eval, path, tests)
    usable = _usable_rows(task, benchmark.train, path, tests)
    train = [row for prompt, row in usable.items() if prompt not in held_out]
    own = list(held_out.values())
    first, last = counts["extract"], counts["extract"] + counts["align"]
    if benchmark.eval is None:
        pools = [("extract, align and eval", train, last + counts["eval"])]
    else:
        pools = [("extract and align", train, last), ("eval", own, counts["eval"])]
    for names, rows, wanted in pools:
        if len(rows) < wanted:
            raise InputError(
                f"Task {task!r} has {len(rows)} rows for {names}, but {wanted} were requested (rows with a repeated prompt or a"
                " prompt from eval or the benchmark's test rows are excluded): lower the counts, or pass larger files."
            )
        random.Random(seed).shuffle(rows)
    evaluation = (train[last:] if benchmark.eval is None else own)[: counts["eval"]]
    train = train[:last]
    return TaskData(
        extract=[benchmark.render(row) for row in train[:first]],
        align=[benchmark.render(row) for row in train[first:]],
        eval=[benchmark.render(row) for row in evaluation],
        overlap=_compare(task, [benchmark.table.item(row) for row in (*train, *evaluation)], tests),
    )


def _load_tests(task: str, files: Files | None) -> list[Item]:
    """Load the benchmark's test rows. Returns an empty list, and logs it, if the local files do not contain them."""
    table = TESTS[task]
    path = None if files is None else files.get("test", files["train"] if table is MBPP else None)
    tests = [] if files is not None and path is None else [table.item(row) for row in table.load("test", path)]
    if not tests:
        logger.warning("Task %r is not compared with the benchmark's test rows: set data.files.test to their file.", task)
    return tests


def _usable_rows(task: str, split: str, path: str | None, tests: list[Item]) -> dict[str, Row]:
    """Rows by prompt. Repeated prompts and rows that ask the same question as a test row are left out."""
    benchmark = BENCHMARKS[task]
    rows = benchmark.table.load(split, path)
    known = same_questions(map(benchmark.table.item, rows), tests)
    if known:
        shown = ", ".join(f"{row} = {test}" for row, test in known.items())
        logger.warning("Task %r: left out %d rows of %s that ask the same as a test row: %s.", task, len(known), split, shown)
    usable: dict[str, Row] = {}
    for row in rows:
        if row["task_id"] not in known:
            usable.setdefault(prompt_of(benchmark.render(row)), row)
    return usable


def _compare(task: str, items: list[Item], tests: list[Item]) -> Overlap | None:
    if not tests:
        return None
    found = overlap(items, tests)
    worst = ", ".join(f"{row} = {test} ({share:.0%})" for row, test, share in found.worst)
    logger.info(
        "Task %r: %.1f%% of %d rows have 13 consecutive words in common with one of %d test rows%s.",
        task, 100 * found.share, found.rows, found.test_rows, f"; largest overlaps (row = test row): {worst}" if worst else "",
    )  # fmt: skip
    return found


def _read_records(path: Path, with_answers: bool = True) -> list[Row]:
    formats = {".json": "json", ".parquet": "parquet"}
    if path.suffix == ".jsonl":
        rows = read_json_lines(path)
    elif path.suffix == ".csv":
        rows = _read_csv(path)
    elif path.suffix in formats:
        try:
            rows = datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train").to_list()
        except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
            raise InputError(f"{path} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error
    else:
        raise InputError(f"{path} ends in {path.suffix!r}: expected .jsonl, .json, .csv or .parquet.")
    if not rows:
        raise InputError(f"{path} has no rows: every split needs at least one.")
    wanted = ("prompt", "completion") if with_answers else ("prompt",)
    for number, row in enumerate(rows):
        if "messages" not in row and not set(wanted) <= row.keys():
            alone = ". With data.answers, a file for align alone may lack answers" if with_answers else ""
            raise InputError(
                f"Row {number} of {path} has columns {sorted(row)}: expected {' and '.join(wanted)}, or messages{alone}."
            )
        given = row if with_answers else {name: value for name, value in row.items() if value is not None}
        check_text(given, f"Row {number} of {path}")
        turns = row["messages"] if form_of(row) == "messages" else ()
        if with_answers and turns and all(turn["role"] != "assistant" for turn in turns):
            raise InputError(f"Row {number} of {path} has no assistant message: add an answer.")
    return rows


def _read_csv(path: Path) -> list[Row]:
    """Read a table with a header. Every cell is text, unlike in pandas, which reads NA as missing and 007 as 7."""
    csv.field_size_limit(2**31 - 1)  # the default is about 130,000 characters per cell
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows: list[Row] = list(csv.DictReader(lines, strict=True))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as csv: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"Row {number} of {path} has more or fewer cells than the header: quote cells that have a comma.")
    return [{name: cell or None for name, cell in row.items()} for row in rows]  # empty cells are missing values


def _chat(user: str, assistant: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _fence(code: str) -> str:
    lines = code.replace("\r\n", "\n").rstrip()
    return f"```python\n{lines}\n```"


def _render_gsm8k(row: Row) -> Row:
    rationale, mark, answer = re.sub(r"<<[^<>]*>>", "", row["answer"]).rpartition("####")
    if not mark:
        raise InputError(f"Expected a GSM8K answer that ends with a line '#### N', got {row['answer']!r}.")
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
    """The imports of a reference solution, and the signature of the function that the tests call first."""
    try:
        body = ast.parse(code).body
        nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    except SyntaxError as error:
        raise InputError(f"Expected Python code and tests, but {code!r} or its tests have a syntax error: {error}.") from error
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    name = next((name for name in called if name in functions), None)
    if name is None:
        raise InputError(f"Expected tests that call one of the functions {list(functions)}, but they call {called}: {code!r}.")
    imports = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join([*imports, f"def {name}({ast.unparse(functions[name].args)})"])


def _render_instruction(row: Row) -> Row:
    user = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    answer = row["output"]  # some are already prose with a fenced code block
    return _chat(user, answer if "```" in answer else _fence(answer))


@dataclass(frozen=True)
class Benchmark:
    """Where the splits of a benchmark's task come from, and how to convert rows to records.

    Attributes:
        table: the rows.
        train: split from which extract and align are drawn.
        render: converts a row to a record.
        eval: split from which eval is drawn, by default ``train``.
    """

    table: Table
    train: str
    render: Callable[[Row], Row]
    eval: str | None = None

    @property
    def hub_id(self) -> str:
        """The data set on the Hub."""
        return self.table.hub_id


# HumanEval has only test rows, so its splits come from instruction pairs.
BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(GSM8K, "train", _render_gsm8k),
    "mmlu": Benchmark(MMLU, "dev+validation", _render_mmlu),
    "humaneval": Benchmark(PAIRS, "train", _render_instruction),
    "mbpp": Benchmark(MBPP, "train", _render_mbpp, eval="validation"),
}
TASKS: tuple[str, ...] = ("symbols", *BENCHMARKS, "records")
