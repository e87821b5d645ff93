"""Recipes: one YAML file from two models to an adapter with card, figures and results.

    accelerate launch recipes/train.py --config recipes/quickstart/semalign.yaml training.seed=2

is the same as ``semalign train`` with these arguments.
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
IN_ROUNDS = ("semalign", "kd", "sft")  # methods whose training may begin at an adapter
LISTED = 20  # known names in an error; SemAlignConfig has many more


@dataclass(frozen=True)
class DataSettings:
    """The ``data`` section: a task of :mod:`hf_semalign.experiments.tasks`, rows a split, and local files instead of the Hub.

    Attributes:
        task: ``symbols``, ``gsm8k``, ``mmlu``, ``humaneval``, ``mbpp`` or ``records`` (files of one's own).
        extract: rows for layer attribution.
        align: rows for training.
        eval: held-out rows.
        files: local files by role, see :func:`hf_semalign.experiments.tasks.load_task`.
        max_length: longer sequences are cut at the end.
        seed: seed of the draw, apart from the seed of training, so that all seeds see the same splits.
        skills: of ``symbols``, some of its skills.
        answers: who writes the answers that the target trains on: the ``dataset``, the ``source``, or the ``target`` itself,
            which the source then judges; see :mod:`hf_semalign.experiments.answers`. Attribution and evaluation are on the
            data set's.
        rounds: of ``target``: how often it answers anew, as it has become; the training budget is dealt out to the rounds.
        max_new_tokens: longest written answer; longer ones are left out.
        temperature: of written answers; 0 is greedy.
        name: what results and card call the task; by default ``task``.
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
        """The three splits, with the answers of the data set."""
        counts, bare = {"extract": self.extract, "align": self.align, "eval": self.eval}, self.answers != "dataset"
        return load_task(self.task, **counts, files=self.files, seed=self.seed, skills=self.skills, prompts_only=bare)

    @property
    def sampling(self) -> Sampling:
        """How answers are written."""
        return Sampling(self.max_new_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class BenchmarkSettings:
    """The ``benchmark`` section: target, source and result are scored by lm-eval.

    Attributes:
        tasks: benchmarks; by default the one of the recipe's task.
        files: local test rows, see :func:`hf_semalign.experiments.benchmarks.harness.run_benchmark`; by default the Hub's.
        limit: first rows only.
        batch_size: prompts at a time; by default as many as fit into memory.
        chat_template: whether prompts are in the chat template.
    """

    tasks: tuple[str, ...] = ()
    files: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class HeldOutSettings:
    """A task that is not transferred, of the ``forgetting`` section: what training does to it is measured.

    Attributes:
        task: see :class:`DataSettings`.
        eval: rows.
        files: local files by role, see :func:`hf_semalign.experiments.tasks.load_held_out`.
        seed: seed of the draw.
        skills: of ``symbols``, some of its skills.
    """

    task: str
    eval: int
    files: dict[str, str] | None = None
    seed: int = 42
    skills: list[str] | None = None

    def load(self) -> list[dict[str, Any]]:
        """The rows."""
        return load_held_out(self.task, eval=self.eval, files=self.files, seed=self.seed, skills=self.skills)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        source: Hub id, folder, or ``embedded:source``.
        target: Hub id, folder, or ``embedded:target``.
        output_dir: the run folder.
        data: see :class:`DataSettings`.
        training: fields of :class:`SemAlignConfig`.
        method: how the run transfers, a key of ``METHODS``; what makes up the method goes before ``training``.
        pad_token: pad token for a tokenizer that has none.
        baselines: methods that run on the same splits for the same number of steps and stand beside the result.
        forgetting: tasks that are not transferred, by a name for readers, see :class:`HeldOutSettings`.
        benchmark: see :class:`BenchmarkSettings`; without it nothing is scored by lm-eval.
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
        """The training settings for a run in ``folder``, by the recipe's method or another one.

        Raises:
            ValueError: one that cannot be used, by our rules or the Trainer's.
        """
        fixed = {**METHODS[method or self.method].trainer.settings, "max_length": self.data.max_length}
        settings = {"disable_tqdm": not sys.stderr.isatty(), **self.training, **changes, **fixed}
        try:
            args = SemAlignConfig(output_dir=str(folder), **settings)
        except (ValueError, TypeError, OSError) as error:  # transformers' own checks
            raise InputError(f"The recipe's training section cannot be used: {error}") from error
        args.push_to_hub = False  # no trainer publishes, but the recipe at its end
        return args

    def rounds(self, args: SemAlignConfig, examples: int) -> list[SemAlignConfig]:
        """The settings of each round: the last one's folder is the run's, and the steps of the run are dealt out to all.

        Written answers that are left out cost no steps: those of a run are the steps that all of its prompts would make.

        Args:
            args: the settings of the run.
            examples: rows of its align split.

        Raises:
            ValueError: fewer steps than rounds, or a checkpoint by name where there are several rounds.
        """
        count, total = self.data.rounds, args.planned_steps(examples)
        if self.data.answers == "dataset":
            return [args]
        run = Path(str(args.output_dir))
        if count > 1 and (args.stage_budget != "split" or isinstance(args.resume_from_checkpoint, str) or total < count):
            raise InputError(
                f"data.rounds is {count}, of {total} steps in all: expected a step for each round, stage_budget 'split', and "
                "resume_from_checkpoint true or false, since each round has checkpoints of its own."
            )
        places = [*(run / f"round-{number}" for number in range(1, count)), run]
        steps = [total * (number + 1) // count - total * number // count for number in range(count)]
        kept = str(signals_root(args))
        return [self.config(place, max_steps=some, signals_dir=kept) for place, some in zip(places, steps, strict=True)]


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
        raise MissingFileError(f"No recipe {str(path)!r}: pass a YAML file, such as recipes/quickstart/semalign.yaml.")
    content = read_yaml(Path(path).read_bytes(), f"The recipe {path}")
    if not isinstance(content, dict):
        raise InputError(f"The recipe {path} holds a {type(content).__name__}, not keys and values.")
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
    results = read_results(folder, record)
    if results is None:
        raise MissingFileError(f"{folder} has no results.json, which names the task: pass the recipe of the run.")
    splits = {split: record["data"][split] for split in ("extract", "align", "eval") if split in record["data"]}
    rows = {split: facts.get("answers", facts)["rows"] for split, facts in splits.items()}  # written answers may be left out
    data = {"task": results.get("data_task", results["task"]), **rows}
    models = {"source": record["source"], "target": record["target"]}
    known = record["settings"].items()
    training = {name: value for name, value in known if name in RECORDED_SETTINGS}  # others might name paths
    content = {**models, "output_dir": str(folder), "method": record["method"], "data": data, "training": training}
    return _checked(content, overrides, str(folder))


def _checked(content: dict[str, Any], overrides: Sequence[str], path: str) -> Recipe:
    """Content of a recipe with overrides, every key checked."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"The override {override!r} is not of the form key=value, such as training.seed=2.")
        *sections, name = key.removeprefix("--").split(".")
        section = content
        for depth, part in enumerate(sections, start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise InputError(f"In the override {override!r}, {'.'.join(sections[:depth])!r} is no section of the recipe.")
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
            raise InputError(f"Set {home}, not training.{name}: it stands at one place of the recipe.")
    read_settings(training)
    for name in ("source", "target", "output_dir"):
        if not content[name].strip():
            raise InputError(f"{name} of the recipe {path} is {content[name]!r}: expected text.")
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
    """Give settings of the Trainer the values that were meant where YAML reads others, in place."""
    numbers = {name for name, hint in get_type_hints(SemAlignConfig).items() if hint in (float, float | None)}
    for name, value in training.items():
        if name in numbers and isinstance(value, str):
            with suppress(ValueError):
                training[name] = float(value)  # 1e-4, without a dot, is a text
        elif name.endswith("_strategy") and value is False:
            training[name] = "no"


def check_answers(data: DataSettings, method: str, baselines: Sequence[str], path: str) -> None:
    """Refuse answers that cannot be written or trained on.

    Raises:
        ValueError: names the key.
    """
    check_names([data.answers], WRITERS, f"answers of {path}")
    for name, least in (("rounds", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if not least <= getattr(data, name) < math.inf:
            raise InputError(f"data.{name} of {path} is {getattr(data, name)}: expected a finite number of at least {least}.")
    if data.rounds == 1:
        return
    if data.answers != "target":
        raise InputError(f"data.rounds of {path} is {data.rounds}: only answers of the target change from round to round.")
    if method not in IN_ROUNDS or baselines:
        raise InputError(
            f"data.rounds of {path} is {data.rounds}: in rounds train {', '.join(IN_ROUNDS)}, without baselines beside them; "
            "`semalign compare` runs several methods."
        )


class _OnceEach(yaml.SafeLoader):
    """YAML whose sections have each key once; of two, PyYAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A section."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key != "<<" and key in keys[:place]]:
            raise yaml.constructor.ConstructorError("in a section", node.start_mark, f"the key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes, where: str) -> Any:
    """Content of a YAML text.

    Raises:
        ValueError: names ``where`` it stands.
    """
    try:
        return _OnceEach(text).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_keys(section: Any, settings: Any, where: str) -> None:
    """Refuse unknown keys of a section; whether it is one is for :func:`hf_semalign.kinds.check_kinds` to say."""
    if isinstance(section, dict):
        check_names(section, [item.name for item in fields(settings)], where)


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: has the nearest known one, or all of them.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            listed = "see its documentation" if len(known) > LISTED else f"known: {sorted(known)}"
            hint = f"did you mean {near[0]!r}?" if near else f"{listed}."
            raise InputError(f"Unknown key {name!r} in the {where}: {hint}")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The target's tokenizer, with the recipe's pad token.

    Raises:
        ValueError: a target without a tokenizer, or a pad token that it does not have.
    """
    find_config(recipe.target)  # a model that is not there is not one without a tokenizer
    tokenizer = find_tokenizer(recipe.target)
    if tokenizer is None:
        raise InputError(f"The target {recipe.target!r} has no tokenizer: save it beside its weights, with save_pretrained.")
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"pad_token {recipe.pad_token!r} is not in the tokenizer of {recipe.target}: name one of its tokens."
            )
        tokenizer.pad_token = recipe.pad_token
    return tokenizer
