"""The ablation on the embedded pair: every choice at equal steps, three seeds, against ordinary distillation.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py --jobs 2

Each cell is one run of the quickstart's recipe, for 2,400 steps, with a few settings changed. A cell whose ``results.json``
exists is not run again. Prints a Markdown table, and writes it with all numbers to ``benchmarks/results/ablation.{md,json}``.
"""

import argparse
import itertools
import json
import logging
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "semalign.yaml"
RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
STEPS = 2400
PAIRINGS = ("attribution", "banded", "proportional", "uniform", "last")


def cells() -> dict[str, dict]:
    """Settings by name: the paper's strict frontier over pairing x scale x weight, then the other frontiers and KD."""
    grid = {"no layer loss": {"frontier": "single", "relation_weight": 0.0}}
    for pairing, scale, weight in itertools.product(PAIRINGS, ("none", "match"), (0.1, 1.0)):
        grid[f"{pairing}, scale {scale}, weight {weight:g}"] = {
            "frontier": "single", "pairing": pairing, "scale": scale, "relation_weight": weight,
        }  # fmt: skip
    for frontier, weight in itertools.product(("cumulative", "joint"), (0.0, 0.1, 1.0)):
        name = (
            "distillation (joint, no layer loss)" if (frontier, weight) == ("joint", 0.0) else f"{frontier}, weight {weight:g}"
        )
        grid[name] = {"frontier": frontier, "pairing": "banded", "scale": "match", "relation_weight": weight}
    for weight in (0.1, 1.0):
        grid[f"joint, last, scale none, weight {weight:g}"] = {
            "frontier": "joint", "pairing": "last", "scale": "none", "relation_weight": weight,
        }  # fmt: skip
    return grid


def run_cell(settings: dict, seed: int, folder: Path) -> dict:
    """Run one cell, or read what an earlier run of it left."""
    results = folder / "results.json"
    if not results.is_file():
        from hf_semalign.recipe import load_recipe, run_recipe

        logging.disable(logging.WARNING)
        changes = {
            **settings,
            "seed": seed,
            "max_steps": STEPS,
            "disable_tqdm": True,
            "logging_steps": 400,
            "log_level": "error",
        }
        overrides = [f"training.{key}={json.dumps(value)}" for key, value in changes.items()]
        run_recipe(load_recipe(RECIPE, [*overrides, "baselines=[]", f"output_dir={folder}"]))
    return json.loads(results.read_text())


def summarise(results: dict[str, list[dict]]) -> str:
    """A Markdown table: mean and standard deviation over seeds, best KL first."""
    skills = list(next(iter(results.values()))[0]["metrics"]["target"]["exact_match"])
    lines = ["| | KL | " + " | ".join(f"{skill} %" for skill in skills) + " |", "|---" * (len(skills) + 2) + "|"]
    before = next(iter(results.values()))[0]["metrics"]
    for name, role in (("*target before*", "target"), ("*source*", "source")):
        shares = " | ".join(f"{100 * before[role]['exact_match'][skill]:.1f}" for skill in skills)
        lines.append(f"| {name} | {before[role]['kl']:.3f} | {shares} |")
    rows = []
    for name, runs in results.items():
        after = [run["metrics"]["semalign"] for run in runs]
        shares = " | ".join(spread([100 * run["exact_match"][skill] for run in after], 1) for skill in skills)
        kl = [run["kl"] for run in after]
        rows.append((statistics.mean(kl), f"| {name} | {spread(kl, 3)} | {shares} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Run all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    grid = cells()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            (name, seed): pool.submit(run_cell, settings, seed, options.runs / f"{index:02d}-{seed}")
            for seed in SEEDS
            for index, (name, settings) in enumerate(grid.items())
        }
        for done, ((name, seed), future) in enumerate(futures.items(), start=1):
            print(
                f"{done}/{len(futures)} {name}, seed {seed}: KL {future.result()['metrics']['semalign']['kl']:.4f}", flush=True
            )
    results = {name: [futures[name, seed].result() for seed in SEEDS] for name in grid}
    table = summarise(results)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ablation.md").write_text(table + "\n")
    first = next(iter(results.values()))[0]
    numbers = {
        name: {"settings": grid[name], "metrics": [run["metrics"]["semalign"] for run in runs], "seeds": SEEDS}
        for name, runs in results.items()
    }
    (RESULTS / "ablation.json").write_text(
        json.dumps({"steps": first["steps"], "machine": first["machine"], "cells": numbers}, indent=1)
    )


if __name__ == "__main__":
    main()
