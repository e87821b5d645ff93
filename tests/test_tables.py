"""The tables of a comparison, from a record that was written by hand."""

import re

import pytest
from markdown_it import MarkdownIt

from hf_semalign.experiments.tables import latex, markdown, tex


def value(mean, std=None):
    return {"mean": mean, "std": std}


@pytest.fixture
def record():
    rows = [
        {
            "name": "SemAlign", "method": "semalign", "seeds": 3, "score": value(0.5, 0.0123), "kl": value(0.4321, 0.001),
            "gap": value(0.4), "closed": value(0.6), "steps": value(1200, 0.0), "cost": value(2345.6, 0.0),
        },
        {"name": "A_b & <c>", "method": "sft", "seeds": 1, "score": value(0.25), "kl": value(0.5), "steps": value(900)},
    ]  # fmt: skip
    table = {
        "task": "sort | x",
        "budget": "equal data",
        "target": {"score": 0.1, "kl": 1.0},
        "source": {"score": 0.9, "kl": 0.0},
    }
    return {
        "pair": {"source": "big", "target": "small"},
        "seeds": [1, 2, 3],
        "reference": "SemAlign",
        "tables": [{**table, "methods": rows}, {**table, "budget": "equal compute", "methods": rows}],
        "reported": {"origin": "a paper", "rows": {"A": {"x": 44.2, "y": 16.07}, "B": {"x": 3}}},
    }


def test_markdown(record):
    text = markdown(record)
    assert "# big to small" in text
    first = next(line for line in text.splitlines() if line.startswith("| SemAlign"))
    assert first == "| SemAlign | 50.0 ± 1.2 | 0.432 ± 0.001 | 40.0 | 60 | 1,200 | 2.3 |"
    assert "| Target before | 10.0 | 1.000 | - | - | - | - |" in text
    assert "| Source | 90.0 | 0.000 | - | - | - | - |" in text
    assert "| A | 44.20 | 16.07 |" in text
    assert "| B | 3.00 | - |" in text
    assert "Reported, under another protocol (a paper)" in text
    assert "as many steps as the compute of SemAlign pays for" in text
    assert "answer loss" not in text.split("Mean ±")[0]  # no row has any


def test_markdown_shows_names_to_the_letter(record):
    page = MarkdownIt("commonmark").enable("table").render(markdown(record))
    assert "<td>A_b &amp; &lt;c&gt;</td>" in page
    assert "<h2>sort | x, equal data</h2>" in page
    assert page.count("<table>") == 3


def test_latex(record):
    text = latex(record)
    assert text.count(r"\begin{tabular}{lrrrrrr}") == 2
    assert r"A\_b \& <c> & 25.0 & 0.500 & - & - & 900 & - \\" in text
    assert r"SemAlign & 50.0 $\pm$ 1.2 &" in text
    assert r"Method & x \% & y \% \\" in text
    assert "±" not in text
    assert not re.search(r"(?<!\\)_", text)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("50 %", r"50 \%"),
        ("a_b^c~d\\e", r"a\_b\textasciicircum{}c\textasciitilde{}d\textbackslash{}e"),
        ("{$#&}", r"\{\$\#\&\}"),
    ],
)
def test_latex_to_the_letter(given, shown):
    assert tex(given) == shown


def test_without_reported_figures_and_one_budget(record):
    record |= {"reported": None, "tables": record["tables"][:1]}
    for text in (markdown(record), latex(record)):
        assert "Reported" not in text
        assert "equal compute" not in text


def test_several_benchmarks_and_the_paired_difference(record):
    table = record["tables"][0]
    for place, row in enumerate(table["methods"]):
        row |= {"score:mbpp": {"mean": 0.41, "std": None}, "score:humaneval": {"mean": 0.62, "std": None}}
        if place:
            row["ahead"] = {"mean": -0.02, "low": -0.0512, "high": 0.01}
    text = markdown(record)
    heading = next(line for line in text.splitlines() if line.startswith("| Method"))
    assert heading.startswith("| Method | mbpp % | humaneval % | score % | ahead of SemAlign (points, 95 %) |")
    reference, other, *_ = (line for line in text.splitlines() if "| 41.0 | 62.0 |" in line)  # of the first of two tables
    assert "| 41.0 | 62.0 | 50.0 ± 1.2 | - |" in reference and "| -2.0 [-5.1, 1.0] |" in other
    assert "bootstrap interval" in text and "If the interval contains zero" in text
    assert "-2.0 [-5.1, 1.0]" in latex(record)
