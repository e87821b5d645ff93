"""Report a run or a comparison as one HTML page with embedded figures. The page needs no network.

The text is the model card, rendered again from record and results with all data escaped. markdown-it converts it to HTML with
raw HTML disabled. Pictures are data URIs. A Content-Security-Policy blocks scripts and all other resources.
"""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from hf_semalign.errors import InputError
from hf_semalign.experiments.tables import markdown
from hf_semalign.files import RECORD_NAME, make_folder, read_json, write_text
from hf_semalign.hub.card import escaped, pipe_table, render_card
from hf_semalign.hub.reading import BenchmarksFile, ComparisonFile, read_record, read_results

FOLDED = ("Data", "Settings", "Versions", "Citation")  # collapsed sections
ANALYSES = {
    "vectors": "How well vocabulary bases reconstruct hidden states, by layer.",
    "cka": "How similar source and target layers are (linear CKA), without and with the map.",
}
NOT_OURS = (AttributeError, KeyError, TypeError, UndefinedError)  # from JSON that this package did not write
NO_RESULTS: dict[str, Any] = {
    "task": "its training data", "dataset": None, "metrics": {}, "history": [], "seconds": {}, "peak_memory_mb": None,
    "machine": {}, "figures": [],
}  # fmt: skip
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1b1f24; --dim: #57606a; --page: #ffffff; --panel: #f6f8fa; --line: #d0d7de; --link: #0a5cc2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6edf3; --dim: #9aa4af; --page: #0d1117; --panel: #161b22; --line: #30363d; --link: #79b8ff; }}
}}
body {{ margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }}
a {{ color: var(--link); }}
.table, pre {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }}
th {{ background: var(--panel); }}
td[style*="right"] {{ white-space: nowrap; }}
pre {{ background: var(--panel); padding: .8rem 1rem; border-radius: 6px; font-size: .85rem; }}
figure {{ margin: 1.2rem 0; }}
figure img {{ max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }}
figcaption, .about {{ color: var(--dim); font-size: .9rem; }}
details {{ margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; }}
summary {{ cursor: pointer; font-weight: 600; }}
@media print {{
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  figure, tr {{ break-inside: avoid; }}
}}
</style>
</head>
<body>
<main>
{body}
<p class="about">{about}</p>
</main>
</body>
</html>
"""


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page for a run or a comparison.

    Args:
        folder: the folder that ``semalign train`` or ``semalign compare`` wrote.
        output: the HTML file, by default ``report.html`` in ``folder``.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: ``folder`` holds neither a run nor a comparison.
        ValueError: a file in ``folder`` is damaged, or ``output`` is a folder.
        OSError: ``output`` cannot be written.
    """
    folder = Path(folder)
    path = Path(output) if output is not None else folder / "report.html"
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file, such as {path / 'report.html'}.")
    page = _of_comparison(folder) if (folder / "compare.json").is_file() else _of_run(folder)
    make_folder("output", path.parent)
    write_text(path, page)
    return path


def _of_comparison(folder: Path) -> str:
    text = markdown(read_json(folder / "compare.json", ComparisonFile))
    return render_page(text, {"All methods": _picture(folder / "compare.png")}, f"Comparison {folder.name}.")


def _of_run(folder: Path) -> str:
    record = read_record(folder)
    results = read_results(folder, record) or {**NO_RESULTS, "steps": max(record.get("stages", [0]))}
    text = render_card(record, {**results, "figures": []}).partition("\n---\n")[2]
    if (path := folder / "benchmarks.json").is_file():
        scored = read_json(path, BenchmarksFile)
        if scored["adapter_checksum"] != record["adapter_checksum"]:
            raise InputError(f"{path} is from another adapter: run `semalign evaluate` again, or delete the file.")
        text += f"\n## Benchmarks\n\n{_benchmarks(scored['benchmarks'])}\n"
    captions = {
        "layers": "The source layer that supervises each target layer, and attribution scores if there are any.",
        "losses": "Training losses over the optimizer steps.",
        "comparison": "Held-out results of all methods.",
    }
    wanted = {caption: _picture(folder / "figures" / f"{name}.png") for name, caption in captions.items()}
    wanted |= {caption: _picture(folder / "analysis" / f"{name}.png") for name, caption in ANALYSES.items()}
    if not results["metrics"]:
        heading, _, rest = text.strip().partition("\n\n")
        text = f"{heading}\n\n**There are no results: the run was not evaluated, or has not finished.**\n\n{rest}"
    return render_page(text, wanted, f"Run folder {folder.name}, record {RECORD_NAME}.")


def _benchmarks(entries: Sequence[dict[str, Any]]) -> str:
    rows = [["Task", "Metric", "%", "Rows"]]
    for entry in entries:
        rows.append([escaped(entry["task"]), escaped(entry["metric"]), f"{100 * entry['value']:.1f}", f"{entry['rows']:,}"])
    return f"{pipe_table(rows)}\n\nScored by lm-eval, zero-shot and greedy. `benchmarks.json` has settings and standard errors."


def render_page(text: str, pictures: dict[str, str | None], about: str) -> str:
    """Render Markdown and pictures as an HTML page.

    Args:
        text: a heading, a summary and sections. All data in it must be escaped.
        pictures: data URIs by caption, placed after the results. ``None`` is left out.
        about: origin of the page, for the footer.
    """
    head, *sections = re.split(r"^## ", text.strip(), flags=re.MULTILINE)
    sections.sort(key=lambda section: section.startswith("Use\n"))  # in a report, results come before usage
    figures = "".join(
        f'<figure><img src="{source}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for caption, source in pictures.items()
        if source is not None
    )
    parts = [_html(head)]
    for section in sections:
        name = section.partition("\n")[0].strip()
        body = _html("## " + section)
        if name in FOLDED:
            heading, _, rest = body.partition("</h2>")
            body = f"<details><summary>{heading.removeprefix('<h2>')}</summary>{rest}</details>"
        parts.append(body)
    place = next((k for k, part in enumerate(parts) if part.startswith("<h2>Results")), len(parts) - 1)
    parts.insert(place + 1, f"<h2>Figures</h2>{figures}" if figures else "")
    title = re.search(r"^# (.*)$", head, flags=re.MULTILINE)
    plain = re.sub(r"\\(.)", r"\1", title[1]) if title else "hf_semalign"  # & < > are already entities
    return PAGE.format(title=plain, body="\n".join(filter(None, parts)), about=html.escape(about))


def _html(text: str) -> str:
    """Convert Markdown to HTML with scrollable tables."""
    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return rendered.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def _picture(path: Path) -> str | None:
    """The data URI of a picture. An SVG file of the same name is preferred."""
    for kind, mime in ((".svg", "image/svg+xml"), (".png", "image/png")):
        if (file := path.with_suffix(kind)).is_file():
            return f"data:{mime};base64,{b64encode(file.read_bytes()).decode()}"
    return None
