"""Benchmarks by the lm-evaluation-harness: MMLU, GSM8K, HumanEval and MBPP, zero-shot, greedy, with BOS.

Tasks are the harness's, but for what :mod:`hf_semalign.experiments.benchmarks.problems` says. Of its models differs that

- answers are made by :mod:`hf_semalign.experiments.generation`, where sequences that have ended leave their batch, and a
  ``generation_config`` is set aside: some, such as Qwen2.5's, penalise repetition, which is not greedy;
- a tokenizer's BOS stands before every prompt once, with a chat template as without, and also where the tokenizer puts none
  there by itself, as vLLM is told too. One that has no BOS gets none; the record says which it is.

The harness is an extra: ``pip install hf_semalign[eval]``.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from peft import PeftModel
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_semalign.cache.source import weights_identity
from hf_semalign.errors import InputError
from hf_semalign.experiments.answers import read_entries
from hf_semalign.experiments.benchmarks.problems import CODE, METRICS, build_task, find_rows, quiet
from hf_semalign.experiments.benchmarks.sandbox import run_program
from hf_semalign.experiments.generation import (
    computing_in,
    continue_prompts,
    end_tokens,
    fastest_dtype,
    generating,
    rows_that_fit,
)
from hf_semalign.files import RECORD_NAME, digest, file_digest, make_folder, read_json, write_text
from hf_semalign.hub.push import find_folder, find_target, load_transfer
from hf_semalign.hub.reading import Benchmarks, check_adapter, read_adapter_config, read_record
from hf_semalign.models.anatomy import CausalLM
from hf_semalign.models.loading import find_tokenizer, load_weights, unknown_words_explained
from hf_semalign.models.names import public_name, resolve_model

logger = logging.getLogger(__name__)
TASKS = tuple(METRICS)
BACKENDS = ("hf", "vllm")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
RESULTS_NAME = "benchmarks.json"
CHOICE_ROWS = 16  # rows at a time where choices are compared, which takes the logits of all their tokens
SETTINGS = {"task", "limit", "chat_template", "backend"}  # of a result; a new one takes the place of one that has the same


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
    """Measure a model on a benchmark.

    Args:
        model: a causal LM, bare or with an adapter, whose mode is restored; the name of a run folder, of an adapter on the Hub,
            or of a model; or an ``lm_eval.api.model.LM`` of one's own.
        tokenizer: of a model in memory; by default, and for vLLM always, the one that lies with a model given by name.
        task: one of :data:`TASKS`.
        files: local file of the test rows, or a folder that holds it, see
            :data:`hf_semalign.experiments.benchmarks.problems.PLACES`; by default the rows are the Hub's.
        limit: first rows only; of MMLU the first of each subject.
        batch_size: prompts at a time; by default as many as fit into memory, at most 64 on a CPU and 256 on a GPU (of MMLU
            16). vLLM decides itself.
        chat_template: whether a prompt is the user's turn in the tokenizer's chat template.
        backend: ``hf``, or ``vllm``, for a model given by name.
        target: of an adapter whose record knows only a folder's name: a Hub id or folder.
        answers: a file of JSON lines that keeps answers as their batches come, so that an interrupted call resumes; with the
            backend ``hf``. The caller makes sure that another model has another file.

    Returns:
        Plain values: ``task``, ``metric``, ``value`` (share in 0 to 1), ``stderr`` (``None`` of a single row), ``rows``,
        ``subjects`` (of MMLU: value by subject), ``outcomes`` (of the others: 1 or 0 for each test row, so that two models can
        be compared problem by problem), ``limit``, ``num_fewshot``, ``chat_template``, ``add_bos_token``, ``bos_token`` (what
        every prompt begins with, or ``None``), ``truncated`` (prompts that lost their beginning, BOS included, because the
        model reads no more), ``backend``, ``dtype`` (of the weights while the model answered; ``None`` under vLLM),
        ``harness``, ``task_version`` and ``data`` (Hub id, or name of the file or folder). An LM of one's own sees to its
        prompts itself: ``add_bos_token``, ``bos_token``, ``truncated`` and ``dtype`` are ``None`` then.

    Raises:
        ValueError: before anything is generated: an unknown task or backend, no harness, no vLLM, no chat template, no opt-in
            to run programs, malformed or missing rows, a model that reads too few tokens, or a tokenizer without EOS, or one
            that puts it behind a prompt.
        FileNotFoundError: no local file, or no such model.
    """
    path = check_benchmark(task, files=files, limit=limit, batch_size=batch_size, backend=backend)
    generator = random.getstate()  # the harness draws from it, and a training run may go on after this
    try:
        built = build_task(task, path, chat_template)
        with _opened(model, tokenizer, batch_size, backend, target) as opened:
            if answers is not None:
                if opened.own or backend != "hf":
                    raise InputError("Answers are kept with the backend hf alone: leave answers out.")
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
    """Measure a run folder, an adapter on the Hub, or a model, on benchmarks, and write ``benchmarks.json``.

    Results of other tasks and settings that stand there already are kept, if they are of the same weights. Until a task has its
    score its answers are kept beside the file, so that an interrupted call resumes.

    Args:
        origin: its name.
        tasks: some of :data:`TASKS`.
        target: see :func:`run_benchmark`, as are the next ones.
        files: local rows.
        limit: first rows only.
        batch_size: prompts at a time.
        chat_template: whether prompts are in the chat template.
        backend: ``hf`` or ``vllm``.
        output: folder for the file; by default the run folder.

    Returns:
        What the file holds: ``model``, ``target``, ``adapter_checksum`` (both ``None`` of a model without an adapter) and
        ``benchmarks``, a list of what :func:`run_benchmark` returns.

    Raises:
        ValueError: see :func:`run_benchmark`; and no folder to write to.
        FileNotFoundError: likewise.
    """
    origin = str(origin)
    adapter = _find_adapter(origin)
    if output is None and (adapter is None or not Path(origin).is_dir()):
        raise InputError(f"{origin!r} is no run folder, so that there is no place for {RESULTS_NAME}: name one by output.")
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
    place = folder / RESULTS_NAME
    earlier = read_json(place, Benchmarks) if place.is_file() else content
    if all(earlier[key] == value for key, value in content.items() if key != "benchmarks"):
        content["benchmarks"] = earlier["benchmarks"]
    with _opened(origin, None, batch_size, backend, target) as opened:
        name = resolve_model(origin if adapter is None else find_target(record, target))
        base = weights_identity(name) if backend == "hf" else None
        for task, (built, path) in ready.items():
            facts = [base, record.get("adapter_checksum"), task, chat_template, version("lm_eval"), version("hf_semalign")]
            answers = folder / f"benchmark-{task}-{digest(facts)[:16]}.answers"
            if backend == "hf":
                opened.lm.answers = answers
            new = _measure(opened, task, built, path, limit, chat_template)
            kept = [old for old in content["benchmarks"] if any(old[key] != new[key] for key in SETTINGS)]
            content["benchmarks"] = [*kept, new]
            write_text(place, json.dumps(content, indent=2) + "\n")
            answers.unlink(missing_ok=True)
    return content


def benchmarks_table(content: dict[str, Any]) -> Table:
    """What :func:`evaluate_run` returns, for a terminal."""
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
    """Refuse what :func:`run_benchmark` cannot do, without rows and model.

    Args:
        task: see :func:`run_benchmark`, as are the others.
        files: local rows.
        limit: first rows only.
        batch_size: prompts at a time.
        backend: ``hf`` or ``vllm``.

    Returns:
        The local file, of MMLU the folder, or ``None`` for the Hub's rows.

    Raises:
        ValueError: see :func:`run_benchmark`.
        FileNotFoundError: no local file.
    """
    for what, given, known in (("task", task, TASKS), ("backend", backend, BACKENDS)):
        if given not in known:
            raise InputError(f"Unknown {what} {given!r}: expected one of {', '.join(known)}.")
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: expected 1 or more.")
    if find_spec("lm_eval") is None:
        raise InputError("The benchmarks need the lm-evaluation-harness: pip install 'hf_semalign[eval]'.")
    if backend == "vllm" and find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install vllm on a machine that it supports, or use the backend hf.")
    path = None if files is None else find_rows(task, Path(files))
    if task in CODE:
        run_program("")  # no opt-in, or no sandbox here: better now than after all answers are there
    return path


def rows_digest(task: str, files: Path) -> str:
    """Digest of a benchmark's local test rows, see :func:`run_benchmark`."""
    path = find_rows(task, files)
    return digest([[one.name, file_digest(one)] for one in (sorted(path.iterdir()) if path.is_dir() else [path])])


@dataclass(frozen=True)
class _Opened:
    """A model as the harness calls it; ``lm`` of one's own sees to its prompts itself."""

    lm: Any
    backend: str
    own: bool = False


class Kept(TypedDict):
    """A line of the file that keeps answers."""

    asked: str
    answer: str


class _Keeper:
    """The harness's cache hook, which gets each answer as soon as its batch is done: JSON lines, by a digest of what was asked.

    Not the harness's own cache, whose file holds pickles: who sends a folder of signals could run a program by it.
    """

    def __init__(self, path: Path | None, known: dict[str, str]) -> None:
        self.path = path
        if path is not None:  # without a line that was cut, where a process was killed
            write_text(path, "".join(self._line(*one) for one in known.items()))

    def __enter__(self) -> _Keeper:
        self.file = None if self.path is None else self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None  # choices of a later task are not kept

    def add_partial(self, kind: str, asked: Any, answer: str) -> None:
        """Keep an answer."""
        if self.file is not None:
            self.file.write(self._line(digest(asked), answer))
            self.file.flush()

    @staticmethod
    def _line(asked: str, answer: str) -> str:
        return json.dumps({"asked": asked, "answer": answer}) + "\n"


def _harness_model(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> Any:
    """The harness's wrapper of a model, which generates by :func:`hf_semalign.experiments.generation.continue_prompts`."""
    from lm_eval.models.huggingface import HFLM

    class GreedyLM(HFLM):
        answers: Path | None = None

        def tok_encode(self, *args: Any, **settings: Any) -> Any:
            with unknown_words_explained():
                return super().tok_encode(*args, **settings)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [digest(request.args) for request in requests]
            known = {} if self.answers is None else {one["asked"]: one["answer"] for one in read_entries(self.answers, Kept)}
            missing = [request for request, key in zip(requests, asked, strict=True) if key not in known]
            room = requests[0].args[1].get("max_gen_toks", self.max_gen_toks)
            self.batch_size_per_gpu = batch_size or rows_that_fit(model, room)
            total, off = len(requests), disable_tqdm or self.rank != 0
            self.bar = tqdm(total=total, initial=total - len(missing), desc="answers", disable=off)
            try:
                with self.bar, _Keeper(self.answers, known) as self.cache_hook:
                    made = iter(super().generate_until(missing, disable_tqdm=True) if missing else ())
                return [known[key] if key in known else next(made) for key in asked]
            finally:
                self.batch_size_per_gpu = batch_size or CHOICE_ROWS  # for choices, of the next task

        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
        ) -> torch.Tensor:
            if settings.get("do_sample") or settings.get("temperature"):
                raise InputError(f"Answers are greedy here, and the task asks for {settings}.")
            new = continue_prompts(
                model,
                context,
                attention_mask,
                max_new_tokens=max_length - context.shape[1],
                eos_token_ids=self.ends,
                pad_token_id=tokenizer.pad_token_id,
                has_ended=lambda tokens: any(one in self.tok_decode(tokens) for one in stop),
                on_end=self.bar.update,
            )
            return torch.cat((context, new), dim=1)

    with quiet():
        lm = GreedyLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or CHOICE_ROWS, add_bos_token=True)
    lm.ends = end_tokens(model, tokenizer)
    return lm


@contextmanager
def _opened(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, batch_size: int | None, backend: str, target: str | Path | None
) -> Iterator[_Opened]:
    from lm_eval.api.model import LM

    named = isinstance(model, (str, Path))
    if isinstance(model, LM):
        yield _Opened(model, type(model).__name__, own=True)
        return
    if backend == "vllm":
        if not named or tokenizer is not None:
            raise InputError("vLLM loads model and tokenizer itself: give the name of a run folder or model, and no tokenizer.")
        yield _Opened(_open_vllm(str(model), target), backend)
        return
    if named:
        model, own = _load_named(str(model), target)
        tokenizer = tokenizer or own
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"The model is a {type(model).__name__}: expected a causal LM, a name, or an lm_eval LM.")
    if tokenizer is None:
        raise InputError("No tokenizer was given, and none lies with the model: pass its tokenizer.")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tokenizer = copy.deepcopy(tokenizer)  # the harness changes it
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token, which answers end with: set its eos_token.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= base.get_input_embeddings().weight.shape[0]:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    with unknown_words_explained():
        begins = tokenizer("a")["input_ids"][:1]
    if tokenizer.bos_token is not None and begins != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True
    causal = cast(CausalLM, model)
    with generating(causal), computing_in(causal, fastest_dtype(causal)):
        yield _Opened(_harness_model(model, tokenizer, batch_size), backend)


def _find_adapter(name: str) -> Path | None:
    """The folder of a transfer; ``None`` for the name of a model."""
    folder = find_folder(name)
    return folder if (folder / RECORD_NAME).is_file() else None


def _load_named(name: str, target: str | Path | None) -> tuple[Any, PreTrainedTokenizerBase | None]:
    adapter = _find_adapter(name)
    if adapter is None:
        model: Any = load_weights(name, dtype="auto")
    else:
        model, _ = load_transfer(adapter, target=target)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), find_tokenizer(_tokenizer_place(name, adapter, target))


def _tokenizer_place(name: str, adapter: Path | None, target: str | Path | None) -> str:
    """Where the tokenizer lies: with the adapter, or with its target."""
    if adapter is None:
        return name
    return str(adapter) if (adapter / "tokenizer_config.json").is_file() else find_target(read_record(adapter), target)


def _open_vllm(name: str, target: str | Path | None) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    adapter = _find_adapter(name)
    place = resolve_model(_tokenizer_place(name, adapter, target))  # vLLM knows no embedded models
    given = {"tokenizer": place, "add_bos_token": True, "batch_size": "auto"}
    if adapter is None:
        return VLLM(pretrained=resolve_model(name), **given)
    check_adapter(adapter)
    config = read_adapter_config(adapter)
    rank = max(config["r"], *config.get("rank_pattern", {}).values(), 0)
    largest = next((known for known in VLLM_RANKS if known >= rank), None)
    if largest is None:
        raise InputError(f"vLLM has LoRA of rank {VLLM_RANKS[-1]} at most, and this adapter {rank}: use the backend hf.")
    base = resolve_model(find_target(read_record(adapter), target))
    return VLLM(pretrained=base, lora_local_path=str(adapter), max_lora_rank=largest, **given)


def _measure(
    opened: _Opened, task: str, built: Any, path: Path | None, limit: int | None, chat_template: bool
) -> dict[str, Any]:
    """Run a task; see :func:`run_benchmark` for what is returned."""
    import lm_eval

    kwargs = {} if task == "mmlu" else dict(built.get_config("generation_kwargs"))
    room, bos = None, None
    if not opened.own:
        answer = kwargs.get("max_gen_toks", opened.lm.max_gen_toks) if kwargs else 0
        room = opened.lm.max_length - answer
        if room < 1:
            raise InputError(f"The model reads {opened.lm.max_length} tokens, and {task} wants {answer} for an answer alone.")
        bos = _check_bos(opened.lm, chat_template)
    # Not simple_evaluate, which besides seeds all generators and lists the installed packages by starting pip.
    results: Any = lm_eval.evaluate(
        opened.lm, lm_eval.tasks.TaskManager(include_defaults=False).load([built]), limit=limit, log_samples=True,
        apply_chat_template=chat_template, confirm_run_unsafe_code=task in CODE,
    )  # fmt: skip
    metric, kind = METRICS[task].split(",")
    name = "mmlu" if task == "mmlu" else built.task_name
    parts = {part.task_name: part for part in ([built] if task != "mmlu" else built.get_all_tasks())}
    error = results["results"][name][f"{metric}_stderr,{kind}"]
    record = {
        "task": task,
        "metric": METRICS[task],
        "value": float(results["results"][name][METRICS[task]]),
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
            part.removeprefix("mmlu_"): float(results["results"][part][METRICS[task]]) for part in sorted(parts)
        }
    if room is not None:
        prompts = [row["arguments"][0][0] for part in parts for row in results["samples"][part] if row["filter"] == kind]
        record["truncated"] = sum(len(opened.lm.tok_encode(prompt)) > room for prompt in prompts)
        if record["truncated"]:
            logger.warning(
                "%s: %d of %d prompts are longer than the %d tokens that the model leaves for them, and lost their beginning.",
                task, record["truncated"], len(prompts), room,
            )  # fmt: skip
    return record


def _check_bos(lm: Any, chat_template: bool) -> str | None:
    """The token that prompts begin with, once; ``None`` of a tokenizer that has none."""
    tokenizer = lm.tokenizer
    if chat_template and tokenizer.chat_template is None:
        raise InputError("The tokenizer has no chat template: set one, or leave chat_template off.")
    text = lm.apply_chat_template([{"role": "user", "content": "a"}]) if chat_template else "a"
    ids = lm.tok_encode(text)
    if not chat_template and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
        raise InputError("The tokenizer puts EOS behind a prompt, which then is over: set its add_eos_token to False.")
    count = next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    if count > 1:
        raise InputError(f"Prompts begin with {count} BOS tokens: take bos_token out of the chat template's text.")
    if count == 0 and tokenizer.bos_token is not None:
        raise InputError(f"The tokenizer does not put its BOS token {tokenizer.bos_token!r} before a prompt: make it do so.")
    return tokenizer.bos_token
