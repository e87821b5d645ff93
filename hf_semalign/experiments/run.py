"""Running a recipe: from two models to an adapter with card, figures and results, and baselines beside it."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import yaml
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, StorageError
from hf_semalign.experiments.benchmarks.harness import check_benchmark, rows_digest, run_benchmark
from hf_semalign.experiments.evaluation import answer_loss, drift, exact_match, final_states
from hf_semalign.experiments.figures import draw_comparison, draw_layers, draw_losses
from hf_semalign.experiments.recipe import Recipe, load_tokenizer
from hf_semalign.experiments.rounds import make_trainer, start_of, tokenizer_of_source, train_recipe, with_answers
from hf_semalign.experiments.tasks import BENCHMARKS, TaskData
from hf_semalign.files import (
    Part,
    checksum,
    claimed,
    digest,
    disk_errors_explained,
    file_digest,
    keep_record,
    recall_record,
    write_text,
)
from hf_semalign.hub.card import METHOD_NAMES, benchmark_entries, benchmark_scores, method_order, render_card, uses_pairs
from hf_semalign.hub.inspection import printable
from hf_semalign.hub.push import hub_name, open_repo, push_transfer
from hf_semalign.models.anatomy import CausalLM
from hf_semalign.models.loading import device_name
from hf_semalign.splits import check_disjoint, encode
from hf_semalign.tokenization import source_record
from hf_semalign.training.engines import check_engine, is_set
from hf_semalign.transfer import PER_BYTE, TransferTrainer, signals_root, timed

try:
    import resource
except ModuleNotFoundError:
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
SECONDS = "_seconds.json"  # wall time of phases, over all starts of a run
EVAL_RESULTS = ".eval_results"  # where the Hub looks for them


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe: splits, attribution, pairing, map, training, evaluation before and after, baselines, run folder.

    The adapter is saved as soon as it is trained. ``results.json``, figures and card are written after the main run, and again
    after each baseline. With ``push_to_hub`` in the training section, the finished folder is published. Whether this is
    possible is checked first.

    Returns:
        The content of ``results.json``.
    """
    args = recipe.config(Path(recipe.output_dir))
    folder = Path(str(args.output_dir))  # with ~ expanded
    check_engine(args)
    _check_benchmark(recipe)
    repo_id = hub_name(args) if recipe.training.get("push_to_hub") and args.process_index == 0 else None
    if repo_id is not None:
        open_repo(repo_id, token=args.hub_token, private=args.hub_private_repo)
    with claimed(folder) if args.should_save else nullcontext(), disk_errors_explained(folder):
        # A resumed run adds to the time of its earlier starts.
        known = recall_record(folder / SECONDS) if args.resume_from_checkpoint is not False else None
        settings = digest(asdict(recipe))
        seconds: dict[str, float] = known["seconds"] if known and known["recipe"] == settings else {}
        started = time.perf_counter() - seconds.pop("total", 0.0)
        try:
            results = _run(recipe, folder, args, seconds, started)
        finally:
            if args.should_save:
                total = round(time.perf_counter() - started, 2)
                keep_record(folder / SECONDS, {"recipe": settings, "seconds": {**seconds, "total": total}})
    if repo_id is not None:
        _publish(recipe, folder, repo_id, args)
    return results


def _check_benchmark(recipe: Recipe) -> None:
    """Refuse a benchmark that could not be scored at the end of the run."""
    if recipe.benchmark is None:
        return
    if is_set("ACCELERATE_USE_FSDP"):
        raise InputError(
            "Under FSDP lm-eval cannot score the model: leave benchmark out, and run `semalign evaluate` afterwards."
        )
    settings = recipe.benchmark
    for task in settings.tasks:
        check_benchmark(task, files=settings.files, limit=settings.limit, batch_size=settings.batch_size)


def _publish(recipe: Recipe, folder: Path, repo_id: str, args: SemAlignConfig) -> None:
    try:
        push_transfer(
            folder,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            target=recipe.target,
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder} is finished, but not published: {error} Then: semalign push {folder} {repo_id}"
        ) from error


def _run(recipe: Recipe, folder: Path, args: SemAlignConfig, seconds: dict[str, float], started: float) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {}
    with timed("data", seconds):
        data = recipe.data.load()
        tokenizer = load_tokenizer(recipe)
        others = HeldOut.load(recipe, tokenizer)
        for other in others:
            check_disjoint({"align": data.align, f"forgetting.{other.name}": other.records})
    source = Source(recipe.source, precision=args.mixed_precision, parts=args.source_parts)

    def measure_before(trainer: TransferTrainer) -> None:
        metrics["source"] = _measure_source(recipe, trainer, data, tokenizer)
        if args.signals == "cached":
            source.release()  # generation needs the memory
        for other in others:
            other.remember(trainer)
        metrics["target"] = _measure(recipe, trainer, data, tokenizer, others)

    trainer, rows, trained = train_recipe(recipe, folder, args, source, data, tokenizer, measure_before, seconds)
    with timed("evaluation after", seconds):
        metrics[recipe.method] = _measure(recipe, trainer, data, tokenizer, others)
        metrics["source"] |= _score_source(recipe, trainer, tokenizer)  # it takes longest, so the adapter is saved before
    results = {
        "task": recipe.data.name or recipe.data.task,
        "data_task": recipe.data.task,
        "dataset": None if recipe.data.files or recipe.data.task not in BENCHMARKS else BENCHMARKS[recipe.data.task].hub_id,
        "date": date.today().isoformat(),
        "overlap": asdict(data.overlap) if data.overlap else None,
        "metrics": metrics,
        **trained,
        "seconds": seconds,
        "machine": {"device": device_name(args.device), "cpus": os.cpu_count(), "platform": platform.platform()},
    }
    _write(folder, trainer, results, started)
    for name in recipe.baselines:
        with timed(f"baseline {name}", seconds):
            settings = recipe.config(folder / name, name, signals_dir=str(signals_root(args)))
            baseline = make_trainer(recipe, name, source, settings, rows, tokenizer, like=trainer)
            baseline.train(resume_from_checkpoint=start_of(settings, args.resume_from_checkpoint is not False))
            metrics[name] = _measure(recipe, baseline, data, tokenizer, others)
        _write(folder, trainer, results, started)
    return results


def run_signals(recipe: Recipe, part: Part | None = None) -> Path:
    """Precompute the source's hidden states of all rows of a recipe, and save them under ``signals_dir``.

    Args:
        recipe: the recipe.
        part: ``(i, n)`` for only the i-th of n parts, counted from 0. After all parts, a call without it adds the source's own
            evaluation.

    Returns:
        The folder of the states. A run finds it under its ``signals_dir``, also if it was copied there. On a machine without
        the source, give this folder as the recipe's ``source``.

    Raises:
        ValueError: the recipe has ``signals: online``.
        OSError: the disk is too small for the states of all target layers.
    """
    args = recipe.config(Path(recipe.output_dir))
    check_engine(args)
    if args.signals != "cached":
        raise InputError(f"training.signals is {args.signals!r}, so nothing would be saved: set it to cached.")
    data, tokenizer = recipe.data.load(), load_tokenizer(recipe)
    source = Source(recipe.source, precision=args.mixed_precision, parts=args.source_parts)
    if recipe.data.answers == "target":
        raise InputError(
            "data.answers is target, so the answers are written during training, and the source cannot read them before."
        )
    rows, _ = with_answers(recipe, data, source, args, tokenizer, Path(str(args.output_dir)), {})
    trainer = make_trainer(recipe, recipe.method, source, args, rows, tokenizer)
    trainer.write_signals(part)
    if part is not None:
        return source.folder(signals_root(args))
    trainer.prepare()
    _measure_source(recipe, trainer, data, tokenizer)
    _score_source(recipe, trainer, tokenizer)
    return source.folder(signals_root(args))


def _write(folder: Path, trainer: TransferTrainer, results: dict[str, Any], started: float) -> None:
    """Write results, figures and card of what has run so far. Only the main process writes."""
    results["seconds"].pop("total", None)  # to be added last
    results["seconds"]["total"] = round(time.perf_counter() - started, 2)
    results["peak_memory_mb"] = _peak_memory_mb(trainer.args.device)
    if not trainer.is_world_process_zero():
        return
    results["adapter_mb"] = (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size / 1e6
    results["adapter_checksum"] = file_digest(folder / SAFETENSORS_WEIGHTS_NAME)
    record, figures = trainer.record(), folder / "figures"
    figures.mkdir(exist_ok=True)
    drawn = [draw_losses(results, record, figures), draw_comparison(results, figures)]
    if uses_pairs(record):
        drawn.insert(0, draw_layers(record, figures))
    results["figures"] = [path.name for path in drawn]
    write_text(folder / "results.json", json.dumps(results, indent=2))
    shutil.rmtree(folder / EVAL_RESULTS, ignore_errors=True)  # left by an earlier run
    for name, entries in benchmark_entries(results, trainer.method).items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        (folder / EVAL_RESULTS / name).write_text(yaml.safe_dump(entries, sort_keys=False))
    (folder / "README.md").write_text(render_card(record, results), encoding="utf-8")


def results_table(results: dict[str, Any]) -> Table:
    """The results for the terminal: benchmarks, exact match by skill, KL(source || target) and answer loss (nats per token)."""
    scored = [entry["task"] for entry in benchmark_scores(results["metrics"]["target"])]
    skills = list(results["metrics"]["target"].get("exact_match", {}))
    table = Table(title=f"{results['task']}, held out; {results['steps']} optimizer steps per method")
    table.add_column("", no_wrap=True)
    for heading in (*(f"{name} %" for name in (*scored, *map(printable, skills))), "KL", "loss"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for method in method_order(results["metrics"]):
        values = results["metrics"][method]
        known = values.get("exact_match", {})  # a streamed source is not evaluated
        shares = [f"{100 * known[skill]:.1f}" if skill in known else "-" for skill in skills]
        found = {entry["task"]: f"{100 * entry['value']:.1f}" for entry in benchmark_scores(values)}
        losses = [f"{values[name]:.3f}" if name in values else "-" for name in ("kl", "loss")]
        table.add_row(METHOD_NAMES[method], *(found.get(task, "-") for task in scored), *shares, *losses)
    return table


@dataclass
class HeldOut:
    """A task that is not trained on, and the target's final states on it before training.

    Attributes:
        name: name in results.
        records: its rows.
        rows: the rows, encoded.
        states: ``[N, D]`` for each batch, on the CPU.
    """

    name: str
    records: list[dict[str, Any]]
    rows: Any
    states: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[HeldOut]:
        """The held-out tasks of a recipe."""
        found = []
        for name, settings in recipe.forgetting.items():
            records = settings.load()
            rows = encode(records, tokenizer, split=f"forgetting.{name}", max_length=recipe.data.max_length)
            found.append(HeldOut(name, records, rows))
        return found

    def remember(self, trainer: TransferTrainer) -> None:
        """Keep the final states of the target before training."""
        self.states = [states.cpu() for states, _ in final_states(cast(CausalLM, trainer.model), self._batches(trainer))]

    def measure(self, trainer: TransferTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The drift, see :func:`hf_semalign.experiments.evaluation.drift`, and exact match if the task has it."""
        found = drift(cast(CausalLM, trainer.model), self._batches(trainer), self.states)
        return found | _generated(trainer.model, self.records, tokenizer)

    def _batches(self, trainer: TransferTrainer) -> DataLoader:
        return DataLoader(self.rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)


def _measure(
    recipe: Recipe, trainer: TransferTrainer, data: TaskData, tokenizer: PreTrainedTokenizerBase, others: Sequence[HeldOut]
) -> dict[str, Any]:
    evaluated, scores = trainer.evaluate(), signals_root(trainer.args) / "scores"
    metrics: dict[str, Any] = {
        "kl": evaluated["eval_kl"],
        "loss": evaluated["eval_loss"],
        **{name: evaluated[f"eval_{name}"] for name in ("relation", *PER_BYTE) if f"eval_{name}" in evaluated},
        **_generated(trainer.model, data.eval, tokenizer),
        **_scored(recipe, trainer.args, partial(_identity, recipe, trainer), lambda: trainer.model, tokenizer, scores),
    }
    if others:
        metrics["forgetting"] = {other.name: other.measure(trainer, tokenizer) for other in others}
    return metrics


def _measure_source(
    recipe: Recipe, trainer: TransferTrainer, data: TaskData, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The source's own figures. They are saved with its signals, so that a second run need not load it."""
    args, source = trainer.args, trainer.source
    root = None if args.signals == "online" else signals_root(args)
    name = f"evaluation-{digest(trainer.data_record['eval'])[:16]}"
    metrics = None if root is None else source.recall(root, name)
    with nullcontext() if root is None or metrics else source.lock(root):
        metrics = metrics or (None if root is None else source.recall(root, name))  # another process may have saved them
        if metrics is None and args.source_memory == "stream":
            logger.info("The source is not evaluated: with source_memory='stream' it is never fully loaded.")
            return {"kl": 0.0}
        if metrics is None:
            rows: Any = trainer.known.source_splits["eval"]
            batches = DataLoader(rows, args.per_device_eval_batch_size, collate_fn=trainer.known.source_collator)
            model, own = source.model(args.device), tokenizer_of_source(source, tokenizer)
            read = list(map(source_record, data.eval))
            metrics = {"kl": 0.0, "loss": answer_loss(model, batches), **_generated(model, read, own)}
            if root is not None:
                source.rest()
                source.keep(root, name, metrics)
    return metrics


def _score_source(recipe: Recipe, trainer: TransferTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The source's scores on the benchmarks, saved with its signals for machines without its weights."""
    args, source, root = trainer.args, trainer.source, signals_root(trainer.args)
    if args.source_memory == "stream" or recipe.benchmark is None:
        return {}
    scores = root / "scores" if args.signals == "online" else source.folder(root)
    own = tokenizer_of_source(source, tokenizer)
    found = _scored(recipe, args, lambda: source.identity, lambda: source.model(args.device), own, scores)
    if args.signals == "cached":
        source.release()
    return found


def _identity(recipe: Recipe, trainer: TransferTrainer) -> str:
    """A digest of the trainer's current target. Before training it depends only on the target's own weights."""
    base = Source(recipe.target).identity
    learnt = [trainer.method, [checksum(p) for layer in trainer.lora_layers for p in layer]]
    return digest([base, learnt if trainer.state.global_step else None])


def _scored(
    recipe: Recipe,
    args: SemAlignConfig,
    identity: Callable[[], str],
    model: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> dict[str, Any]:
    """The scores of a model on the benchmarks. Each score is saved in a folder when it is done, and the answers until then.

    Every process computes them, so that none waits for another for hours.
    """
    settings = recipe.benchmark
    if settings is None:
        return {}
    entries = []
    for task in settings.tasks:
        how = {name: value for name, value in asdict(settings).items() if name != "tasks"}
        rows = None if settings.files is None else rows_digest(task, Path(settings.files))
        facts = [identity(), task, rows, settings.limit, settings.chat_template, version("lm_eval"), version("hf_semalign")]
        path = folder / f"benchmark-{task}-{digest(facts)[:16]}.json"
        if (entry := recall_record(path)) is None:
            answers = path.with_suffix(".answers") if args.should_save else None
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = run_benchmark(model(), tokenizer, task, answers=answers, **how)
            if answers is not None:
                keep_record(path, entry)
                answers.unlink(missing_ok=True)
        entries.append(entry)
    return {"benchmarks": entries}


def _generated(model: Any, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Only for tasks with one right answer. lm-eval scores the four benchmarks.
    matched = all(isinstance(record.get(name), str) for record in records for name in ("skill", "prompt", "completion"))
    return {"exact_match": exact_match(model, tokenizer, records)} if matched else {}


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    memory = psutil.Process().memory_info()
    if resource is None:  # on Windows, psutil reports the peak
        return round(memory.peak_wset / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
