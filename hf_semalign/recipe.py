"""Recipes: one YAML file from two models to an adapter with card, figures and results.

    accelerate launch recipes/train.py --config recipes/quickstart/semalign.yaml training.seed=2

is the same as ``semalign train`` with these arguments.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from hf_semalign.baselines import kd
from hf_semalign.card import render_card
from hf_semalign.config import SemAlignConfig, check_numbers
from hf_semalign.evaluation import answer_loss, exact_match
from hf_semalign.figures import METHOD_NAMES, draw_comparison, draw_layers, draw_losses, method_order
from hf_semalign.guards import claimed, damage, disk_errors_explained, last_checkpoint
from hf_semalign.hub import hub_name, open_repo, push_transfer, read_record
from hf_semalign.inspection import printable
from hf_semalign.loading import check_engine, find_config, find_tokenizer, read_json
from hf_semalign.source import Source
from hf_semalign.states import digest
from hf_semalign.symbols import resolve_model
from hf_semalign.tasks import BENCHMARKS, TASKS, TaskData, load_task
from hf_semalign.trainer import SETTINGS, SemAlignTrainer, signals_root, timed

logger = logging.getLogger(__name__)
BASELINES = {"kd": kd.SETTINGS}
LISTED = 20  # known names in an error; SemAlignConfig has many more


@dataclass(frozen=True)
class DataSettings:
    """The ``data`` section: a task of :mod:`hf_semalign.tasks`, rows a split, and local files instead of the Hub.

    Attributes:
        task: ``symbols``, ``gsm8k``, ``mmlu``, ``humaneval``, ``mbpp`` or ``records`` (files of one's own).
        extract: rows for layer attribution.
        align: rows for training.
        eval: held-out rows.
        files: local files by role, see :func:`hf_semalign.tasks.load_task`.
        max_length: longer sequences are cut at the end.
        seed: seed of the draw, apart from the seed of training, so that all seeds see the same splits.
    """

    task: str
    extract: int
    align: int
    eval: int
    files: dict[str, str] | None = None
    max_length: int | None = 1024
    seed: int = 42

    def load(self) -> TaskData:
        """The three splits."""
        return load_task(self.task, extract=self.extract, align=self.align, eval=self.eval, files=self.files, seed=self.seed)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        source: Hub id, folder, or ``embedded:source``.
        target: Hub id, folder, or ``embedded:target``.
        output_dir: the run folder.
        data: see :class:`DataSettings`.
        training: fields of :class:`SemAlignConfig`.
        pad_token: pad token for a tokenizer that has none.
        baselines: methods that run on the same splits for the same number of steps and stand beside the result.
    """

    source: str
    target: str
    output_dir: str
    data: DataSettings
    training: dict[str, Any] = field(default_factory=dict)
    pad_token: str | None = None
    baselines: tuple[str, ...] = ()

    def config(self, folder: Path, **changes: Any) -> SemAlignConfig:
        """The training settings for a run in ``folder``.

        Raises:
            ValueError: one that cannot be used, by our rules or the Trainer's.
        """
        settings = {"disable_tqdm": not sys.stderr.isatty(), **self.training, **changes, "max_length": self.data.max_length}
        try:
            args = SemAlignConfig(output_dir=str(folder), **settings)
        except ValueError as error:
            raise ValueError(f"The recipe's training section cannot be used: {error}") from error
        args.push_to_hub = False  # no trainer publishes, but the recipe at its end
        return args


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key.

    Args:
        path: a YAML file.
        overrides: ``key=value``, with dots into sections: ``training.seed=2``; values are YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, a key that does not exist (the message has the nearest one), a missing key, a value of another
            type or a malformed override.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No recipe {str(path)!r}: pass a YAML file, such as recipes/quickstart/semalign.yaml.")
    content = _read_yaml(Path(path).read_bytes(), f"The recipe {path}")
    if not isinstance(content, dict):
        raise ValueError(f"The recipe {path} holds a {type(content).__name__}, not keys and values.")
    return _checked(content, overrides, str(path))


def load_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, as far as its folder tells: ids of the models, task, rows of the splits, settings.

    Local paths are in no record: where the run had any, overrides name them again (``source=...``, ``data.files.eval=...``).

    Args:
        folder: what ``semalign train`` has left.
        overrides: see :func:`load_recipe`.

    Raises:
        FileNotFoundError: a folder without ``semalign.json`` or ``results.json``.
        ValueError: see :func:`load_recipe`.
    """
    record = read_record(folder)
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(f"{folder} has no results.json, which names the task: pass the recipe of the run.")
    task = read_json(folder / "results.json", "task")["task"]
    data = {"task": task, **{split: record["data"][split]["rows"] for split in ("extract", "align", "eval")}}
    models = {"source": record["source"], "target": record["target"]}
    training = {name: value for name, value in record["settings"].items() if name in SETTINGS}  # others might name paths
    content = {**models, "output_dir": str(folder), "data": data, "training": training}
    return _checked(content, overrides, str(folder))


def _checked(content: dict[str, Any], overrides: Sequence[str], path: str) -> Recipe:
    """Content of a recipe with overrides, every key checked."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"The override {override!r} is not of the form key=value, such as training.seed=2.")
        *sections, name = key.removeprefix("--").split(".")
        section = content
        for depth, part in enumerate(sections, start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ValueError(f"In the override {override!r}, {'.'.join(sections[:depth])!r} is no section of the recipe.")
        section[name] = _read_yaml(value, f"The override {override!r}")
    _check_keys(content, Recipe, f"recipe {path}")
    _check_keys(content["data"], DataSettings, f"data section of {path}")
    training = content.get("training") or {}
    _check_keys(training, SemAlignConfig, f"training section of {path}")
    for name, home in (("output_dir", "output_dir"), ("max_length", "data.max_length")):
        if name in training:
            raise ValueError(f"Set {home}, not training.{name}: it stands at one place of the recipe.")
    numbers = {item.name for item in fields(SemAlignConfig) if isinstance(item.default, float)}
    for name in numbers & training.keys():
        if isinstance(training[name], str):
            with suppress(ValueError):
                training[name] = float(training[name])  # YAML reads 1e-4, without a dot, as text
    check_numbers(content["data"], DataSettings)
    for name in ("source", "target", "output_dir"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name} of the recipe {path} is {content[name]!r}: expected text.")
    _check_names([content["data"]["task"]], TASKS, f"data section of {path}")
    baselines = content.get("baselines") or ()
    if not isinstance(baselines, (list, tuple)):
        raise ValueError(f"baselines of the recipe {path} is {baselines!r}: expected a list, such as {list(BASELINES)}.")
    _check_names(baselines, BASELINES, f"baselines of {path}")
    return Recipe(**{**content, "data": DataSettings(**content["data"]), "training": training, "baselines": tuple(baselines)})


def _read_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_keys(section: Any, settings: type, where: str) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"The {where} must hold keys and values, got {section!r}.")
    _check_names(section, [item.name for item in fields(settings)], where)
    if settings is SemAlignConfig:
        return
    required = {item.name for item in fields(settings) if item.default is item.default_factory}
    if missing := required - section.keys():
        raise ValueError(f"The {where} lacks {sorted(missing)}.")


def _check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            listed = "see its documentation" if len(known) > LISTED else f"known: {sorted(known)}"
            hint = f"did you mean {near[0]!r}?" if near else f"{listed}."
            raise ValueError(f"Unknown key {name!r} in the {where}: {hint}")


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe: splits, attribution, pairing, map, training, evaluation before and after, baselines, run folder.

    The adapter is saved as soon as it is trained; ``results.json``, figures and card are written after the main run, and
    again after each baseline. With ``push_to_hub`` in its training section the finished folder is published, and whether it
    may be is asked before anything else.

    Returns:
        What ``results.json`` holds.
    """
    args = recipe.config(Path(recipe.output_dir))
    folder = Path(str(args.output_dir))  # where ~ is a home
    check_engine(args)
    repo_id = hub_name(args) if recipe.training.get("push_to_hub") and args.process_index == 0 else None
    if repo_id is not None:
        open_repo(repo_id, token=args.hub_token, private=args.hub_private_repo)
    with claimed(folder) if args.should_save else nullcontext(), disk_errors_explained(folder):
        results = _run(recipe, folder, args)
    if repo_id is not None:
        _publish(recipe, folder, repo_id, args)
    return results


def _publish(recipe: Recipe, folder: Path, repo_id: str, args: SemAlignConfig) -> None:
    try:
        push_transfer(
            folder,
            repo_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            target=resolve_model(recipe.target),
        )
    except (OSError, ValueError) as error:
        raise OSError(f"{folder} is finished, but not published: {error} Then: semalign push {folder} {repo_id}") from error


def _run(recipe: Recipe, folder: Path, args: SemAlignConfig) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    metrics: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    checkpoint = _checkpoint(args, args.resume_from_checkpoint)
    with timed("data", seconds):
        data = recipe.data.load()
        tokenizer = load_tokenizer(recipe)
    source = Source(resolve_model(recipe.source), bf16=args.bf16, parts=args.source_parts)
    trainer = _make_trainer(recipe, source, args, data, tokenizer)
    seconds |= trainer.seconds
    with timed("evaluation before", seconds):
        metrics["target"] = _measure(trainer, data, tokenizer)
        metrics["source"] = _measure_source(trainer, data, tokenizer)
    if args.signals == "cached":
        source.release()
    with timed("training", seconds):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    with timed("evaluation after", seconds):
        metrics["semalign"] = _measure(trainer, data, tokenizer)
    results = {
        "task": recipe.data.task,
        "dataset": None if recipe.data.files or recipe.data.task not in BENCHMARKS else BENCHMARKS[recipe.data.task].hub_id,
        "steps": trainer.state.global_step,
        "metrics": metrics,
        "history": [entry for entry in trainer.state.log_history if "stage" in entry],
        "seconds": seconds,
        "machine": {"device": str(args.device), "cpus": os.cpu_count(), "platform": platform.platform()},
    }
    _write(folder, trainer, results, started)
    for name in recipe.baselines:
        with timed(f"baseline {name}", seconds):
            settings = recipe.config(folder / name, signals_dir=str(signals_root(args)), **BASELINES[name])
            baseline = _make_trainer(recipe, source, settings, data, tokenizer, like=trainer)
            baseline.train(resume_from_checkpoint=_checkpoint(settings, args.resume_from_checkpoint is not False))
            metrics[name] = _measure(baseline, data, tokenizer)
        _write(folder, trainer, results, started)
    return results


def run_signals(recipe: Recipe) -> Path:
    """Have the source say all that a recipe's run will need of it, and keep it under ``signals_dir``.

    Returns:
        The folder of what it said. A run finds it there by itself, also under another ``signals_dir`` that it was copied into;
        on a machine without the source it is named as the recipe's ``source``.

    Raises:
        ValueError: a recipe with ``signals: online``.
        OSError: a disk that does not hold the signals of all target layers.
    """
    args = recipe.config(Path(recipe.output_dir))
    check_engine(args)
    if args.signals != "cached":
        raise ValueError(f"training.signals is {args.signals!r}: nothing is kept. Set it to cached.")
    data, tokenizer = recipe.data.load(), load_tokenizer(recipe)
    source = Source(resolve_model(recipe.source), bf16=args.bf16, parts=args.source_parts)
    trainer = _make_trainer(recipe, source, args, data, tokenizer)
    trainer.prepare_signals()
    _measure_source(trainer, data, tokenizer)
    return source.folder(signals_root(args))


def _checkpoint(args: SemAlignConfig, wanted: str | bool | None) -> str | bool | None:
    """Where to go on: at a checkpoint by name, else at the last one of the run folder, if there is any; ``false``: nowhere.

    Raises:
        ValueError: a named checkpoint that is not whole.
    """
    if wanted is None or wanted is True:
        return last_checkpoint(str(args.output_dir))
    if wanted and (found := damage(Path(wanted))):
        raise ValueError(f"The run cannot go on from {wanted}: {found}. Name another checkpoint, or none to start anew.")
    return wanted


def _write(folder: Path, trainer: SemAlignTrainer, results: dict[str, Any], started: float) -> None:
    """Results, figures and card of what has run so far; the main process alone writes."""
    results["seconds"].pop("total", None)  # it stands last
    results["seconds"]["total"] = round(time.perf_counter() - started, 2)
    results["peak_memory_mb"] = _peak_memory_mb()
    if not trainer.is_world_process_zero():
        return
    record, figures = trainer.record(), folder / "figures"
    figures.mkdir(exist_ok=True)
    drawn = [draw_layers(record, figures), draw_losses(results, record, figures), draw_comparison(results, figures)]
    results["figures"] = [path.name for path in drawn]
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    (folder / "README.md").write_text(render_card(record, results), encoding="utf-8")


def results_table(results: dict[str, Any]) -> Table:
    """The result for the terminal: exact match by skill, and KL(source || target) in nats a token."""
    skills = list(results["metrics"]["target"].get("exact_match", {}))
    table = Table(title=f"{results['task']}, held out; {results['steps']} optimizer steps a method")
    table.add_column("", no_wrap=True)
    for heading in (*(f"{printable(skill)} %" for skill in skills), "KL"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for method in method_order(results["metrics"]):
        values = results["metrics"][method]
        known = values.get("exact_match", {})  # a source that was never held whole was not evaluated
        shares = [f"{100 * known[skill]:.1f}" if skill in known else "-" for skill in skills]
        table.add_row(METHOD_NAMES[method], *shares, f"{values['kl']:.3f}")
    return table


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The target's tokenizer, with the recipe's pad token.

    Raises:
        ValueError: a target without a tokenizer, or a pad token that it does not have.
    """
    name = resolve_model(recipe.target)
    find_config(name)  # a model that is not there is not one without a tokenizer
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ValueError(f"The target {recipe.target!r} has no tokenizer: save it beside its weights, with save_pretrained.")
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token {recipe.pad_token!r} is not in the tokenizer of {recipe.target}: name one of its tokens."
            )
        tokenizer.pad_token = recipe.pad_token
    return tokenizer


def _make_trainer(
    recipe: Recipe,
    source: Source,
    args: SemAlignConfig,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    like: SemAlignTrainer | None = None,
) -> SemAlignTrainer:
    """A trainer on the recipe's models; a baseline takes over pairs and map of the main run (``like``)."""
    return SemAlignTrainer(
        resolve_model(recipe.target),
        source,
        args,
        data.align,
        eval_dataset=data.eval,
        extract_dataset=data.extract,
        processing_class=tokenizer,
        pairing=None if like is None else like.pairing,
        semantic_map=None if like is None else like.semantic_map,
    )


def _measure(trainer: SemAlignTrainer, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    evaluated = trainer.evaluate()
    metrics = {"kl": evaluated["eval_kl"], "loss": evaluated["eval_loss"], "relation": evaluated["eval_relation"]}
    return metrics | _generated(trainer.model, data, tokenizer)


def _measure_source(trainer: SemAlignTrainer, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The source's own figures, kept with its signals, so that a second run need not load it."""
    args, source = trainer.args, trainer.source
    root = None if args.signals == "online" else signals_root(args)
    name = f"evaluation-{digest(trainer.data_record['eval'])[:16]}"
    known = None if root is None else source.recall(root, name)
    with nullcontext() if root is None or known else source.lock(root):
        known = known or (None if root is None else source.recall(root, name))  # another process may have made them
        if known is not None:
            return known
        if args.source_memory == "stream":
            logger.info("The source is not evaluated: source_memory='stream' never holds it whole.")
            return {"kl": 0.0}
        batches = DataLoader(cast(Any, trainer.eval_dataset), args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
        model = source.model(args.device)
        metrics = {"kl": 0.0, "loss": answer_loss(model, batches)} | _generated(model, data, tokenizer)
        if root is not None:
            source.rest()
            source.keep(root, name, metrics)
    return metrics


def _generated(model: Any, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Tasks with a right answer to match; the four benchmarks are scored by lm-eval on the saved adapter.
    return {"exact_match": exact_match(model, tokenizer, data.eval)} if "skill" in data.eval[0] else {}


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
