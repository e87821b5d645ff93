"""The real pair's table, from the run folders of its cells.

    python benchmarks/real_pair_table.py CELLS.json [RUN FOLDER ...]

``CELLS.json`` (benchmarks/results/real_pair.json) keeps of each cell what the table needs, so that cells of several sessions
and machines stand together: figures, outcomes problem by problem, seconds of training, device, date. Folders that are named are
added, or take the place of the same cell of the same device. The table goes beside it as Markdown.

``RUN FOLDER=LABEL`` names a cell by hand. Of a run that was ended before its end, a cell may hold the figures that its log and
the kept scores give: no training seconds, no forgetting, and those of the benchmarks that were through.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_semalign.experiments.paired import paired_difference
from hf_semalign.experiments.recipe import load_recipe

TASKS = ("mbpp", "humaneval")
Cell = dict[str, Any]


def cell(folder: Path, label: str) -> Cell:
    """What the table needs of a run."""
    results, recipe = json.loads((folder / "results.json").read_text()), load_recipe(folder / "recipe.yaml")
    metrics = results["metrics"]
    return {
        "name": label or folder.name.rpartition("-seed")[0],
        "seed": recipe.training["seed"],
        "steps": results["steps"],
        "date": results["date"],
        "device": results["machine"]["device"],
        "training_seconds": results["seconds"]["training"],
        "cost": sum(results["cost"].values()),
        "ends": {role: _figures(metrics[role]) for role in ("target", "source")},
        **_figures(metrics[recipe.method]),
    }


def _figures(found: dict[str, Any]) -> Cell:
    figures: Cell = {"kl": found["kl"], "loss": found["loss"]}
    figures["outcomes"] = {one["task"]: one["outcomes"] for one in found.get("benchmarks", ())}
    if forgotten := found.get("forgetting"):
        figures["forgotten"] = {name: values["kl"] for name, values in forgotten.items()}
    return figures


def table(cells: list[Cell]) -> str:
    """Markdown: both ends of the pair, then a line a cell, best first, those that lack a score last."""
    ends = next(one["ends"] for one in cells if "ends" in one)
    target = ends["target"]["outcomes"]
    lines = [
        "| | seed | steps | MBPP, % | HumanEval, % | both, points from the target | KL | answer loss | forgetting, KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("source", "target"):
        lines.append(_line({"name": f"**{name}**", **ends[name]}, target))
    order = sorted(cells, key=lambda one: (not _is_whole(one), -_both(one["outcomes"], target)[0], one["name"], one["seed"]))
    return "\n".join([*lines, *(_line(one, target) for one in order), ""])


def _is_whole(one: Cell) -> bool:
    return all(task in one["outcomes"] for task in TASKS)


def _both(ours: dict[str, str], target: dict[str, str]) -> tuple[float, float, float]:
    """The paired difference on both benchmarks together; of a run that has but one, on that."""
    shared = [task for task in TASKS if task in ours]
    if not shared:
        return -1.0, -1.0, -1.0
    solved, before = ([int(one) for task in shared for one in outcomes[task]] for outcomes in (ours, target))
    return paired_difference(solved, before)


def _line(one: Cell, target: dict[str, str]) -> str:
    outcomes = one["outcomes"]
    scores = [f"{100 * outcomes[task].count('1') / len(outcomes[task]):.1f}" if task in outcomes else "-" for task in TASKS]
    difference, low, high = (100 * value for value in _both(outcomes, target))
    ahead = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})" if _is_whole(one) else "-"
    values = [f"{one[name]:.3f}" if name in one else "-" for name in ("kl", "loss")]
    forgotten = ", ".join(f"{value:.3f}" for value in one.get("forgotten", {}).values()) or "-"
    cells = [one["name"], str(one.get("seed", "")), str(one.get("steps", "")), *scores, ahead, *values, forgotten]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Add the folders, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("folders", nargs="*")
    options = parser.parse_args()
    known: list[Cell] = json.loads(options.cells.read_text())["cells"] if options.cells.is_file() else []
    for text in options.folders:
        folder, _, label = text.partition("=")
        new = cell(Path(folder), label)
        same = ("name", "seed", "steps", "device")
        known = [old for old in known if any(old[key] != new[key] for key in same)] + [new]
    options.cells.write_text(json.dumps({"cells": known}, indent=1) + "\n")
    text = table(known)
    options.cells.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
