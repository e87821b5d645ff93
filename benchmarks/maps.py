"""The map between two heads: accuracy, time beside ``torch.linalg.pinv`` of both heads, and memory.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/maps.py [--smoke]

Random heads of a given condition number, in bfloat16 where costs are measured: each case in a process of its own, contenders
in turn, in wall seconds and in processor seconds of all threads, with the machine's load at the end. Prints Markdown tables,
and writes them and all numbers to ``benchmarks/results/maps.{md,json}`` after each case (not with ``--smoke``). Linux only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_semalign.method import semantic_map as semantics
from hf_semalign.method.semantic_map import KINDS, SemanticMap

RESULTS = Path(__file__).parent / "results"
PINVS = ("pinv float64", "pinv float32")
Case = dict[str, Any]  # what to measure; then, with its results, a row of a table


def heads(case: Case) -> list[torch.Tensor]:
    """Source and target head ``[V, D]`` in bfloat16, made in place: columns whose lengths span the condition number."""
    torch.manual_seed(0)
    made = []
    for width in case["widths"]:
        head = torch.empty(case["V"], width, dtype=torch.bfloat16).normal_()
        made.append(head.mul_(torch.tensor(case["condition"]).pow(-torch.linspace(0, 1, width)).bfloat16()))
    return made


def peak_memory() -> float:
    """Peak resident memory of this process in MB; unlike ``ru_maxrss`` it does not begin with the parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def cost(case: Case) -> Case:
    """Time, and peak memory in MB beyond the heads, of a map or of the pseudoinverses of both heads."""
    weights, method = heads(case), case["method"]

    def run(source: torch.Tensor, target: torch.Tensor) -> None:
        if method in KINDS:
            SemanticMap.from_heads(source, target, kind=method)
        else:
            for head in (source, target):
                torch.linalg.pinv(head.to(getattr(torch, method.removeprefix("pinv "))))

    run(*(head[:64, :8] for head in weights))  # loads the libraries
    before, cpu, start = peak_memory(), time.process_time(), time.perf_counter()
    run(*weights)
    seconds = {"seconds": time.perf_counter() - start, "processor": time.process_time() - cpu}
    return case | seconds | {"MB": peak_memory() - before, "load": os.getloadavg()[0]}


def accuracy(case: Case) -> Case:
    """Relative errors against ``torch.linalg.pinv`` in float64: of the map, of one Gram matrix alone, of pinv in float32."""
    source, target = (rotated(head, case["condition"]) for head in heads(case | {"condition": 1.0}))
    exact = by_pinv(case["method"], source, target)

    def error(matrix: torch.Tensor) -> float:
        return float((matrix - exact).norm() / exact.norm())

    errors = {"map": error(SemanticMap.from_heads(source, target, kind=case["method"]).matrix)}
    with mock.patch.object(semantics, "TOLERANCE", float("inf")):
        errors["one Gram matrix"] = error(SemanticMap.from_heads(source, target, kind=case["method"]).matrix)
    return case | errors | {PINVS[1]: error(by_pinv(case["method"], source.float(), target.float()))}


def rotated(head: torch.Tensor, condition: float) -> torch.Tensor:
    """A head in float64 with the singular vectors of another; its values are evenly spaced in logarithm."""
    left, values, right = torch.linalg.svd(head.double(), full_matrices=False)
    return left * condition ** -torch.linspace(0, 1, len(values), dtype=torch.float64) @ right


def by_pinv(kind: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The map's matrix as the method's equations have it."""
    if kind != "readout":
        source = torch.linalg.pinv(source).T
    if kind == "cosine":
        source = source / source.norm(dim=1, keepdim=True)
    return (torch.linalg.pinv(target) @ source).double()


def measured(case: Case) -> Case:
    """What a case costs in a fresh process."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(keys: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [keys, ["---"] * len(keys), *rows])


def accuracy_table(rows: list[Case]) -> str:
    """A row a condition number and kind."""
    errors = ["map", "one Gram matrix", PINVS[1]]
    return table(
        ["condition", "kind", *errors],
        [[f"{row['condition']:.0e}", row["method"], *(f"{row[key]:.1e}" for key in errors)] for row in rows],
    )


def cost_table(rows: list[Case]) -> str:
    """A row a method and condition number: medians and ranges over its repeats."""
    groups: dict[tuple[str, float], list[Case]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["condition"]), []).append(row)
    lines = []
    for (method, condition), group in groups.items():
        cells = [method, f"{condition:.0e}", str(len(group))]
        for key, digits in (("seconds", 1), ("processor", 1), ("MB", 0), ("load", 1)):
            low, median, high = (f([row[key] for row in group]) for f in (min, statistics.median, max))
            cells.append(f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})")
        lines.append(cells)
    return table(["method", "condition", "runs", "seconds", "processor seconds", "MB over the heads", "load"], lines)


def report(machine: str, numbers: dict[str, list[Case]]) -> str:
    """Markdown: a table for each title that has results."""
    parts = [machine]
    for title, rows in numbers.items():
        if rows:
            source, target = (f"{rows[0]['V']:,} x {width:,}" for width in rows[0]["widths"])
            lines = (accuracy_table if title == "Accuracy" else cost_table)(rows)
            parts.append(f"{title}: {source} (source), {target} (target)\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure all cases, with ``--smoke`` small ones, or a single one for :func:`measured`."""
    if "--case" in sys.argv:
        print(json.dumps(cost(json.loads(sys.argv[-1]))))
        return
    smoke = "--smoke" in sys.argv
    few, medium, large = ((600, (48, 32)),) * 3 if smoke else ((2000, (300, 200)), (32000, (2048, 1024)), (32000, (5120, 4096)))
    conditions = (1e4,) if smoke else (1.0, 1e2, 1e4, 1e6)
    contenders = [*((kind, 1.0) for kind in KINDS), (PINVS[0], 1.0)] * (1 if smoke else 3)
    once = [("readout", 1e4), (PINVS[1], 1.0)]
    plan = {
        "Accuracy": (few, accuracy, [(kind, c) for c in conditions for kind in KINDS]),
        "Time": (medium, measured, contenders + once),
        "Memory": (large, measured, [("readout", 1.0), ("cosine", 1e4)]),
    }
    machine = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"
    numbers: dict[str, list[Case]] = {title: [] for title in plan}
    for title, ((rows, widths), measure, cases) in plan.items():
        for method, condition in cases:
            numbers[title].append(measure({"V": rows, "widths": widths, "method": method, "condition": condition}))
            if not smoke:
                (RESULTS / "maps.md").write_text(report(machine, numbers))
                (RESULTS / "maps.json").write_text(json.dumps({"machine": machine, **numbers}, indent=1) + "\n")
    print(report(machine, numbers))


if __name__ == "__main__":
    main()
