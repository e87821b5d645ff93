"""MMLU, GSM8K, HumanEval and MBPP as tasks of the lm-evaluation-harness, and what scores programs.

Prompts, stop words and metrics are the harness's, and so is the data set on the Hub. What differs, and why:

- All four may read local files, in the formats that their authors publish (:data:`PLACES`), through this package's readers.
- None has examples. Of ``gsm8k`` the value is the flexible match then, because a model that was shown no example does not
  write ``####``.
- ``humaneval`` and ``mbpp`` (``data/tasks/*.yaml``) run programs by
  :func:`hf_semalign.experiments.benchmarks.sandbox.run_program`: the harness's own scorer is downloaded. ``humaneval`` is the
  harness's otherwise. With a chat template it is ``humaneval_instruct``, whose
  answers end at the closing fence; the harness's other stops apply when they are scored.
- ``mbpp`` has three examples by default, and nothing else tells a model how code ends. Here the prompt is that of
  ``mbpp_instruct``, which opens a code fence; what is run ends at the next fence, or with the answer.
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

METRICS = {
    "mmlu": "acc,none",
    "gsm8k": "exact_match,flexible-extract",
    "humaneval": "pass@1,create_test",
    "mbpp": "pass_at_1,extract_code",
}
CODE = ("humaneval", "mbpp")
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# Local files, by the names that their authors gave them: in the folder that is named, or in a folder of the task's name there.
PLACES = {
    "mmlu": ("*_test.csv", "test/*_test.csv"),
    "gsm8k": ("test.jsonl",),
    "humaneval": ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
    "mbpp": ("mbpp.jsonl",),
}
CONFIGS = Path(__file__).parents[2] / "data" / "tasks"


def find_rows(task: str, given: Path) -> Path:
    """The file of a benchmark's test rows, of MMLU the folder, from itself or a folder that holds it.

    Raises:
        FileNotFoundError: there is none.
    """
    if given.is_file() and task != "mmlu":
        return given
    for folder in (given, given / task):
        for pattern in PLACES[task]:
            for found in sorted(folder.glob(pattern)):
                return found.parent if task == "mmlu" else found
    places = " or ".join(PLACES[task])
    raise MissingFileError(
        f"No test rows of {task} at {given}: name the file, or a folder with {places}, or with {task}/ that has."
    )


def build_task(task: str, path: Path | None, chat_template: bool) -> Any:
    """The harness's task or, of MMLU, group.

    Args:
        task: one of ``METRICS``.
        path: see :func:`find_rows`; by default the rows are the Hub's.
        chat_template: whether prompts will be in a chat template.

    Raises:
        ValueError: malformed or missing rows.
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
    """Say what to do where the Hub's rows cannot be had."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The test rows of {task} cannot be read from the Hub ({error}): name local files instead, by --files, or in a "
            "recipe benchmark.files."
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
            f"MMLU has {len(subjects)} subjects, one <subject>_test.csv each, and {path} "
            f"{f'lacks {missing}' if missing else f'has {unknown} besides'}: copy the whole folder, and that alone."
        )
    return found


def _local(rows: list[Row]) -> dict[str, Any]:
    """What makes a task read rows; splits that only examples would come from are empty."""
    tables = {"test": Dataset.from_list(rows), "train": [], "dev": []}
    return {"custom_dataset": lambda **_: tables}


def _own_config(task: str, chat_template: bool) -> dict[str, Any]:
    """One of our own configurations, with what scores it: a filter from answers to whether programs pass, and their mean."""
    assemble, name = mbpp_program, task
    if task == "humaneval":
        assemble, name = (humaneval_chat_program, "humaneval_chat") if chat_template else (humaneval_program, task)
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    metric, kind = METRICS[task].split(",")

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
    """A HumanEval prompt, continued by an answer, and its tests."""
    return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"


def humaneval_chat_program(row: Row, answer: str) -> str:
    """The same with an answer inside the code fence that its prompt has opened, or one that opens a fence of its own.

    A continuation ends where the harness stops it. In a fence of its own an answer repeats the function, and such a stop would
    leave nothing of it.
    """
    code = _fenced(answer)
    return humaneval_program(row, code if _opens_fence(answer) else _until(code, HUMANEVAL_STOPS))


def mbpp_program(row: Row, answer: str) -> str:
    """The code of an answer that may open a fence once more, up to the fence that closes it, and the row's tests.

    What is set up for the tests uses what the code defines (367 is the one such test row), which the harness leaves out.
    """
    return "\n".join([_fenced(answer), row.get("test_setup_code", ""), *row["test_list"]])


def _opens_fence(answer: str) -> bool:
    return answer.lstrip().startswith("```")


def _fenced(answer: str) -> str:
    """The code of an answer inside an open fence, up to the fence that closes it."""
    return (answer.lstrip().partition("\n")[2] if _opens_fence(answer) else answer).partition("```")[0]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=None)]


def run_programs(programs: Sequence[str]) -> list[bool]:
    """Whether programs pass, as many at a time as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [outcome.passed for outcome in pool.map(run_program, programs)]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the harness says of each of 57 tasks that read rows of ours, and of a model in memory."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
