"""Tables of a comparison, as Markdown and as LaTeX: a pure function of what ``compare.json`` holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_semalign.hub.card import escaped, pipe_table

PERCENT, PLAIN = 100.0, 1.0
SCORE_OF = "score:"  # and the name of one of several benchmarks
FIXED = ("steps", "cost", "adapter_mb")  # the same for all seeds
#: Columns: key, heading, unit's factor, decimals; one that no row has is left out.
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("score", "score %", PERCENT, 1),
    ("ahead", "ahead of {reference} (points, 95 %)", PERCENT, 1),
    ("kl", "KL", PLAIN, 3),
    ("loss", "answer loss", PLAIN, 3),
    ("gap", "gap to source (points)", PERCENT, 1),
    ("closed", "gap closed %", PERCENT, 0),
    ("kl_closed", "KL closed %", PERCENT, 0),
    ("forgotten_kl", "forgetting: KL", PLAIN, 3),
    ("accuracy_change", "forgetting: accuracy (points)", PERCENT, 1),
    ("steps", "steps", PLAIN, 0),
    ("cost", "cost (1,000 target forwards)", 1e-3, 1),
    ("seconds", "seconds", PLAIN, 0),
    ("memory_mb", "memory (MB)", PLAIN, 0),
    ("adapter_mb", "adapter (MB)", PLAIN, 2),
)
NOTES = (
    "Mean ± standard deviation over the seeds. Score: {score}. KL(source ‖ target) and the answer loss are in nats a token on "
    "held-out answers. Gap closed: the share of the way from the target before to the source, in score and in KL. "
    "Cost: see hf_semalign/experiments/plan.py; seconds and peak memory are of the whole run, evaluations included."
)
FORGETTING = " Forgetting, on tasks that were not transferred: KL from the target before, and the change in answer tokens hit."
PAIRED = (
    " Ahead of {reference}: the mean difference problem by problem, on all benchmarks together, with its paired bootstrap "
    "interval (hf_semalign/experiments/paired.py); where that holds zero, these problems do not tell the two apart."
)
EQUAL_COMPUTE = " Under equal compute each method takes as many steps as cost what those of {reference} do."


def markdown(record: dict[str, Any]) -> str:
    """The tables for readers of a repository."""
    pair = record["pair"]
    blocks = [f"# {escaped(pair['source'])} to {escaped(pair['target'])}"]
    for one in record["tables"]:
        heading = f"## {escaped(one['task'])}, {escaped(one['budget'])}"
        blocks.append(f"{heading}\n\n{pipe_table(_cells(one, record['reference'], escaped, '±'), '--:')}")
        blocks += map(escaped, one.get("left_out", []))
    if record["tables"]:
        blocks.append(notes(record))
    if record["reported"]:
        reported = record["reported"]
        title = f"## Reported, under another protocol ({escaped(reported['origin'])})"
        blocks.append(f"{title}\n\n{pipe_table(_reported(reported, escaped), '--:')}")
    return "\n\n".join(blocks) + "\n"


def notes(record: dict[str, Any]) -> str:
    """What the columns mean."""
    keys = {key for one in record["tables"] for row in one["methods"] for key in row}
    score = "share of held-out rows that are right" if "score" in keys else "none here"
    said = NOTES.format(score=score) + FORGETTING * ("forgotten_kl" in keys)
    if "ahead" in keys:
        said += PAIRED.format(reference=escaped(record["reference"]))
    if any(one["budget"] == "equal compute" for one in record["tables"]):
        said += EQUAL_COMPUTE.format(reference=escaped(record["reference"]))
    return said


def latex(record: dict[str, Any]) -> str:
    """The tables for papers; needs the package booktabs."""
    blocks = []
    for one in record["tables"]:
        blocks.append(_tabular(_cells(one, record["reference"], tex, r"$\pm$"), f"{tex(one['task'])}, {tex(one['budget'])}"))
        blocks += [f"% {tex(sentence)}" for sentence in one.get("left_out", [])]
    if record["reported"]:
        title = f"Reported, under another protocol ({tex(record['reported']['origin'])})"
        blocks.append(_tabular(_reported(record["reported"], tex), title))
    return "\n\n".join(blocks) + "\n"


def _tabular(rows: Sequence[Sequence[str]], title: str) -> str:
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            f"% {title}",
            rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _cells(one: dict[str, Any], reference: str, escape: Callable[[Any], str], plus_minus: str) -> list[list[str]]:
    """A table as text: heading, the target before, the methods, the source."""
    tasks = dict.fromkeys(key for row in one["methods"] for key in row if key.startswith(SCORE_OF))
    by_task = [(key, f"{key.removeprefix(SCORE_OF)} %", PERCENT, 1) for key in tasks]
    columns = [column for column in (*by_task, *COLUMNS) if any(column[0] in row for row in one["methods"])]
    rows = [["Method", *(escape(heading.format(reference=reference)) for _, heading, _, _ in columns)]]
    for row, name in [
        (one["target"], "Target before"),
        *((row, row["name"]) for row in one["methods"]),
        (one["source"], "Source"),
    ]:
        cells = [
            _cell(row.get(key), factor, decimals, "" if key in FIXED else plus_minus) for key, _, factor, decimals in columns
        ]
        rows.append([escape(name), *cells])
    return rows


def _cell(value: Any, factor: float, decimals: int, plus_minus: str) -> str:
    if value is None:
        return "-"
    mean, spread = (value["mean"], value.get("std")) if isinstance(value, dict) else (value, None)
    shown = f"{factor * mean:z,.{decimals}f}"
    if isinstance(value, dict) and "low" in value:
        return (
            f"{factor * mean:+z,.{decimals}f} [{factor * value['low']:z,.{decimals}f}, {factor * value['high']:z,.{decimals}f}]"
        )
    return shown if spread is None or not plus_minus else f"{shown} {plus_minus} {factor * spread:,.{decimals}f}"


def _reported(reported: dict[str, Any], escape: Callable[[Any], str]) -> list[list[str]]:
    tasks = list(dict.fromkeys(task for row in reported["rows"].values() for task in row))
    rows = [["Method", *(escape(f"{task} %") for task in tasks)]]
    for name, found in reported["rows"].items():
        rows.append([escape(name), *(f"{found[task]:.2f}" if task in found else "-" for task in tasks)])
    return rows


def tex(value: Any) -> str:
    """Text as LaTeX shows it to the letter."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda found: special.get(found[0], "\\" + found[0]), " ".join(str(value).split()))
