"""Figures of runs, comparisons and analyses, each saved as PNG and SVG.

They use matplotlib without pyplot, and the colours of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_semalign.hub.card import KL_LABEL, METHOD_NAMES, method_order

WIDTH = 6.4  # inches; 12 point text stays legible at half this width
BLUE, GREY, BLACK = "#0072B2", "#BBBBBB", "#333333"
BASES = {
    "output": (BLUE, "output-side bases"), "head": ("#009E73", "rows of the head"),
    "input": ("#E69F00", "input-side bases"), "random": ("#666666", "random bases"),
}  # fmt: skip
BASELINE_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
FEW_TICKS: dict[str, Any] = {"nbins": 4, "steps": [1, 2, 5, 10]}
STYLE: dict[Any, Any] = {
    "font.size": 12, "legend.fontsize": 11, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "hf_semalign",  # make files reproducible
}  # fmt: skip


def draw_layers(record: dict[str, Any], folder: Path, name: str = "layers") -> Path:
    """Draw the layer pairs, and the attribution scores of the source layers if the record has any.

    Args:
        record: content of ``semalign.json``.
        folder: folder for the PNG and the SVG.
        name: file name without suffix.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_layers_figure(record), folder, name)


def draw_losses(results: dict[str, Any], record: dict[str, Any], folder: Path) -> Path:
    """Draw KL and layer loss over the optimizer steps, with the stages of the frontier.

    Args:
        results: content of ``results.json``.
        record: content of ``semalign.json``.
        folder: folder for ``losses.png`` and ``losses.svg``.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_losses_figure(results, record), folder, "losses")


def draw_comparison(results: dict[str, Any], folder: Path) -> Path:
    """Draw held-out KL for all methods, and exact match by skill if it was measured.

    Args:
        results: content of ``results.json``.
        folder: folder for ``comparison.png`` and ``comparison.svg``.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_comparison_figure(results), folder, "comparison")


def draw_vectors(record: dict[str, Any], folder: Path) -> Path:
    """Draw the cosine between each layer's output and its recomposition of kind ``cosine`` (figure 2).

    Args:
        record: for ``source`` and ``target``, what :func:`hf_semalign.experiments.analysis.recomposition_cosines` returns.
        folder: folder for ``vectors.png`` and ``vectors.svg``.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_vectors_figure(record), folder, "vectors")


def draw_cka(record: dict[str, Any], folder: Path) -> Path:
    """Draw CKA between source and target layers, without and with alignment, as heat maps (figure 4).

    Args:
        record: what :func:`hf_semalign.experiments.analysis.layer_cka` returns.
        folder: folder for ``cka.png`` and ``cka.svg``.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_cka_figure(record), folder, "cka")


def draw_gaps(record: dict[str, Any], folder: Path) -> Path:
    """Draw how much of the gap between target and source each method closes, with one panel per task.

    Args:
        record: what :func:`hf_semalign.experiments.compare.summary` returns.
        folder: folder for ``compare.png`` and ``compare.svg``.

    Returns:
        Path of the PNG.
    """
    with rc_context(STYLE):
        return _save(_gaps_figure(record), folder, "compare")


def _save(figure: Figure, folder: Path, name: str) -> Path:
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", dpi=150)
    return folder / f"{name}.png"


def _layers_figure(record: dict[str, Any]) -> Figure:
    pairing = record["pairing"]
    depth, chosen, scores = pairing["num_source_layers"], pairing["source_layers"], pairing["scores"]
    height = min(5.2, 3 + 0.08 * max(depth, len(chosen)))
    figure = Figure(figsize=(WIDTH if scores else 0.6 * WIDTH, height), layout="constrained")
    if scores:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        paired = set(chosen)
        for name, colour, layers in (("paired", BLUE, paired), ("not paired", GREY, set(range(depth)) - paired)):
            if layers:
                left.barh(list(layers), [scores[layer] for layer in layers], color=colour, height=0.8, label=name)
        left.set(xlabel="attribution score (nats)", ylabel="source layer (from 0)")
        left.set(ylim=(-0.6, depth - 0.4), yticks=_thinned(depth))
        left.xaxis.set(major_locator=MaxNLocator(**FEW_TICKS), major_formatter="{x:g}")
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1, borderaxespad=0.2)
    else:
        right = figure.subplots()
        right.set_ylabel("layer (from 0)")
    _draw_pairs(right, chosen, depth)
    return figure


def _draw_pairs(axes: Axes, chosen: list[int], depth: int) -> None:
    """Draw two columns of layers of the same height, and one line per pair."""
    width = len(chosen)
    heights = [k * (depth - 1) / (width - 1) if width > 1 else (depth - 1) / 2 for k in range(width)]
    size = max(2.5, min(9.0, 250 / max(depth, width)))  # points
    for layer, height in zip(chosen, heights, strict=True):
        axes.plot([0, 1], [layer, height], color=BLUE, linewidth=max(1, size / 4), solid_capstyle="round")
    left_out = [layer for layer in range(depth) if layer not in chosen]
    for x, layers, colour in ((0, left_out, GREY), (0, chosen, BLUE), (1, heights, BLUE)):
        if layers:
            axes.plot([x] * len(layers), layers, "s", color=colour, markersize=size, markeredgewidth=0, clip_on=False)
    axes.set(xlim=(-0.08, 1.08), ylim=(-0.6, depth - 0.4), yticks=_thinned(depth))
    axes.set_xticks([0, 1], [f"source\n{depth} layers", f"target\n{width} layers"])
    other = axes.secondary_yaxis("right")
    other.set_yticks([heights[k] for k in _thinned(width)], [str(k) for k in _thinned(width)])
    for side in (axes, other):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)


def _thinned(count: int, most: int = 12) -> list[int]:
    """A subset of ``0 .. count - 1`` at round distances, always including the last."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if count <= most * step)
    return [*range(0, count - 1 - step // 2, step), count - 1]


def _losses_figure(results: dict[str, Any], record: dict[str, Any]) -> Figure:
    layer_loss = record["settings"]["layer_loss"]
    names = {
        "kl": f"{KL_LABEL}\n(nats per token)", "cosine": "1 - cos at the output\n(no unit)",
        "answers": "cross-entropy of the answers\n(nats per token)",
        layer_loss: f"{layer_loss} loss\n(no unit)",
    }  # fmt: skip
    drawn = [term for term in names if any(term in entry for entry in results["history"])]
    figure = Figure(figsize=(WIDTH, 1.4 + 1.7 * max(1, len(drawn))), layout="constrained")
    panels = list(figure.subplots(max(1, len(drawn)), sharex=True, squeeze=False)[:, 0])
    if not drawn:
        panels[0].set(title="no losses were logged", yticks=[])
    for axes, term in zip(panels, drawn, strict=False):
        entries = [entry for entry in results["history"] if term in entry]
        # Each stage has the loss of its own layers, so no line joins two stages.
        stages = sorted({entry["stage"] for entry in entries}) if term == layer_loss else [None]
        for stage in stages:
            steps, values = zip(*[(e["step"], e[term]) for e in entries if stage in (None, e["stage"])], strict=True)
            style = "o-" if len(steps) < 40 else "-"
            axes.plot(steps, values, style, color=BLUE, linewidth=1.5, markersize=3, clip_on=False)
        axes.set(ylabel=names[term], ylim=(0, None))
        axes.yaxis.set(major_locator=MaxNLocator(**FEW_TICKS), major_formatter="{x:g}")
    if len(record["stages"]) > 2:
        _mark_stages(panels, record["stages"])
    panels[-1].set(xlabel="optimizer step", xlim=(0, record["stages"][-1]))
    figure.align_ylabels()
    return figure


def _mark_stages(panels: Sequence[Axes], boundaries: list[int]) -> None:
    """Shade every second stage, and number the stages above the first panel."""
    spans = list(pairwise(boundaries))
    for axes, span in product(panels, spans[1::2]):
        axes.axvspan(*span, color="#EEEEEE", linewidth=0, zorder=0)
    shown = _thinned(len(spans))
    top = panels[0].secondary_xaxis("top")
    top.set_xticks([sum(spans[k]) / 2 for k in shown], [str(k + 1) for k in shown])
    top.set_xlabel("stage")
    top.tick_params(length=0)
    top.spines[:].set_visible(False)


def _comparison_figure(results: dict[str, Any]) -> Figure:
    metrics = {method: results["metrics"][method] for method in method_order(results["metrics"])}
    colours = {"target": GREY, "semalign": BLUE, "source": BLACK}
    baselines = [method for method in metrics if method not in colours]
    colours |= dict(zip(baselines, cycle(BASELINE_COLOURS), strict=False))
    shares = {method: values["exact_match"] for method, values in metrics.items() if values.get("exact_match")}
    kl = {method: values["kl"] for method, values in metrics.items() if method != "source"}
    if not shares:
        figure = Figure(figsize=(WIDTH, 1.1 + 0.4 * len(kl)), layout="constrained")
        _draw_kl(axes := figure.subplots(), kl, colours)
        axes.set_yticks(range(len(kl)), [METHOD_NAMES.get(method, method) for method in kl])
        return figure
    skills = list(dict.fromkeys(skill for values in shares.values() for skill in values))
    wider = min(2.5, max(1.0, len(skills) * len(shares) / 30))
    figure = Figure(figsize=(WIDTH * wider, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25 * wider, 1))
    _draw_shares(left, shares, skills, colours)
    _draw_kl(right, kl, colours)
    figure.legend(loc="outside upper center", ncols=2 if len(shares) < 5 else 3, handlelength=1)
    return figure


def _draw_shares(axes: Axes, shares: dict[str, dict[str, float]], skills: list[str], colours: dict[str, str]) -> None:
    """Draw one group of bars per skill, with one bar per method."""
    width = 0.84 / len(shares)
    for place, (method, values) in enumerate(shares.items()):
        middles = [k + (place - (len(shares) - 1) / 2) * width for k in range(len(skills))]
        heights = [100 * values.get(skill, math.nan) for skill in skills]
        axes.bar(middles, heights, width, color=colours[method], label=METHOD_NAMES.get(method, method))
    axes.set(ylabel="exact match (%)", ylim=(0, 100))
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, skills)) > 26 else {}
    axes.set_xticks(range(len(skills)), skills, **slanted)
    axes.tick_params(axis="x", length=0)


def _draw_kl(axes: Axes, kl: dict[str, float], colours: dict[str, str]) -> None:
    """Draw one labelled bar per method, the first on top."""
    bars = axes.barh(range(len(kl)), list(kl.values()), color=[colours[method] for method in kl], height=0.75)
    axes.bar_label(bars, [f"{value:#.2g}".rstrip(".") for value in kl.values()], fontsize=11, padding=3)
    axes.set(xlabel=f"held-out {KL_LABEL}\n(nats per token)", xmargin=0.25, yticks=[], ylim=(len(kl) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set(major_locator=MaxNLocator(**FEW_TICKS), major_formatter="{x:g}")


def _gaps_figure(record: dict[str, Any]) -> Figure:
    """Share of the gap closed, with standard deviations. It is measured by score, or by KL for tasks without a score."""
    tasks = list(dict.fromkeys(table["task"] for table in record["tables"]))
    names = list(dict.fromkeys(row["name"] for table in record["tables"] for row in table["methods"]))
    budgets = list(dict.fromkeys(table["budget"] for table in record["tables"]))
    figure = Figure(figsize=(WIDTH, 0.9 + len(tasks) * (0.8 + 0.36 * len(names))), layout="constrained")
    panels = list(figure.subplots(len(tasks), squeeze=False)[:, 0])
    for axes, task in zip(panels, tasks, strict=True):
        tables = [table for table in record["tables"] if table["task"] == task]
        key = "closed" if any("closed" in row for table in tables for row in table["methods"]) else "kl_closed"
        for table in tables:
            place = budgets.index(table["budget"])
            shift = 0.2 * (place - (len(budgets) - 1) / 2)
            rows = [row for row in table["methods"] if key in row]
            axes.errorbar(
                [100 * row[key]["mean"] for row in rows],
                [names.index(row["name"]) + shift for row in rows],
                xerr=[100 * (row[key]["std"] or 0) for row in rows],
                fmt=("o", "D")[place], color=(BLUE, "#E69F00")[place], markersize=6, capsize=3, label=table["budget"],
            )  # fmt: skip
        axes.axvline(0, color=GREY, linewidth=1, zorder=0)
        axes.axvline(100, color=GREY, linewidth=1, zorder=0)
        what = "score" if key == "closed" else KL_LABEL
        axes.set(title=task, xlabel=f"gap to the source closed, by {what} (%)", ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set(major_locator=MaxNLocator(**FEW_TICKS), major_formatter="{x:g}")
    if len(budgets) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=1)
    return figure


def _vectors_figure(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, role in zip(panels, ("source", "target"), strict=True):
        for basis, (colour, label) in BASES.items():
            cosines = record[role]["cosines"]["cosine"][basis]
            depth = len(cosines["layers"])
            style = "o-" if depth < 20 else "-"
            axes.plot(
                range(depth), cosines["layers"], style, color=colour, linewidth=2, markersize=5, label=label, clip_on=False
            )
            axes.axhline(cosines["random_states"], color=colour, linewidth=1.5, linestyle=":")
        axes.set(title=f"{role}{', tied embeddings' if record[role]['tied'] else ''}", xlabel="layer (from 0)")
        axes.set(xticks=_thinned(depth, 8), ylim=(0, 1))
    panels[0].set_ylabel("cosine before and after")
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=BLACK, linewidth=1.5, linestyle=":"))
    figure.legend(handles, [*labels, "random states in the same bases"], loc="outside upper center", ncols=2, handlelength=1.5)
    return figure


def _cka_figure(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, title in zip(panels, ("unaligned", "aligned"), ("without alignment", "with alignment"), strict=True):
        values = record[name]
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="target layer (from 0)", xticks=_thinned(len(values[0]), 6), yticks=_thinned(len(values)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("source layer (from 0)")
    figure.colorbar(image, ax=panels, label="linear CKA, debiased", ticks=[0, 0.25, 0.5, 0.75, 1])
    return figure
