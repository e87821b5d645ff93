"""The page of a run: self-contained, nothing of it runs, and it says what the card says."""

import json
import re
from html.parser import HTMLParser

import pytest

from hf_semalign.cli import main
from hf_semalign.experiments.report import render_page
from hf_semalign.hub.card import render_card

HOSTILE = "<script>alert(1)</script> [x](javascript:alert(2)) ![y](http://e.example/z.png) <img src=q onerror=r>"


class Elements(HTMLParser):
    """Tags of a page with their attributes, in order, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def assert_self_contained(page):
    """Nothing runs, nothing is loaded; links lead to the Hub alone."""
    found = Elements(page)
    assert not found.of("script", "iframe", "object", "embed", "link", "form", "base")
    assert all(not name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(image["src"].startswith("data:image/") for image in found.of("img"))
    assert all(link["href"].startswith("https://huggingface.co/") for link in found.of("a"))
    (policy,) = [meta["content"] for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in page and "@import" not in page
    return found


def scores(**facts):
    """What benchmarks.json holds."""
    score = {"task": "gsm8k", "metric": "exact_match", "value": 0.25, "rows": 4, "limit": None, "chat_template": False}
    score |= {"backend": "hf", "harness": "0.4.9", "data": "test.jsonl"}
    return {"model": "run", "target": "target", "benchmarks": [score], **facts}


def report(run, tmp_path):
    output = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    return output.read_text()


def test_page_of_a_run(good, tmp_path):
    run = good / "run"
    page = report(run, tmp_path)
    found = assert_self_contained(page)
    record, results = (json.loads((run / name).read_text()) for name in ("semalign.json", "results.json"))
    card = render_card(record, results)
    for heading in re.findall(r"^## (.*)$", card, re.MULTILINE):
        assert heading in found.text
    assert f"KL(source ‖ target) from {results['metrics']['target']['kl']:.3f}" in found.text
    assert found.of("img")[0]["alt"].startswith("The source layer that supervises each target layer")
    assert len(found.of("img")) == len(results["figures"])
    assert len(found.of("details")) == 4
    assert str(good) not in page


def test_default_place_and_analyses(good, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "analysis").mkdir(parents=True)
    for name in ("semalign.json", "results.json"):
        (run / name).write_bytes((good / "run" / name).read_bytes())
    (run / "analysis" / "cka.png").write_bytes(b"pixels")
    (run / "benchmarks.json").write_text(
        json.dumps(scores(adapter_checksum=json.loads((run / "semalign.json").read_text())["adapter_checksum"]))
    )
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    found = assert_self_contained((run / "report.html").read_text())
    assert [image["src"] for image in found.of("img")] == ["data:image/png;base64,cGl4ZWxz"]
    assert "25.0" in found.text and "Benchmarks" in found.text


def test_a_run_without_results_says_so(good, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "semalign.json").write_bytes((good / "run" / "semalign.json").read_bytes())
    found = assert_self_contained(report(run, tmp_path))
    assert "There are no results: the run was not evaluated, or has not finished." in found.text
    assert "Results" not in found.text


def test_nothing_from_data_is_markup(good, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record, results = (json.loads((good / "run" / name).read_text()) for name in ("semalign.json", "results.json"))
    hostile = HOSTILE.replace("/", "")
    record |= {"source": hostile, "target": hostile}
    record["settings"][HOSTILE] = HOSTILE
    results |= {"task": hostile, "machine": {"device": HOSTILE}}
    (run / "semalign.json").write_text(json.dumps(record))
    (run / "results.json").write_text(json.dumps(results))
    found = assert_self_contained(report(run, tmp_path))
    assert HOSTILE in found.text


def test_page_of_a_comparison(tmp_path):
    folder = tmp_path / "compare"
    folder.mkdir()
    row = {"name": "SemAlign <b>", "kl": {"mean": 0.5, "std": 0.1}}
    tables = [{"task": "copy", "budget": HOSTILE, "methods": [row], "target": {"kl": 1.0}, "source": {"kl": 0.0}}]
    content = {"pair": {"source": "big", "target": "small"}, "tables": tables, "reported": None, "reference": "semalign"}
    (folder / "compare.json").write_text(json.dumps(content))
    (folder / "compare.png").write_bytes(b"pixels")
    found = assert_self_contained(report(folder, tmp_path))
    assert "0.500 ± 0.100" in found.text and "SemAlign <b>" in found.text
    assert [image["alt"] for image in found.of("img")] == ["All methods"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no semalign.json: it is not a run folder"), ("{", "semalign.json is damaged"), ("{}", "semalign.json lacks")],
)
def test_what_is_no_run_is_refused(tmp_path, caplog, content, message):
    if content is not None:
        (tmp_path / "semalign.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert message in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_what_is_json_and_no_record_of_ours_is_refused(good, tmp_path, caplog):
    (tmp_path / "semalign.json").write_bytes((good / "run" / "semalign.json").read_bytes())
    (tmp_path / "results.json").write_text(
        json.dumps(json.loads((good / "run" / "results.json").read_text()) | {"metrics": [1]})
    )
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics of" in caplog.text and "is [1]: expected names and values" in caplog.text


def test_an_output_that_is_a_folder_and_a_run_that_is_not_over(good, tmp_path, caplog):
    assert main(["report", str(good / "run"), "--output", str(tmp_path)]) == 2
    assert f"output {tmp_path} is a folder: name a file" in caplog.text
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "semalign.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "has no semalign.json yet: re-run its command" in caplog.text


def test_sections_for_those_who_ask_are_folded():
    page = render_page("# A \\| b\n\ntext\n\n## Settings\n\nx\n\n## Limits\n\ny", {}, "about")
    assert "<summary>Settings</summary>" in page and "<h2>Limits</h2>" in page
    assert "<title>A | b</title>" in page
