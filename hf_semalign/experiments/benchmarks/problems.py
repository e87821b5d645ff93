"""MMLU, GSM8K, HumanEval and MBPP as tasks of the lm-evaluation-harness, and the scoring of programs.

Prompts, stop words, metrics and the data sets on the Hub are the harness's. The differences are:

- All four tasks can read local files in the format of their authors (:data:`PLACES`), with this package's readers.
- No task has few-shot examples. The value of ``gsm8k`` is therefore the flexible match, because a model that sees no example
  does not write ``####``.
- ``humaneval`` and ``mbpp`` (``data/tasks/*.yaml``) run programs with
  :func:`hf_semalign.experiments.benchmarks.sandbox.run_program`, because the harness downloads its scorer. Otherwise
  ``humaneval`` is the harness's task. With a chat template it is ``humaneval_instruct``. Its answers end at the closing fence,
  and the harness's other stop words apply when they are scored.
- The harness's ``mbpp`` has three examples, and without them a model does not know where code ends. Here the prompt is that of
  ``mbpp_instruct``, which opens a code fence. The program ends at the next fence or at the end of the answer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.experiments.benchmarks.sandbox import run_program
from hf_semalign.experiments.rows import TESTS, Row

BENCHMARK_METRICS = {
    "mmlu": "acc,none",
    "gsm8k": "exact_match,flexible-extract",
    "humaneval": "pass@1,create_test",
    "mbpp": "pass_at_1,extract_code",
}
CODE = ("humaneval", "mbpp")
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# Names of the authors' files. They are looked up in the given folder, and in a folder there with the task's name.
PLACES = {
    "mmlu": ("*_test.csv", "test/*_test.csv"),
    "gsm8k": ("test.jsonl",),
    "humaneval": ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
    "mbpp": ("mbpp.jsonl",),
}
CONFIGS = Path(__file__).parents[2] / "data" / "tasks"


def find_rows(task: str, given: Path) -> Path:
    """Find the file (for MMLU, the folder) with a benchmark's test rows.

    Args:
        task: the benchmark.
        given: the file itself, or a folder that contains it.

    Raises:
        FileNotFoundError: there are no test rows at ``given``.
    """
    if given.is_file() and task != "mmlu":
        return given
    for folder in (given, given / task):
        for pattern in PLACES[task]:
            for found in sorted(folder.glob(pattern)):
                return found.parent if task == "mmlu" else found
    places = " or ".join(PLACES[task])
    raise MissingFileError(
        f"No test rows of {task} at {given}: pass the file, or a folder with {places}, directly or in {task}/."
    )


def build_task(task: str, path: Path | None, chat_template: bool) -> Any:
    """Build the harness's task, or for MMLU its group of tasks.

    Args:
        task: a key of ``BENCHMARK_METRICS``.
        path: local rows, see :func:`find_rows`. ``None`` reads the rows from the Hub.
        chat_template: whether prompts will use a chat template.

    Raises:
        ValueError: the rows are malformed or missing.
    """
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask

    rows = None if path is None else TESTS[task].load("test", path)
    if rows is not None and not rows:
        raise InputError(f"{path} has no test rows of {task}.")
    with quiet(), _hub_rows(task) if rows is None else nullcontext():
        if task != "mmlu":
            config = _stock()[task] if task == "gsm8k" else _own_config(task, chat_template)
            local = {} if rows is None else _local(rows)
            return ConfigurableTask(config={**config, "num_fewshot": 0, **local})
        found = [config for config in _stock().values() if config.get("dataset_path") == TESTS["mmlu"].hub_id]
        configs = {config["dataset_name"]: config for config in found}
        by_subject = None if rows is None else _by_subject(rows, list(configs), path)
        group = Group.from_config({key: value for key, value in _stock()["mmlu"].items() if key != "task"})
        for subject, config in configs.items():
            local = {} if by_subject is None else _local(by_subject[subject])
            group.add(ConfigurableTask(config={**config, "num_fewshot": 0, **local}))
    return group


@contextmanager
def _hub_rows(task: str) -> Iterator[None]:
    """Explain what to do if the rows cannot be read from the Hub."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The test rows of {task} cannot be read from the Hub ({error}): pass local files with --files, or with "
            "benchmark.files in a recipe."
        ) from error


def _stock() -> dict[str, dict[str, Any]]:
    """The harness's own configurations of GSM8K and MMLU, by name."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / "gsm8k", root / "mmlu" / "default"])
    entries = {name: dict(entry.cfg or {}) for name, entry in manager.task_index.items()}
    return {name: {key: value for key, value in config.items() if key != "tag"} for name, config in entries.items()}


def _by_subject(rows: list[Row], subjects: list[str], path: Path | None) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {subject: [] for subject in subjects}
    for row in rows:
        found.setdefault(row["subject"], []).append(row)
    missing, unknown = [name for name in subjects if not found[name]], sorted(found.keys() - set(subjects))
    if missing or unknown:
        raise InputError(
            f"MMLU has {len(subjects)} subjects with one <subject>_test.csv each, but {path} "
            f"{f'lacks {missing}' if missing else f'also has {unknown}'}: copy the whole folder, without other files."
        )
    return found


def _local(rows: list[Row]) -> dict[str, Any]:
    """Settings that make a task read these rows. The splits for few-shot examples are empty."""
    tables = {"test": Dataset.from_list(rows), "train": [], "dev": []}
    return {"custom_dataset": lambda **_: tables}


def _own_config(task: str, chat_template: bool) -> dict[str, Any]:
    """One of this package's configurations, scored by the share of programs that pass."""
    assemble, name = mbpp_program, task
    if task == "humaneval":
        assemble, name = (humaneval_chat_program, "humaneval_chat") if chat_template else (humaneval_program, task)
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    metric, kind = BENCHMARK_METRICS[task].split(",")

    def judge(answers: Sequence[list[str]], rows: Sequence[Row]) -> list[list[bool]]:
        return [
            [passed] for passed in run_programs([assemble(row, answer) for row, (answer,) in zip(rows, answers, strict=True)])
        ]

    return {
        **config,
        "filter_list": [{"name": kind, "filter": [{"function": "custom", "filter_fn": judge}]}],
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "process_results": lambda _, results: {metric: float(results[0][0])},
    }


def humaneval_program(row: Row, answer: str) -> str:
    """A HumanEval prompt followed by the answer and the tests."""
    return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"


def humaneval_chat_program(row: Row, answer: str) -> str:
    """The same for an answer inside the prompt's code fence, or in a fence that the answer opens.

    Inside the prompt's fence, the answer ends at the harness's stop words. An answer with its own fence repeats the function,
    so the stop words would remove all of it.
    """
    code = _fenced(answer)
    return humaneval_program(row, code if _opens_fence(answer) else _until(code, HUMANEVAL_STOPS))


def mbpp_program(row: Row, answer: str) -> str:
    """The code of an answer up to the closing fence, and the row's tests. The answer may open the fence again.

    The setup code of the tests, which the harness leaves out, comes last because it uses the answer's code (only in row 367).
    """
    return "\n".join([_fenced(answer), row.get("test_setup_code", ""), *row["test_list"]])


def _opens_fence(answer: str) -> bool:
    return answer.lstrip().startswith("```")


def _fenced(answer: str) -> str:
    """The code of an answer up to the closing fence. The answer may open the fence again."""
    return (answer.lstrip().partition("\n")[2] if _opens_fence(answer) else answer).partition("```")[0]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=None)]


def run_programs(programs: Sequence[str]) -> list[bool]:
    """Run programs in parallel, one per processor. Returns whether each passed."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [outcome.passed for outcome in pool.map(run_program, programs)]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's messages about each of the 57 MMLU tasks with custom rows, and about a model in memory."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
