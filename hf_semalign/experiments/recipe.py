"""Recipes: one YAML file that describes a run, from two models to an adapter with card, figures and results.

Run a recipe with ``semalign train``, or on several processes with::

    accelerate launch recipes/train.py --config recipes/quickstart/semalign.yaml training.seed=2
"""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import PreTrainedTokenizerBase

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.experiments.answers import WRITERS, Sampling
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.tasks import BENCHMARKS, TASKS, TaskData, load_held_out, load_task
from hf_semalign.hub.reading import read_record, read_results
from hf_semalign.hub.record import RECORDED_SETTINGS
from hf_semalign.kinds import check_kinds
from hf_semalign.models.loading import find_config, find_tokenizer
from hf_semalign.transfer import signals_root

logger = logging.getLogger(__name__)
IN_ROUNDS = ("semalign", "kd", "sft")  # methods that can continue from an adapter
NAMES_LISTED = 20  # most names that an error lists; SemAlignConfig has many more


@dataclass(frozen=True)
class DataSettings:
    """The ``data`` section: the task, the number of rows per split, and local files to use instead of the Hub.

    Attributes:
        task: ``symbols``, ``gsm8k``, ``mmlu``, ``humaneval``, ``mbpp`` or ``records`` (your own files).
        extract: rows for layer attribution.
        align: rows for training.
        eval: held-out rows.
        files: local files by role, see :func:`hf_semalign.experiments.tasks.load_task`.
        max_length: longer sequences are truncated at the end.
        seed: seed of the splits. It is independent of the training seed, so that all training seeds see the same splits.
        skills: for ``symbols``, a subset of its skills.
        answers: who writes the answers that the target trains on: ``dataset``, ``source`` or ``target``. With ``target``, the
            losses compare both models on the target's own answers. See :mod:`hf_semalign.experiments.answers`. Attribution and
            evaluation always use the data set's answers.
        rounds: for ``answers: target``, how often the current target answers again. The rounds share the training steps.
        max_new_tokens: length limit of written answers. Longer ones are left out.
        temperature: sampling temperature of written answers. 0 decodes greedily.
        name: name of the task in results and card, by default ``task``.
    """

    task: str
    extract: int
    align: int
    eval: int
    files: dict[str, str] | None = None
    max_length: int | None = 1024
    seed: int = 42
    skills: list[str] | None = None
    answers: str = "dataset"
    rounds: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    name: str | None = None

    def load(self) -> TaskData:
        """Load the three splits with the answers of the data set."""
        counts, bare = {"extract": self.extract, "align": self.align, "eval": self.eval}, self.answers != "dataset"
        return load_task(self.task, **counts, files=self.files, seed=self.seed, skills=self.skills, prompts_only=bare)

    @property
    def sampling(self) -> Sampling:
        """How answers are written."""
        return Sampling(self.max_new_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class BenchmarkSettings:
    """The ``benchmark`` section: score the target before and after training, and the source, with lm-eval.

    Attributes:
        tasks: benchmarks, by default the recipe's task.
        files: local test rows instead of the Hub's, see :func:`hf_semalign.experiments.benchmarks.harness.run_benchmark`.
        limit: use only the first rows.
        batch_size: prompts per batch, by default as many as fit into memory.
        chat_template: whether to apply the chat template to prompts.
    """

    tasks: tuple[str, ...] = ()
    files: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class HeldOutSettings:
    """A task in the ``forgetting`` section. It is not transferred; the run measures how training changes the target on it.

    Attributes:
        task: see :class:`DataSettings`.
        eval: number of rows.
        files: local files by role, see :func:`hf_semalign.experiments.tasks.load_held_out`.
        seed: seed of the split.
        skills: for ``symbols``, a subset of its skills.
    """

    task: str
    eval: int
    files: dict[str, str] | None = None
    seed: int = 42
    skills: list[str] | None = None

    def load(self) -> list[dict[str, Any]]:
        """Load the rows."""
        return load_held_out(self.task, eval=self.eval, files=self.files, seed=self.seed, skills=self.skills)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Attributes:
        source: Hub id, folder, or ``embedded:source``.
        target: Hub id, folder, or ``embedded:target``.
        output_dir: the run folder.
        data: see :class:`DataSettings`.
        training: fields of :class:`SemAlignConfig`.
        method: the transfer method, a key of ``METHODS``. The settings that define a method override ``training``.
        pad_token: pad token for a tokenizer without one.
        baselines: methods to compare with, on the same splits and for the same number of steps.
        forgetting: tasks that are not transferred, by display name, see :class:`HeldOutSettings`.
        benchmark: see :class:`BenchmarkSettings`. Without it, lm-eval is not used.
    """

    source: str
    target: str
    output_dir: str
    data: DataSettings
    training: dict[str, Any] = field(default_factory=dict)
    method: str = "semalign"
    pad_token: str | None = None
    baselines: tuple[str, ...] = ()
    forgetting: dict[str, HeldOutSettings] = field(default_factory=dict)
    benchmark: BenchmarkSettings | None = None

    def config(self, folder: Path, method: str | None = None, **changes: Any) -> SemAlignConfig:
        """The training settings for a run in ``folder``.

        Args:
            folder: the run folder.
            method: a method other than the recipe's.
            **changes: settings that override the recipe's.

        Raises:
            ValueError: this package or the Trainer rejects a setting.
        """
        fixed = {**METHODS[method or self.method].trainer.settings, "max_length": self.data.max_length}
        settings = {"disable_tqdm": not sys.stderr.isatty(), **self.training, **changes, **fixed}
        try:
            args = SemAlignConfig(output_dir=str(folder), **settings)
        except (ValueError, TypeError, OSError) as error:  # transformers' own checks
            raise InputError(f"The recipe's training section cannot be used: {error}") from error
        args.push_to_hub = False  # the recipe publishes at its end, not the trainer
        return args

    def rounds(self, args: SemAlignConfig, examples: int) -> list[SemAlignConfig]:
        """The settings of each round. The rounds share the steps of the run, and the last round uses the run folder.

        The number of steps is computed from all prompts. It does not change if written answers are left out.

        Args:
            args: the settings of the run.
            examples: number of rows in the align split.

        Raises:
            ValueError: there are several rounds with fewer steps than rounds, a named checkpoint, or another ``stage_budget``
                than ``split``.
        """
        count, total = self.data.rounds, args.planned_steps(examples)
        if self.data.answers == "dataset":
            return [args]
        run = Path(str(args.output_dir))
        if count > 1 and (args.stage_budget != "split" or isinstance(args.resume_from_checkpoint, str) or total < count):
            raise InputError(
                f"data.rounds is {count} for {total} steps: expected at least one step per round, stage_budget 'split', and "
                "resume_from_checkpoint true or false, because each round has its own checkpoints."
            )
        places = [*(run / f"round-{number}" for number in range(1, count)), run]
        steps = [total * (number + 1) // count - total * number // count for number in range(count)]
        kept = str(signals_root(args))
        return [self.config(place, max_steps=some, signals_dir=kept) for place, some in zip(places, steps, strict=True)]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key.

    Args:
        path: a YAML file.
        overrides: ``key=value``, where dots lead into sections (``training.seed=2``) and values are YAML.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not YAML, a key is unknown (the message suggests the nearest one) or missing, a value has the
            wrong type, or an override is malformed.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"No recipe {str(path)!r}: check the path of the YAML file.")
    content = read_yaml(Path(path).read_bytes(), f"The recipe {path}")
    if not isinstance(content, dict):
        raise InputError(f"The recipe {path} is a {type(content).__name__}: expected keys and values.")
    return _checked(content, overrides, str(path))


def load_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Rebuild the recipe of a run from its folder: model ids, task, rows per split and settings.

    Records do not contain local paths. If the run used any, pass them as overrides (``source=...``, ``data.files.eval=...``).

    Args:
        folder: a run folder of ``semalign train``.
        overrides: see :func:`load_recipe`.

    Raises:
        FileNotFoundError: the folder has no ``semalign.json`` or ``results.json``.
        ValueError: see :func:`load_recipe`.
    """
    record = read_record(folder)
    results = read_results(folder, record)
    if results is None:
        raise MissingFileError(f"{folder} has no results.json, so its task is unknown: pass the recipe of the run.")
    splits = {split: record["data"][split] for split in ("extract", "align", "eval") if split in record["data"]}
    rows = {split: facts.get("answers", facts)["rows"] for split, facts in splits.items()}  # also counts answers left out
    data = {"task": results.get("data_task", results["task"]), **rows}
    models = {"source": record["source"], "target": record["target"]}
    known = record["settings"].items()
    training = {name: value for name, value in known if name in RECORDED_SETTINGS}  # others may contain paths
    content = {**models, "output_dir": str(folder), "method": record["method"], "data": data, "training": training}
    return _checked(content, overrides, str(folder))


def _checked(content: dict[str, Any], overrides: Sequence[str], path: str) -> Recipe:
    """Apply overrides to the content of a recipe, and check every key."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"Invalid override {override!r}: expected key=value, such as training.seed=2.")
        *sections, name = key.removeprefix("--").split(".")
        section = content
        for depth, part in enumerate(sections, start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise InputError(f"Invalid override {override!r}: the recipe has no section {'.'.join(sections[:depth])!r}.")
        section[name] = read_yaml(value, f"The override {override!r}")
    content = {name: value for name, value in content.items() if value is not None}
    training, others = content.setdefault("training", {}), content.get("forgetting", {})
    _check_keys(content, Recipe, f"recipe {path}")
    _check_keys(content.get("data"), DataSettings, f"data section of {path}")
    _check_keys(training, SemAlignConfig, f"training section of {path}")
    _check_keys(content.get("benchmark"), BenchmarkSettings, f"benchmark section of {path}")
    for name, section in others.items() if isinstance(others, dict) else ():
        _check_keys(section, HeldOutSettings, f"section forgetting.{name} of {path}")
    check_kinds(content, Recipe, f"the recipe {path}")
    for name, home in (("output_dir", "output_dir"), ("max_length", "data.max_length")):
        if name in training:
            raise InputError(f"Set {home} instead of training.{name}, which recipes do not accept.")
    read_settings(training)
    for name in ("source", "target", "output_dir"):
        if not content[name].strip():
            raise InputError(f"{name} of the recipe {path} is {content[name]!r}: expected a name or path.")
    method, baselines = content.get("method", Recipe.method), content.get("baselines", ())
    check_names([method], METHODS, f"method of {path}")
    check_names(baselines, METHODS, f"baselines of {path}")
    data = DataSettings(**content["data"])
    check_answers(data, method, baselines, path)
    forgetting = {name: HeldOutSettings(**section) for name, section in others.items()}
    check_names([data.task, *(one.task for one in forgetting.values())], TASKS, f"tasks of {path}")
    benchmark = None
    if "benchmark" in content:
        scoring = BenchmarkSettings(**content["benchmark"])
        benchmark = replace(scoring, tasks=tuple(scoring.tasks) or (data.task,))
        check_names(benchmark.tasks, BENCHMARKS, f"benchmark section of {path}")
    known = {"baselines": tuple(one for one in baselines if one != method), "forgetting": forgetting, "benchmark": benchmark}
    return Recipe(**{**content, **known, "data": data})


def read_settings(training: dict[str, Any]) -> None:
    """Correct, in place, training settings that YAML reads as another type: ``1e-4`` as text and ``no`` as false."""
    numbers = {name for name, hint in get_type_hints(SemAlignConfig).items() if hint in (float, float | None)}
    for name, value in training.items():
        if name in numbers and isinstance(value, str):
            with suppress(ValueError):
                training[name] = float(value)  # YAML reads 1e-4, without a dot, as text
        elif name.endswith("_strategy") and value is False:
            training[name] = "no"


def check_answers(data: DataSettings, method: str, baselines: Sequence[str], path: str) -> None:
    """Check the settings for written answers.

    Raises:
        ValueError: a setting cannot be used.
    """
    check_names([data.answers], WRITERS, f"answers of {path}")
    for name, least in (("rounds", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if not least <= getattr(data, name) < math.inf:
            raise InputError(f"data.{name} of {path} is {getattr(data, name)}: expected a finite number of at least {least}.")
    if data.rounds == 1:
        return
    if data.answers != "target":
        raise InputError(f"data.rounds of {path} is {data.rounds}: several rounds need data.answers=target.")
    if method not in IN_ROUNDS or baselines:
        raise InputError(
            f"data.rounds of {path} is {data.rounds}: only {', '.join(IN_ROUNDS)} train in several rounds, and without "
            "baselines. Use `semalign compare` to run several methods."
        )


class _OnceEach(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys. PyYAML silently takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a section, and reject duplicate keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key != "<<" and key in keys[:place]]:
            raise yaml.constructor.ConstructorError("in a section", node.start_mark, f"duplicate key {twice[0]!r}")
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes, where: str) -> Any:
    """Parse YAML.

    Args:
        text: the YAML text.
        where: subject of the error message, such as ``The recipe FILE``.

    Raises:
        ValueError: ``text`` is not valid YAML, or has a duplicate key.
    """
    try:
        return _OnceEach(text).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _check_keys(section: Any, settings: Any, where: str) -> None:
    """Check the keys of a section. :func:`hf_semalign.kinds.check_kinds` reports what is not a section."""
    if isinstance(section, dict):
        check_names(section, [item.name for item in fields(settings)], where)


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Check that all names are known.

    Raises:
        ValueError: a name is unknown. The message suggests the nearest known name, or lists all of them.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            listed = "see its documentation" if len(known) > NAMES_LISTED else f"known: {sorted(known)}"
            hint = f"did you mean {near[0]!r}?" if near else f"{listed}."
            raise InputError(f"Unknown key {name!r} in the {where}: {hint}")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer, and set the recipe's pad token.

    Raises:
        ValueError: the target has no tokenizer, or the tokenizer does not have the pad token.
    """
    find_config(recipe.target)  # report a missing model as such
    tokenizer = find_tokenizer(recipe.target)
    if tokenizer is None:
        raise InputError(f"The target {recipe.target!r} has no tokenizer: save one next to its weights, with save_pretrained.")
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"pad_token {recipe.pad_token!r} is not in the tokenizer of {recipe.target}: name one of its tokens."
            )
        tokenizer.pad_token = recipe.pad_token
    return tokenizer
