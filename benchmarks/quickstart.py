"""The quickstart over three seeds: what `make quickstart` shows, with its spread, time of each phase and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/quickstart.py

Runs the command of `make quickstart` once a seed, one after another. Prints Markdown tables, and writes them and all
numbers to ``benchmarks/results/quickstart.{md,json}``.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from ablation import RECIPE, RESULTS, SEEDS, spread

from hf_semalign.hub.card import METHOD_NAMES, method_order

LAUNCHER = RECIPE.parents[1] / "accelerate" / "single.yaml"


def run(seed: int, folder: Path) -> dict:
    """One run of the quickstart in a process of its own."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHER)]
    command = [*launch, str(RECIPE.parents[1] / "train.py"), "--config", str(RECIPE)]
    subprocess.run([*command, f"training.seed={seed}", f"output_dir={folder}"], check=True)
    return json.loads((folder / "results.json").read_text())


def summarise(runs: list[dict]) -> str:
    """Markdown: results by method, then seconds by phase and peak memory; mean and standard deviation over seeds."""
    first = runs[0]["metrics"]
    skills = list(first["target"]["exact_match"])
    lines = ["| | " + " | ".join(f"{skill} %" for skill in skills) + " | KL |", "|---" * (len(skills) + 2) + "|"]
    for method in method_order(first):
        values = [entry["metrics"][method] for entry in runs]
        shares = [spread([100 * value["exact_match"][skill] for value in values], 1) for skill in skills]
        kl = spread([value["kl"] for value in values], 3)
        lines.append(f"| {METHOD_NAMES[method]} | " + " | ".join([*shares, kl]) + " |")
    lines += ["", "| phase | seconds |", "|---|---|"]
    for phase in runs[0]["seconds"]:
        lines.append(f"| {phase} | {spread([entry['seconds'].get(phase, 0.0) for entry in runs], 1)} |")
    peak = statistics.mean(entry["peak_memory_mb"] for entry in runs)
    return "\n".join([*lines, "", f"Peak memory {peak:.0f} MB, {runs[0]['steps']} steps a method, {runs[0]['machine']}."])


def main() -> None:
    """Run all seeds and write the tables."""
    runs = [run(seed, Path("runs/benchmark") / f"quickstart-{seed}") for seed in SEEDS]
    table = summarise(runs)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quickstart.md").write_text(table + "\n")
    keep = ("steps", "metrics", "seconds", "peak_memory_mb", "machine")
    numbers = {seed: {key: entry[key] for key in keep} for seed, entry in zip(SEEDS, runs, strict=True)}
    (RESULTS / "quickstart.json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
