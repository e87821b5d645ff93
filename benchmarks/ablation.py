"""The ablation: choices of SemAlign against ordinary distillation and fine-tuning, at equal data and equal steps, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py --jobs 2
    OMP_NUM_THREADS=1 python benchmarks/ablation.py --recipe runs/pairs/stories/absent.yaml --grids screening trials

Without ``--recipe`` the embedded pair with the quickstart's settings, for 2,400 steps; the recipes of ``benchmarks/pairs.py``
have steps of their own. Each cell is one run with a few settings changed; a cell whose ``results.json`` exists is not run
again. Prints a Markdown table after each seed, and writes it with all numbers to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "semalign.yaml"
RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
STEPS = 2400
PAIRINGS = ("attribution", "banded", "proportional", "uniform", "last")
Grid = dict[str, dict[str, Any]]


def embedded() -> Grid:
    """Settings by name: the paper's strict frontier over pairing x scale x weight, then the other frontiers and KD."""
    cells: Grid = {"no layer loss": {"frontier": "single", "relation_weight": 0.0}}
    for pairing, scale, weight in itertools.product(PAIRINGS, ("none", "match"), (0.1, 1.0)):
        cells[f"{pairing}, scale {scale}, weight {weight:g}"] = {
            "frontier": "single", "pairing": pairing, "scale": scale, "relation_weight": weight,
        }  # fmt: skip
    for frontier, weight in itertools.product(("cumulative", "joint"), (0.0, 0.1, 1.0)):
        name = (
            "distillation (joint, no layer loss)" if (frontier, weight) == ("joint", 0.0) else f"{frontier}, weight {weight:g}"
        )
        cells[name] = {"frontier": frontier, "pairing": "banded", "scale": "match", "relation_weight": weight}
    for weight in (0.1, 1.0):
        cells[f"joint, last, scale none, weight {weight:g}"] = {
            "frontier": "joint", "pairing": "last", "scale": "none", "relation_weight": weight,
        }  # fmt: skip
    return {name: {"max_steps": STEPS, **settings} for name, settings in cells.items()}


BASES: Grid = {
    "KD": {"frontier": "joint", "relation_weight": 0.0},
    "SFT": {"method": "sft"},
    **{frontier: {"frontier": frontier, "relation_weight": 0.3} for frontier in ("joint", "cumulative", "single")},
}
PROTOTYPE = {"pairing": "banded", "scale": "match", "relation_weight": 0.3}
NAMES = {"relation_weight": "weight", "map_kind": "map", "lora_r": "rank"}  # others stand by their value alone


def grid(*cells: tuple[str, dict[str, Any]]) -> Grid:
    """Cells that differ from a base by a few settings, by name; pairs are of the last layers unless they say otherwise."""
    named = {}
    for base, changes in cells:
        changed = [f"{NAMES.get(key, '')} {value}".strip() for key, value in changes.items()]
        named[", ".join([base, *changed])] = {"pairing": "last", "scale": "none", **BASES[base], **changes}
    return named


def screening() -> Grid:
    """KD, SFT, and the frontiers with, without and with more of the layer loss; the paper's setting and the prototype's."""
    return grid(
        ("KD", {}),
        ("SFT", {}),
        ("joint", {}),
        ("joint", {"relation_weight": 1.0}),
        ("joint", PROTOTYPE),
        ("cumulative", {"relation_weight": 0.0}),
        ("cumulative", {}),
        ("cumulative", PROTOTYPE),
        ("single", {"relation_weight": 0.0}),
        ("single", {}),
        ("single", {"pairing": "attribution", "relation_weight": 1.0}),  # the paper
    )


def factors() -> Grid:
    """All layers at once, with one other setting at a time."""
    return grid(
        ("joint", {"pairing": "attribution"}),
        ("joint", {"pairing": "proportional"}),
        ("joint", {"scale": "match"}),
        ("joint", {"map_kind": "projection"}),
        ("joint", {"map_kind": "cosine"}),
        ("joint", {"layer_loss": "steering"}),
        ("joint", {"relation_weight": 0.1}),
    )


def compute() -> Grid:
    """Equal compute instead of equal steps; that of ``joint`` and ``cumulative`` is KD's already."""
    return grid(
        ("SFT", {"budget": "equal compute"}),
        ("single", {"budget": "equal compute"}),
    )


def long() -> Grid:
    """Four times the steps, and the whole budget to every stage."""
    budget = {"budget": "four times the steps"}
    return grid(
        *((base, budget) for base in ("KD", "SFT", "joint")),
        ("joint", {**PROTOTYPE, **budget}),
        ("joint", {"layer_loss": "steering", **budget}),
        ("cumulative", {**PROTOTYPE, **budget}),
        ("single", budget),
        ("single", {"stage_budget": "per_stage"}),
    )


def rank() -> Grid:
    """LoRA of rank 4."""
    return grid(*((base, {"lora_r": 4}) for base in BASES))


def trials() -> Grid:
    """What is not in the library, each one change from a cell of the screening."""
    paper = {"pairing": "attribution", "relation_weight": 1.0}
    return grid(
        ("joint", {"method": "balanced"}),
        ("joint", {"method": "annealed", "relation_weight": 1.0}),
        ("cumulative", {"method": "one schedule"}),
        ("cumulative", {"method": "half to last"}),
        ("single", {"method": "one schedule"}),
        ("single", {**paper, "method": "dealt by score"}),
        ("single", {"method": "ends at last", "relation_weight": 1.0}),
    )


def maps() -> Grid:
    """The map in the relation loss against one without its stretching, and against a random one."""
    others = [{"method": name, "relation_weight": weight} for weight in (0.3, 1.0) for name in ("even map", "random map")]
    return grid(*((base, changes) for base in ("joint", "single") for changes in ({}, {"relation_weight": 1.0}, *others)))


def objectives() -> Grid:
    """What the layer loss could ask instead, in all layers at once (``trials.py``)."""
    others = [("fisher", weight) for weight in (0.03, 0.1, 0.3)]
    others += [("fisher, normed", weight) for weight in (0.03, 0.3)]
    others += [(name, weight) for name in ("contribution", "contribution, own space") for weight in (0.3, 1.0)]
    others += [("fisher, random map", 0.1)]
    return grid(("KD", {}), ("joint", {}), *(("joint", {"method": name, "relation_weight": weight}) for name, weight in others))


def contributions() -> Grid:
    """Of these, what was best on the other pairs."""
    best = ("contribution, own space", "contribution", "fisher")
    weights = {"contribution, own space": (0.3, 1.0), "contribution": (1.0,), "fisher": (0.03,)}
    cells = [("joint", {"method": name, "relation_weight": weight}) for name in best for weight in weights[name]]
    return grid(("KD", {}), ("joint", {}), ("joint", {"relation_weight": 0.1}), *cells)


def divergences() -> Grid:
    """What the output loss could ask instead, without a layer loss."""
    others = ("reverse KL", "JSD 0.5", "JSD 0.9", "KL and 0.3 answers", "KL and 1 answers")
    return grid(("KD", {}), ("SFT", {}), *(("KD", {"method": name}) for name in others))


GRIDS = {
    grid.__name__: grid
    for grid in (embedded, screening, factors, compute, long, rank, trials, maps, objectives, contributions, divergences)
}


def run_cell(recipe: Path, settings: dict[str, Any] | None, seed: int, folder: Path) -> dict[str, Any]:
    """Run one cell, or read what an earlier run of it left; see :func:`transfer.transfer`."""
    from transfer import transfer  # in the processes of the pool alone

    return transfer(recipe, settings, seed, folder)


def summarise(ends: Mapping[str, Any], results: Mapping[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: mean and standard deviation over seeds, best KL first.

    Beside KD stands the difference in KL from it, seed by seed: the seeds share LoRA's start and the order of the rows.
    """
    skills = list(ends["target"].get("exact_match", {}))
    columns = ["", "KL", *(["from KD"] if "KD" in results else []), "loss", *(f"{skill} %" for skill in skills), "s"]
    found = {name: [run["metrics"]["semalign"] for run in runs] for name, runs in results.items()}
    rows = {"*target before*": [ends["target"]], "*source*": [ends["source"]]}
    rows |= dict(sorted(found.items(), key=lambda row: statistics.mean(run["kl"] for run in row[1])))
    lines = [columns, ["---"] * len(columns)]
    for name, metrics in rows.items():
        kl, known = [run["kl"] for run in metrics], name in found
        values = [spread(kl, 3)]
        if "KD" in found:
            pairs = zip(kl, found["KD"], strict=True) if known and name != "KD" else ()
            values.append(spread([value - kd["kl"] for value, kd in pairs], 3) if pairs else "")
        values += [spread([run["loss"] for run in metrics], 3)]
        values += [spread([100 * run["exact_match"][skill] for run in metrics], 1) for skill in skills]
        values += [f"{statistics.median(run['seconds'] for run in results[name]):.0f}" if known else ""]
        lines.append([name, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^\w.]+", "-", name).strip("-").lower()


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, or the only value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write(path: Path, cells: Grid, ends: dict[str, Any], results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> None:
    """Print the table of the seeds that are complete, and write it with all numbers, as ``.md`` and ``.json``."""
    table = summarise(ends, results)
    print(table, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(table + "\n")
    numbers = {name: {"settings": cells[name], "seeds": seeds[: len(runs)], "runs": runs} for name, runs in results.items()}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    path.with_suffix(".json").write_text(json.dumps({"machine": machine, "ends": ends, "cells": numbers}, indent=1))


def pair_name(recipe: Path) -> str:
    """Pair and regime, by where the recipe is."""
    return f"{recipe.parent.name}-{recipe.stem}"


def main() -> None:
    """Run all cells, seed after seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the quickstart's, or one of benchmarks/pairs.py")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=["embedded"], help="which cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--smoke", action="store_true", help="the first three cells of each grid, into runs/ablation-smoke")
    options = parser.parse_args()
    count = 3 if options.smoke else None
    cells = {name: settings for choice in options.grids for name, settings in list(GRIDS[choice]().items())[:count]}
    title = "ablation" if options.recipe == RECIPE or options.smoke else f"ablation-{pair_name(options.recipe)}"
    written = (Path("runs/ablation-smoke") if options.smoke else RESULTS) / title
    folder = (written.parent if options.smoke else options.runs) / pair_name(options.recipe)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in cells}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        ends = pool.submit(run_cell, options.recipe, None, 0, folder / "ends")
        futures = {
            (seed, name): pool.submit(run_cell, options.recipe, settings, seed, folder / f"{slug(name)}-{seed}")
            for seed in options.seeds
            for name, settings in cells.items()
        }
        for done, ((seed, name), future) in enumerate(futures.items(), start=1):
            results[name].append(future.result())
            kl = results[name][-1]["metrics"]["semalign"]["kl"]
            print(f"{done}/{len(futures)} {name}, seed {seed}: KL {kl:.4f}", flush=True)
            if done % len(cells) == 0:
                write(written, cells, ends.result()["metrics"], results, options.seeds)


if __name__ == "__main__":
    main()
