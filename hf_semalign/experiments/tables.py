"""Tables of a comparison as Markdown and LaTeX, computed from the content of ``compare.json``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_semalign.hub.card import escaped, pipe_table

PERCENT, PLAIN = 100.0, 1.0
SCORE_OF = "score:"  # prefix of the keys with the score of one of several benchmarks
FIXED = ("steps", "cost", "adapter_mb")  # equal for all seeds
#: Key, heading, factor and decimals of each column. Columns without any value are left out.
TABLE_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
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
    "Mean ± standard deviation over the seeds. Score: {score}. KL(source ‖ target) and the answer loss are in nats per token "
    "on held-out answers. Gap closed: the share of the distance from the target before training to the source, in score and in "
    "KL. Cost: see hf_semalign/experiments/plan.py. Seconds and peak memory are for the whole run, including evaluation."
)
FORGETTING_NOTE = (
    " Forgetting is measured on tasks that were not transferred: KL from the target before training, and the change in answer "
    "token accuracy."
)
PAIRED_NOTE = (
    " Ahead of {reference}: the mean paired difference over the problems of all benchmarks, with its bootstrap interval "
    "(hf_semalign/experiments/paired.py). If the interval contains zero, these problems do not tell the two methods apart."
)
COMPUTE_NOTE = " Under equal compute, each method takes as many steps as the compute of {reference} pays for."


def markdown(record: dict[str, Any]) -> str:
    """The tables as Markdown."""
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
    """Explain the columns below the tables."""
    keys = {key for one in record["tables"] for row in one["methods"] for key in row}
    score = "share of held-out rows answered correctly" if "score" in keys else "none here"
    said = NOTES.format(score=score) + FORGETTING_NOTE * ("forgotten_kl" in keys)
    if "ahead" in keys:
        said += PAIRED_NOTE.format(reference=escaped(record["reference"]))
    if any(one["budget"] == "equal compute" for one in record["tables"]):
        said += COMPUTE_NOTE.format(reference=escaped(record["reference"]))
    return said


def latex(record: dict[str, Any]) -> str:
    """The tables as LaTeX, for the package booktabs."""
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
    """The cells of a table as text. Its rows are the heading, the target before training, the methods and the source."""
    tasks = dict.fromkeys(key for row in one["methods"] for key in row if key.startswith(SCORE_OF))
    by_task = [(key, f"{key.removeprefix(SCORE_OF)} %", PERCENT, 1) for key in tasks]
    columns = [column for column in (*by_task, *TABLE_COLUMNS) if any(column[0] in row for row in one["methods"])]
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
    """Escape text for LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda found: special.get(found[0], "\\" + found[0]), " ".join(str(value).split()))
