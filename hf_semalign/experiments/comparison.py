"""Comparisons: methods x tasks x seeds, read from one YAML file and laid out in cells. :mod:`.compare` runs them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from hf_semalign.config import MOST_SEED, SemAlignConfig
from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.plan import Material, Plan, plan_recipe
from hf_semalign.experiments.recipe import (
    DataSettings,
    Recipe,
    check_answers,
    check_names,
    load_recipe,
    read_settings,
    read_yaml,
)
from hf_semalign.kinds import check_kinds

EQUAL_DATA, EQUAL_COMPUTE = "equal data", "equal compute"  # budgets
OF_ANSWERS = ("answers", "rounds", "max_new_tokens", "temperature")  # keys of the data section that a method may change
PLACED = {  # keys of the training section that a method may not change
    "seed": "by seeds, for all methods", "output_dir": "by the comparison's own output_dir",
    "signals_dir": "by the comparison's own output_dir", "max_length": "in the task's recipe, as data.max_length",
}  # fmt: skip
PUBLISHING = ("push_to_hub", "hub_")  # prefixes of training settings that publish a run


@dataclass(frozen=True)
class Reported:
    """Scores that others reported under their own protocol.

    Attributes:
        origin: the publication.
        rows: scores in percent, by method and task.
    """

    origin: str
    rows: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Hardware:
    """The hardware for which a dry run estimates times.

    Attributes:
        name: a display name.
        tflops: sustained (not peak) speed, in 10^12 floating-point operations per second.
    """

    name: str
    tflops: float

    def __post_init__(self) -> None:
        if not 0 < self.tflops < math.inf:
            raise InputError(f"tflops of hardware is {self.tflops}: expected a number above 0.")


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Attributes:
        output_dir: folder for the cells, the tables and the figure.
        tasks: path of each task's recipe, relative to the comparison's file.
        methods: settings of each method, by display name: ``method`` (a key of ``METHODS``; ``semalign`` by default), fields of
            ``training`` that override the recipe's, and under ``data`` the keys in ``OF_ANSWERS``. The first method sets the
            compute budget. A method that exceeds it before training starts has no run under ``equal compute``.
        seeds: training seeds.
        budgets: ``equal data`` gives every method the recipe's steps. ``equal compute`` gives every method as many steps as
            the first method's compute pays for.
        reported: scores that others reported, shown in a separate table.
        hardware: the hardware for which a dry run estimates times.
        recipes: the recipes, by task.
    """

    output_dir: str
    tasks: dict[str, str]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    budgets: list[str] = field(default_factory=lambda: [EQUAL_DATA])
    reported: Reported | None = None
    hardware: Hardware | None = None
    recipes: dict[str, Recipe] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        task: name of the task.
        name: name of the method.
        recipe: the recipe to run. Its ``output_dir`` is the cell's folder.
        budgets: the budgets that this run belongs to.
    """

    task: str
    name: str
    recipe: Recipe
    budgets: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    @property
    def label(self) -> str:
        """A description for the log."""
        return f"{self.task}, {self.name}, {' and '.join(self.budgets)}, seed {self.recipe.training['seed']}"


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison and its recipes, and check every key.

    Args:
        path: a YAML file.
        overrides: ``key=value``. A key of :class:`Comparison` changes the comparison. Any other key changes every recipe.

    Raises:
        FileNotFoundError: the comparison or a recipe does not exist.
        ValueError: a key or a value cannot be used.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"No comparison {str(path)!r}: pass a YAML file, such as recipes/quickstart/compare.yaml.")
    where = f"comparison {path}"
    content = read_yaml(Path(path).read_bytes(), f"The {where}")
    if not isinstance(content, dict):
        raise InputError(f"The {where} is a {type(content).__name__}: expected keys and values.")
    known = [item.name for item in fields(Comparison) if item.name != "recipes"]
    ours = [text for text in overrides if text.partition("=")[0] in known]
    for text in ours:
        key, _, value = text.partition("=")
        content[key] = read_yaml(value, f"The override {text!r}")
    check_names(content, known, where)
    check_kinds(content, Comparison, f"the {where}")
    _check_content(content, where)
    theirs = [text for text in overrides if text not in ours]
    recipes = {}
    for task, file in content["tasks"].items():
        recipes[str(task)] = recipe = load_recipe(Path(path).parent / str(file), theirs)
        for name, changes in content["methods"].items():
            data, place = replace(recipe.data, **changes.get("data", {})), f"methods.{name} of the {where}"
            check_kinds(asdict(data), DataSettings, f"data of {place}")
            check_answers(data, changes.get("method", Recipe.method), (), place)
    return Comparison(
        **{
            **content,
            "reported": _section(Reported, content.get("reported"), f"reported of the {where}"),
            "hardware": _section(Hardware, content.get("hardware"), f"hardware of the {where}"),
            "recipes": recipes,
        }
    )


def _check_content(content: dict[str, Any], where: str) -> None:
    """Check the values of a comparison, except its recipes."""
    if empty := [name for name in ("tasks", "methods", "seeds", "budgets") if not content.get(name, True)]:
        raise InputError(f"{empty[0]} of the {where} is {content[empty[0]]!r}: expected at least one.")
    check_names(content.get("budgets", ()), (EQUAL_DATA, EQUAL_COMPUTE), f"budgets of the {where}")
    for seed in content["seeds"]:
        if not 0 <= seed <= MOST_SEED or content["seeds"].count(seed) > 1:
            raise InputError(f"seeds of the {where} is {content['seeds']}: expected different numbers from 0 to {MOST_SEED}.")
    for name, changes in content["methods"].items():
        place = f"methods.{name} of the {where}"
        check_names(changes, ["method", "data", *(item.name for item in fields(SemAlignConfig))], place)
        check_names([changes.get("method", Recipe.method)], METHODS, place)
        read_settings(changes)
        for key, home in PLACED.items():
            if key in changes:
                raise InputError(f"{place} has {key}, which is set {home}.")
        check_kinds({"data": changes.get("data", {})}, dict[str, dict], place)
        check_names(changes.get("data", {}), OF_ANSWERS, f"data of {place}")
    for section in ("tasks", "methods"):
        folders: dict[str, str] = {}
        for name in map(str, content[section]):
            if (other := folders.setdefault(_slug(name), name)) != name:
                raise InputError(
                    f"{section} of the {where} has {other!r} and {name!r}, which would share the folder {_slug(name)!r}: "
                    "rename one of them, so that they differ in letters or digits."
                )


def _section(kind: Any, content: Any, where: str) -> Any:
    if content is None:
        return None
    names = [item.name for item in fields(kind)]
    check_names(content, names, where)
    return kind(**content)


def plans(comparison: Comparison, known: Mapping[str, Material] | None = None) -> dict[tuple[str, str], Plan]:
    """Plan every method on every task under ``equal data``.

    Args:
        comparison: see :func:`load_comparison`.
        known: what :func:`materials` returns. Pass it to load data and tokenizers only once.

    Returns:
        The plans by task and method name.

    Raises:
        ValueError: a run would be refused before it loads weights.
    """
    known = known or materials(comparison)
    return {
        (task, name): plan_recipe(_changed(comparison, task, name), known[task])
        for task in comparison.recipes
        for name in comparison.methods
    }


def materials(comparison: Comparison) -> dict[str, Material]:
    """The data and models that all methods on a task share, by task."""
    return {task: Material(recipe) for task, recipe in comparison.recipes.items()}


def equal_compute(
    comparison: Comparison, planned: Mapping[tuple[str, str], Plan]
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], str]]:
    """Compute the steps under ``equal compute``.

    Returns:
        The steps by task and method name, and for each method that is left out the reason.
    """
    steps, left_out = {}, {}
    for (task, name), plan in planned.items() if EQUAL_COMPUTE in comparison.budgets else ():
        budget = sum(planned[task, next(iter(comparison.methods))].cost.values())
        try:
            steps[task, name] = plan.steps_for(budget) if METHODS[plan.method].takes_steps else plan.steps
        except InputError as error:
            left_out[task, name] = f"{name} is left out of equal compute: {error}"
    return steps, left_out


def cells(comparison: Comparison, planned: Mapping[tuple[str, str], Plan]) -> list[Cell]:
    """All runs of a comparison. If both budgets give a method the same steps, they share one cell."""
    found = []
    equal, _ = equal_compute(comparison, planned)
    for task, name, seed in _product(comparison):
        plan, recipe = planned[task, name], _changed(comparison, task, name)
        known = {EQUAL_DATA: plan.steps, EQUAL_COMPUTE: equal.get((task, name))}
        steps = {budget: count for budget, count in known.items() if budget in comparison.budgets and count is not None}
        stages = len(plan.stages) - 1 if recipe.training.get("stage_budget") == "per_stage" else 1  # max_steps is per stage
        steps = {budget: max(1, round(wanted / stages)) * stages for budget, wanted in steps.items()}
        for count in dict.fromkeys(steps.values()):
            budgets = tuple(budget for budget, wanted in steps.items() if wanted == count)
            training = {**recipe.training, "seed": seed, "signals_dir": str(Path(comparison.output_dir) / "_signals")}
            if count != plan.steps:
                training = {**training, "max_steps": count // stages}
            folder = Path(comparison.output_dir) / _slug(task) / f"{_slug(name)}-{count}-seed{seed}"
            found.append(Cell(task, name, replace(recipe, output_dir=str(folder), training=training), budgets))
    return found


def _product(comparison: Comparison) -> Iterator[tuple[str, str, int]]:
    """Task, method and seed of every run. Seeds are the outer loop, so that every method has a result early."""
    for seed in comparison.seeds:
        for task in comparison.recipes:
            for name in comparison.methods:
                yield task, name, seed


def _changed(comparison: Comparison, task: str, name: str) -> Recipe:
    """A task's recipe with the settings of a method. Publishing is turned off, because all runs would use the same name."""
    recipe, changes = comparison.recipes[task], dict(comparison.methods[name])
    method = changes.pop("method", Recipe.method)
    data = replace(recipe.data, **changes.pop("data", {}))
    training = {key: value for key, value in {**recipe.training, **changes}.items() if not key.startswith(PUBLISHING)}
    return replace(recipe, method=method, data=data, training=training, baselines=())


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "cell"


def costs_table(comparison: Comparison) -> Group:
    """The plan of a comparison for the terminal, with one table per task. Weights are not loaded.

    Raises:
        ValueError: a run would be refused before it loads weights.
    """
    known, hardware = materials(comparison), comparison.hardware
    planned = plans(comparison, known)
    tables = {task: Table(title=f"{task}, each over {len(comparison.seeds)} seeds", box=SIMPLE) for task in comparison.recipes}
    for table in tables.values():
        for heading in ("method", "equal"):
            table.add_column(heading)
        for heading in ("steps", "forwards", "operations", "disk", "memory", *(["hours"] if hardware else [])):
            table.add_column(heading, justify="right", no_wrap=True)
    hours = 0.0
    for cell in cells(replace(comparison, seeds=comparison.seeds[:1]), planned):  # the others cost the same
        plan = planned[cell.task, cell.name] if EQUAL_DATA in cell.budgets else plan_recipe(cell.recipe, known[cell.task])
        seconds = plan.seconds(1e12 * hardware.tflops) if hardware else 0.0
        hours += len(comparison.seeds) * seconds / 3600
        budgets = ", ".join(budget.removeprefix("equal ") for budget in cell.budgets)
        row = [cell.name, budgets, f"{plan.steps:,}", EngFormatter(places=1, sep="")(sum(plan.cost.values()))]
        row += [EngFormatter("FLOP", places=1)(plan.seconds(1)), decimal(plan.disk_bytes)]
        row += [decimal(max(plan.memory_bytes.values())), *([f"{seconds / 3600:.2f}"] if hardware else [])]
        tables[cell.task].add_row(*map(Text, row))
    notes = "".join(f"{sentence}\n" for sentence in equal_compute(comparison, planned)[1].values())
    notes += "forwards: cost in forward passes of the target over one example. memory: an estimate for models and states."
    if hardware:
        notes += f" All cells, without evaluation: {hours:.1f} hours on {hardware.name}, {hardware.tflops:g} TFLOP/s sustained."
    return Group(*tables.values(), Text(notes))
