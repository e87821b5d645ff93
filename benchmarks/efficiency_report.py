"""Tables and figure of ``efficiency.py`` from its numbers; as a command, it makes them anew without measuring again.

python benchmarks/efficiency_report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "efficiency.png"
METHODS = {"cached": "SemAlign, cached", "online": "SemAlign, online", "gkd": "GKD, lmbda 0"}
CURVES = {"depth": "target layers", "length": "tokens a sequence", "vocabulary": "vocabulary"}
CASES = {"pair": "epochs", "vocabulary32k": "vocabulary", **CURVES}
Runs = list[dict[str, Any]]


def step_seconds(result: dict[str, Any]) -> float:
    """Mean over the stages of their median step; the passes that a schedule makes between steps stand apart."""
    return statistics.mean(result["by_stage"])


def pass_seconds(result: dict[str, Any]) -> float:
    """What passes over the data cost for each step: the source's before training, and all that is done between steps."""
    return (result["source_pass"] + result["between"]) / len(result["steps"])


def grouped(runs: Runs) -> dict[tuple[int, str], Runs]:
    """Runs by what the case varies, and method, in the order of readers."""
    groups: dict[tuple[int, str], Runs] = {}
    for run in sorted(runs, key=lambda run: (run["spec"]["x"], list(METHODS).index(run["spec"]["method"]))):
        groups.setdefault((run["spec"]["x"], run["spec"]["method"]), []).append(run)
    return groups


def table(case: str, runs: Runs) -> str:
    """Markdown: one row a method and ``x``, then seconds a step by stage where stages are few."""
    schedule = case == "pair"  # elsewhere a few steps are no schedule whose seconds mean anything
    columns = ["method", CASES[case], *(["seconds", "tokens/s"] if schedule else [])]
    columns += ["s a step", "first stage", "last stage", "passes, s a step", "peak MB", "peak MB over start"]
    rows, longer, stages = [], [], []
    groups = grouped(runs)
    for (x, method), members in groups.items():
        spec, results = members[0]["spec"], [run["result"] for run in members]
        by_stage = [statistics.median(values) for values in zip(*(r["by_stage"] for r in results), strict=True)]
        cells = [METHODS[method], f"{x:,}"]
        if schedule:
            cells += [spread(r["seconds"] for r in results), spread(r["tokens"] / r["seconds"] for r in results)]
        cells += [spread(map(step_seconds, results)), number(by_stage[0]), number(by_stage[-1])]
        cells += [spread(map(pass_seconds, results)), spread(r["peak_mb"] for r in results)]
        rows.append([*cells, spread(r["peak_mb"] - r["resident_before_mb"] for r in results)])
        if "extrapolate" in spec and method != "cached":
            factor = spec["extrapolate"] / spec["steps"]
            speed = spread(factor * r["tokens"] / r["extrapolated"] for r in results)
            longer.append(
                [METHODS[method], f"{factor * x:.0f}, from {x} \\*", spread(r["extrapolated"] for r in results), speed]
            )
        if 1 < len(by_stage) <= 12:
            stages.append(f"- {METHODS[method]}, {x:,}: " + ", ".join(map(number, by_stage)))
    rows += [row + [""] * (len(columns) - len(row)) for row in longer]
    lines = [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]
    repeats = len(next(iter(groups.values())))
    lines += ["", f"{repeats} process{'es' * (repeats > 1)} each: median (smallest to largest). All tokens count, prompts too."]
    if longer:
        lines.append("\\* Not run: the shorter run's seconds, and for each further step the median of its stage there.")
    return "\n".join([*lines, *(["", "Seconds a step by stage:", "", *stages] if stages else [])])


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Iterable[float]) -> str:
    """Median, smallest and largest."""
    values = list(values)
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def write(results: dict[str, Any], folder: Path, image: Path) -> None:
    """Write ``efficiency.json`` and ``efficiency.md``, and the figure once all curves are there.

    Args:
        results: by case, ``runs`` (each with its ``spec`` and ``result``) and ``machine``.
        folder: where tables and numbers go.
        image: path of the figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "efficiency.json").write_text(json.dumps(results, indent=1))
    tables = [f"## {case}\n\n{table(case, results[case]['runs'])}\n" for case in CASES if case in results]
    (folder / "efficiency.md").write_text("\n".join(tables))
    if results.keys() >= CURVES.keys():
        draw({case: results[case]["runs"] for case in CURVES}, image)


def draw(curves: dict[str, Runs], path: Path) -> None:
    """Seconds a step, its share of the passes included, and peak memory, against depth, length and vocabulary."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hf_semalign.experiments.figures import BASELINE_COLOURS, BLUE, STYLE

    looks = {"cached": (BLUE, "o-"), "online": (BASELINE_COLOURS[3], "s--"), "gkd": (BASELINE_COLOURS[0], "^-.")}
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        panels = figure.subplots(2, 3, sharex="col")
        for column, (case, runs) in enumerate(curves.items()):
            groups = grouped(runs)
            places = sorted({x for x, _ in groups})
            for method, (colour, style) in looks.items():
                members = [[run["result"] for run in groups[x, method]] for x in places]
                seconds = [statistics.median(step_seconds(r) + pass_seconds(r) for r in some) for some in members]
                memory = [statistics.median(r["peak_mb"] / 1024 for r in some) for some in members]
                for axes, values in zip(panels[:, column], (seconds, memory), strict=True):
                    axes.plot(places, values, style, color=colour, label=METHODS[method], clip_on=False)
            for axes in panels[:, column]:
                axes.set(xscale="log", ylim=(0, None))
                axes.minorticks_off()
                axes.set_xticks(places, [str(x) if x < 1000 else f"{x / (1000 if x % 1024 else 1024):.0f}k" for x in places])
            panels[1, column].set_xlabel(CURVES[case])
        panels[0, 0].set_ylabel("seconds a step")
        panels[1, 0].set_ylabel("peak memory (GB)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    write(json.loads((RESULTS / "efficiency.json").read_text()), RESULTS, IMAGE)
