"""Score models on MMLU, GSM8K, HumanEval and MBPP with the lm-evaluation-harness: zero-shot, greedy, with BOS.

The tasks are the harness's. :mod:`hf_semalign.experiments.benchmarks.problems` and
:mod:`hf_semalign.experiments.benchmarks.models` list the differences. The harness is an optional dependency:
``pip install hf_semalign[eval]``.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hf_semalign.cache.source import weights_identity
from hf_semalign.errors import InputError
from hf_semalign.experiments.benchmarks.models import Opened, find_adapter, open_model
from hf_semalign.experiments.benchmarks.problems import BENCHMARK_METRICS, CODE, build_task, find_rows
from hf_semalign.experiments.benchmarks.sandbox import run_program
from hf_semalign.files import digest, file_digest, make_folder, read_json, write_text
from hf_semalign.hub.loading import find_target
from hf_semalign.hub.reading import BenchmarksFile, read_record
from hf_semalign.models.names import public_name, resolve_model

logger = logging.getLogger(__name__)
BACKENDS = ("hf", "vllm")
BENCHMARKS_NAME = "benchmarks.json"
RESULT_KEY = {"task", "limit", "chat_template", "backend"}  # a new result replaces an old one with the same values


def run_benchmark(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    *,
    files: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    backend: str = "hf",
    target: str | Path | None = None,
    answers: str | Path | None = None,
) -> dict[str, Any]:
    """Score a model on a benchmark.

    Args:
        model: a causal LM with or without an adapter (its training mode is restored); the name of a run folder, of an adapter
            on the Hub or of a model; or your own ``lm_eval.api.model.LM``.
        tokenizer: tokenizer of a model in memory. A model given by name has its own by default, and always with vLLM.
        task: ``mmlu``, ``gsm8k``, ``humaneval`` or ``mbpp``.
        files: local file with the test rows, or a folder that contains it, see
            :data:`hf_semalign.experiments.benchmarks.problems.PLACES`. By default the rows come from the Hub.
        limit: use only the first rows. For MMLU, the first rows of each subject.
        batch_size: prompts per batch. By default as many as fit into memory, at most 64 on a CPU and 256 on a GPU (16 for
            MMLU). vLLM ignores it.
        chat_template: whether to send each prompt as a user message of the tokenizer's chat template.
        backend: ``hf``, or ``vllm`` for a model given by name.
        target: Hub id or folder of an adapter's target, if its record only has the name of a folder.
        answers: JSON-lines file in which the backend ``hf`` saves each batch of answers, so that an interrupted call resumes.
            Use one file per model.

    Returns:
        A dict of plain values:

        - ``task``, ``metric``, ``value`` (a share from 0 to 1), ``stderr`` (``None`` for a single row) and ``rows``;
        - ``subjects`` (MMLU only): value by subject;
        - ``outcomes`` (other tasks): 1 or 0 for each test row, to compare two models problem by problem;
        - ``limit``, ``num_fewshot``, ``chat_template`` and ``backend``;
        - ``add_bos_token`` and ``bos_token``: the token that starts every prompt, or ``None``;
        - ``truncated``: number of prompts that lost their beginning, including BOS, because they exceed the model's context;
        - ``dtype``: dtype of the weights during generation, ``None`` with vLLM;
        - ``harness``, ``task_version`` and ``data`` (a Hub id, or the name of the file or folder).

        Your own LM builds its prompts, so ``add_bos_token``, ``bos_token``, ``truncated`` and ``dtype`` are ``None`` for it.

    Raises:
        ValueError: before anything is generated, if the task or backend is unknown; the harness, vLLM or the chat template is
            missing; running programs is not allowed; rows are malformed or missing; the model's context is too short; or the
            tokenizer has no EOS token or appends it to prompts.
        FileNotFoundError: a local file or the model does not exist.
    """
    path = check_benchmark(task, files=files, limit=limit, batch_size=batch_size, backend=backend)
    generator = random.getstate()  # the harness uses it, and training may continue afterwards
    try:
        built = build_task(task, path, chat_template)
        with open_model(model, tokenizer, batch_size, backend, target) as opened:
            if answers is not None:
                if opened.own or backend != "hf":
                    raise InputError("Only the backend hf saves answers: leave out answers.")
                opened.lm.answers = Path(answers)
            return _measure(opened, task, built, path, limit, chat_template)
    finally:
        random.setstate(generator)


def evaluate_run(
    origin: str | Path,
    tasks: Sequence[str],
    *,
    target: str | Path | None = None,
    files: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    backend: str = "hf",
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Score a run folder, an adapter on the Hub or a model on benchmarks, and write ``benchmarks.json``.

    The file keeps results for other tasks and settings if they are from the same weights. Answers to an unfinished task are
    saved next to the file, so that an interrupted call resumes.

    Args:
        origin: name of the run folder, adapter or model.
        tasks: benchmarks, see :func:`run_benchmark`.
        target: see :func:`run_benchmark`. The same holds for the arguments below.
        files: local test rows.
        limit: use only the first rows.
        batch_size: prompts per batch.
        chat_template: whether to apply the chat template to prompts.
        backend: ``hf`` or ``vllm``.
        output: folder for the file, by default the run folder.

    Returns:
        The content of the file: ``model``, ``target`` and ``adapter_checksum`` (both ``None`` for a model without an adapter),
        and ``benchmarks``, a list of what :func:`run_benchmark` returns.

    Raises:
        ValueError: see :func:`run_benchmark`, or ``output`` is missing for something other than a run folder.
        FileNotFoundError: see :func:`run_benchmark`.
    """
    origin = str(origin)
    adapter = find_adapter(origin)
    if output is None and (adapter is None or not Path(origin).is_dir()):
        raise InputError(f"{origin!r} is not a run folder: pass output, the folder for {BENCHMARKS_NAME}.")
    folder = Path(output or origin)
    make_folder("output", folder)
    ready = {}
    for task in tasks:
        path = check_benchmark(task, files=files, limit=limit, batch_size=batch_size, backend=backend)
        ready[task] = (build_task(task, path, chat_template), path)
    record = {} if adapter is None else read_record(adapter)
    content: dict[str, Any] = {
        "model": public_name(origin),
        "target": None if adapter is None else public_name(str(target or record["target"])),
        "adapter_checksum": record.get("adapter_checksum"),
        "benchmarks": [],
    }
    place = folder / BENCHMARKS_NAME
    earlier = read_json(place, BenchmarksFile) if place.is_file() else content
    if all(earlier[key] == value for key, value in content.items() if key != "benchmarks"):
        content["benchmarks"] = earlier["benchmarks"]
    with open_model(origin, None, batch_size, backend, target) as opened:
        name = resolve_model(origin if adapter is None else find_target(record, target))
        base = weights_identity(name) if backend == "hf" else None
        for task, (built, path) in ready.items():
            facts = [base, record.get("adapter_checksum"), task, chat_template, version("lm_eval"), version("hf_semalign")]
            answers = folder / f"benchmark-{task}-{digest(facts)[:16]}.answers"
            if backend == "hf":
                opened.lm.answers = answers
            new = _measure(opened, task, built, path, limit, chat_template)
            kept = [old for old in content["benchmarks"] if any(old[key] != new[key] for key in RESULT_KEY)]
            content["benchmarks"] = [*kept, new]
            write_text(place, json.dumps(content, indent=2) + "\n")
            answers.unlink(missing_ok=True)
    return content


def benchmarks_table(content: dict[str, Any]) -> Table:
    """The results of :func:`evaluate_run` as a table for the terminal."""
    table = Table(title=f"Benchmarks of {content['model']}")
    for name in ("task", "value", "rows", "chat template", "BOS", "data"):
        table.add_column(name, justify="right" if name in ("value", "rows") else "left")
    for entry in content["benchmarks"]:
        error = "" if entry["stderr"] is None else f" ± {100 * entry['stderr']:.2f}"
        chat, bos = "yes" if entry["chat_template"] else "no", entry["bos_token"] or "none"
        table.add_row(entry["task"], f"{100 * entry['value']:.2f}{error} %", str(entry["rows"]), chat, bos, entry["data"])
    return table


def check_benchmark(
    task: str, *, files: str | Path | None = None, limit: int | None = None, batch_size: int | None = None, backend: str = "hf"
) -> Path | None:
    """Check the arguments of :func:`run_benchmark` without loading rows or a model.

    Args:
        task: see :func:`run_benchmark`. The same holds for the arguments below.
        files: local test rows.
        limit: use only the first rows.
        batch_size: prompts per batch.
        backend: ``hf`` or ``vllm``.

    Returns:
        The local file (for MMLU, the folder), or ``None`` if the rows come from the Hub.

    Raises:
        ValueError: see :func:`run_benchmark`.
        FileNotFoundError: the local file does not exist.
    """
    for what, given, known in (("task", task, BENCHMARK_METRICS), ("backend", backend, BACKENDS)):
        if given not in known:
            raise InputError(f"Unknown {what} {given!r}: expected one of {', '.join(known)}.")
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: expected 1 or more.")
    if find_spec("lm_eval") is None:
        raise InputError("Benchmarks need the lm-evaluation-harness: pip install 'hf_semalign[eval]'.")
    if backend == "vllm" and find_spec("vllm") is None:
        raise InputError("vLLM is not installed: run pip install vllm on a supported machine, or use the backend hf.")
    path = None if files is None else find_rows(task, Path(files))
    if task in CODE:
        run_program("")  # report a missing opt-in or sandbox before answers are generated
    return path


def rows_digest(task: str, files: Path) -> str:
    """Digest of a benchmark's local test rows. ``files`` is that of :func:`run_benchmark`."""
    path = find_rows(task, files)
    return digest([[one.name, file_digest(one)] for one in (sorted(path.iterdir()) if path.is_dir() else [path])])


def _measure(
    opened: Opened, task: str, built: Any, path: Path | None, limit: int | None, chat_template: bool
) -> dict[str, Any]:
    """Run a task, and return what :func:`run_benchmark` returns."""
    import lm_eval

    kwargs = {} if task == "mmlu" else dict(built.get_config("generation_kwargs"))
    room, bos = None, None
    if not opened.own:
        answer = kwargs.get("max_gen_toks", opened.lm.max_gen_toks) if kwargs else 0
        room = opened.lm.max_length - answer
        if room < 1:
            raise InputError(
                f"The model's context has {opened.lm.max_length} tokens, but {task} needs {answer} for an answer: choose a "
                "model with a longer context."
            )
        bos = _check_bos(opened.lm, chat_template)
    # simple_evaluate would also seed all generators, and run pip to list the installed packages.
    results: Any = lm_eval.evaluate(
        opened.lm, lm_eval.tasks.TaskManager(include_defaults=False).load([built]), limit=limit, log_samples=True,
        apply_chat_template=chat_template, confirm_run_unsafe_code=task in CODE,
    )  # fmt: skip
    metric, kind = BENCHMARK_METRICS[task].split(",")
    name = "mmlu" if task == "mmlu" else built.task_name
    parts = {part.task_name: part for part in ([built] if task != "mmlu" else built.get_all_tasks())}
    error = results["results"][name][f"{metric}_stderr,{kind}"]
    record = {
        "task": task,
        "metric": BENCHMARK_METRICS[task],
        "value": float(results["results"][name][BENCHMARK_METRICS[task]]),
        "stderr": float(error) if isinstance(error, float) and math.isfinite(error) else None,
        "rows": sum(results["n-samples"][part]["effective"] for part in parts),
        "limit": limit,
        "num_fewshot": 0,
        "chat_template": chat_template,
        "add_bos_token": None if opened.own else True,
        "bos_token": bos,
        "truncated": None,
        "backend": opened.backend,
        "dtype": None if room is None or opened.backend != "hf" else str(opened.lm.model.dtype).removeprefix("torch."),
        "harness": lm_eval.__version__,
        "task_version": str(results["versions"][name]),
        "data": next(iter(parts.values())).DATASET_PATH if path is None else path.name + "/" * path.is_dir(),
    }
    if task != "mmlu":
        rows = sorted((row for row in results["samples"][name] if row["filter"] == kind), key=lambda row: row["doc_id"])
        record["outcomes"] = "".join(str(int(row[metric])) for row in rows)
    else:
        record["subjects"] = {
            part.removeprefix("mmlu_"): float(results["results"][part][BENCHMARK_METRICS[task]]) for part in sorted(parts)
        }
    if room is not None:
        prompts = [row["arguments"][0][0] for part in parts for row in results["samples"][part] if row["filter"] == kind]
        record["truncated"] = sum(len(opened.lm.tok_encode(prompt)) > room for prompt in prompts)
        if record["truncated"]:
            logger.warning(
                "%s: %d of %d prompts lost their beginning, because they are longer than the %d tokens left in the context.",
                task, record["truncated"], len(prompts), room,
            )  # fmt: skip
    return record


def _check_bos(lm: Any, chat_template: bool) -> str | None:
    """Check that prompts start with BOS exactly once. Returns BOS, or ``None`` for a tokenizer without one."""
    tokenizer = lm.tokenizer
    if chat_template and tokenizer.chat_template is None:
        raise InputError("The tokenizer has no chat template: set one, or leave chat_template off.")
    text = lm.apply_chat_template([{"role": "user", "content": "a"}]) if chat_template else "a"
    ids = lm.tok_encode(text)
    if not chat_template and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
        raise InputError("The tokenizer appends EOS to prompts, which ends them: set its add_eos_token to False.")
    count = next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    if count > 1:
        raise InputError(f"Prompts begin with {count} BOS tokens: remove bos_token from the text of the chat template.")
    if count == 0 and tokenizer.bos_token is not None:
        raise InputError(f"The tokenizer does not put its BOS token {tokenizer.bos_token!r} before a prompt: configure it to.")
    return tokenizer.bos_token
