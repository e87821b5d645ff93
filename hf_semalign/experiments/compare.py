"""Run a comparison cell by cell, and collect the results in one table and one figure.

    semalign compare recipes/quickstart/compare.yaml --jobs 2

Each cell is one run folder. ``semalign train`` makes it in a separate process, so time and memory are measured per cell.
Finished cells are not run again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from hf_semalign.errors import FailedRunsError, InputError
from hf_semalign.experiments.comparison import EQUAL_COMPUTE, Cell, Comparison, cells, equal_compute, plans
from hf_semalign.experiments.figures import draw_gaps
from hf_semalign.experiments.paired import paired_difference
from hf_semalign.experiments.plan import Plan
from hf_semalign.experiments.recipe import Recipe, load_recipe
from hf_semalign.experiments.tables import latex, markdown
from hf_semalign.files import claimed, make_folder
from hf_semalign.hub.card import benchmark_scores
from hf_semalign.hub.reading import read_record, read_results

logger = logging.getLogger(__name__)
RECIPE_NAME = "recipe.yaml"  # the recipe of a cell, in its folder
LAST_LINES = 5


def run_comparison(comparison: Comparison, *, jobs: int = 1) -> dict[str, Any]:
    """Run the missing cells, and write ``compare.md``, ``.json``, ``.tex``, ``.png`` and ``.svg``.

    Args:
        comparison: see :func:`load_comparison`.
        jobs: number of cells to run in parallel. Parallel cells slow each other down, which shows in the measured times.

    Returns:
        The content of ``compare.json``.

    Raises:
        ValueError: a run would refuse its settings, or a cell was run with other settings before.
        ChildProcessError: some cells failed. The tables contain the others.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}: expected at least 1.")
    folder = Path(comparison.output_dir)
    make_folder("output_dir", folder)
    with claimed(folder):
        planned = plans(comparison)
        wanted = cells(comparison, planned)
        for cell in wanted:
            _check(cell)
        missing = [cell for cell in wanted if not _is_whole(cell)]
        for sentence in equal_compute(comparison, planned)[1].values():
            logger.warning("%s", sentence)
        logger.info("%d cells, %d of them finished", len(wanted), len(wanted) - len(missing))
        threads = str(max(1, (os.cpu_count() or 1) // jobs))  # more threads than cores slow each other down
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with ThreadPoolExecutor(jobs) as pool:
            done = pool.map(partial(_run, environment=environment), missing)
            failed = [cell for cell, fine in zip(missing, done, strict=True) if not fine]
        record = summary(comparison, planned, [cell for cell in wanted if cell not in failed])
        write(record, folder)
    if failed:
        raise FailedRunsError(
            f"{len(failed)} of {len(wanted)} cells failed ({'; '.join(cell.label for cell in failed[:3])}): see log.txt in "
            f"their folders under {folder}, and re-run the command to run only these cells."
        )
    return record


def _check(cell: Cell) -> None:
    """Refuse a cell that was run with other settings before."""
    path = cell.folder / RECIPE_NAME
    if path.is_file() and load_recipe(path) != cell.recipe:
        raise InputError(f"{cell.folder} was run with other settings ({path.name}): delete it, or choose another output_dir.")


def _is_whole(cell: Cell) -> bool:
    return (cell.folder / "results.json").is_file()


def _yaml(recipe: Recipe) -> str:
    content = {name: value for name, value in asdict(recipe).items() if value is not None}
    content["data"] = {name: value for name, value in content["data"].items() if value is not None}
    content["baselines"] = list(content["baselines"])
    return yaml.safe_dump(content, sort_keys=False)


def _run(cell: Cell, environment: Mapping[str, str]) -> bool:
    """Train and measure a cell, and write its output to ``log.txt`` in its folder. Returns whether it succeeded."""
    logger.info("%s", cell.label)
    cell.folder.mkdir(parents=True, exist_ok=True)
    path, log = cell.folder / RECIPE_NAME, cell.folder / "log.txt"
    path.write_text(_yaml(cell.recipe), encoding="utf-8")
    command = [sys.executable, "-m", "hf_semalign.cli", "train", "--config", str(path)]
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code != 0:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        logger.error("%s failed (exit code %d):\n  %s", cell.label, code, "\n  ".join(last))
    return code == 0


def summary(comparison: Comparison, planned: Mapping[tuple[str, str], Plan], done: Sequence[Cell]) -> dict[str, Any]:
    """The results of all cells by task, budget and method, as means and standard deviations over the seeds."""
    read = cache(lambda folder: read_results(folder, read_record(folder)) or {})
    tables: list[dict[str, Any]] = []
    _, left_out = equal_compute(comparison, planned)
    for task in comparison.recipes:
        for budget in comparison.budgets:
            chosen = [cell for cell in done if cell.task == task and budget in cell.budgets]
            if not chosen:
                continue
            ends = read(chosen[0].folder)["metrics"]
            rows = []
            runs = {name: [(cell, read(cell.folder)) for cell in chosen if cell.name == name] for name in comparison.methods}
            first, *_ = comparison.methods
            for name, found in runs.items():
                if found:
                    ahead = {} if name == first else _ahead(_outcomes(found), _outcomes(runs[first]))
                    rows.append({"name": name, **_row(found, ends), **ahead})
            target, source = ({"name": role, **_figures(ends[role])} for role in ("target", "source"))
            table = {"task": task, "budget": budget, "target": target, "source": source, "methods": rows}
            if budget == EQUAL_COMPUTE:
                table["left_out"] = [sentence for (place, _), sentence in left_out.items() if place == task]
            tables.append(table)
    return {
        "pair": {"source": next(iter(planned.values())).source, "target": next(iter(planned.values())).target},
        "seeds": comparison.seeds,
        "reference": next(iter(comparison.methods)),
        "tables": tables,
        "reported": asdict(comparison.reported) if comparison.reported else None,
    }


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of one model on one task: ``kl``, ``loss``, and if measured a score from 0 to 1 and forgetting."""
    found: dict[str, float] = {name: metrics[name] for name in ("kl", "loss") if name in metrics}
    if scores := benchmark_scores(metrics):
        found["score"] = sum(one["value"] * one["rows"] for one in scores) / sum(one["rows"] for one in scores)
        if len(scores) > 1:
            found |= {f"score:{one['task']}": one["value"] for one in scores}
    elif metrics.get("exact_match"):
        found["score"] = statistics.mean(metrics["exact_match"].values())
    if metrics.get("forgetting"):
        others = metrics["forgetting"].values()
        found["forgotten_kl"] = statistics.mean(other["kl"] for other in others)
        found["kept_accuracy"] = statistics.mean(other["accuracy"] for other in others)
    return found


def _outcomes(runs: Sequence[tuple[Cell, dict[str, Any]]]) -> dict[tuple[int, str], str]:
    """Which problems were solved, by seed and benchmark."""
    return {
        (cell.recipe.training["seed"], one["task"]): one["outcomes"]
        for cell, results in runs
        for one in benchmark_scores(results["metrics"][cell.recipe.method])
        if "outcomes" in one
    }


def _ahead(ours: Mapping[tuple[int, str], str], reference: Mapping[tuple[int, str], str]) -> dict[str, Any]:
    """Paired difference between a method and the reference over the problems of all benchmarks, averaged over shared seeds."""
    shared = ours.keys() & reference.keys()
    if not shared:
        return {}
    tasks, seeds = sorted({task for _, task in shared}), sorted({seed for seed, _ in shared})

    def means(outcomes: Mapping[tuple[int, str], str]) -> list[float]:
        solved = [[int(one) for task in tasks for one in outcomes[seed, task]] for seed in seeds]
        return [statistics.mean(problem) for problem in zip(*solved, strict=True)]

    difference, low, high = paired_difference(means(ours), means(reference))
    return {"ahead": {"mean": difference, "low": low, "high": high}}


def _row(runs: Sequence[tuple[Cell, dict[str, Any]]], ends: dict[str, Any]) -> dict[str, Any]:
    target, source = _figures(ends["target"]), _figures(ends["source"])
    samples: dict[str, list[float]] = {}
    for cell, results in runs:
        found = _figures(results["metrics"][cell.recipe.method])
        if "score" in found and source.get("score") is not None:
            found["gap"] = source["score"] - found["score"]
            if source["score"] > target["score"]:
                found["closed"] = (found["score"] - target["score"]) / (source["score"] - target["score"])
        if target["kl"] > 0:
            found["kl_closed"] = 1 - found["kl"] / target["kl"]
        if "kept_accuracy" in found:
            found["accuracy_change"] = found["kept_accuracy"] - target["kept_accuracy"]
        found |= {
            "cost": sum(results["cost"].values()),
            "steps": results["steps"],
            "seconds": results["seconds"]["total"],
            "memory_mb": results["peak_memory_mb"],
        }
        if "adapter_mb" in results:  # earlier versions did not write it
            found["adapter_mb"] = results["adapter_mb"]
        for name, value in found.items():
            samples.setdefault(name, []).append(value)
    row: dict[str, Any] = {"method": runs[0][0].recipe.method, "seeds": len(runs)}
    for name, values in samples.items():
        spread = len(values) > 1 and all(map(math.isfinite, values))  # a run that has diverged has nan
        row[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if spread else None}
    return row


def write(record: dict[str, Any], folder: Path) -> None:
    """Write the tables and the figure of :func:`summary`."""
    (folder / "compare.json").write_text(json.dumps(record, indent=1))
    (folder / "compare.md").write_text(markdown(record), encoding="utf-8")
    (folder / "compare.tex").write_text(latex(record), encoding="utf-8")
    if record["tables"]:
        draw_gaps(record, folder)
