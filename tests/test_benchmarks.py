"""Every benchmark script runs to its end on next to nothing, and what it writes holds figures."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import two_tokenizers
from conftest import json_lines, tiny_llama
from test_harness import byte_model, byte_tokenizer
from test_tasks import mbpp_row

from hf_semalign.method.semantic_map import KINDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def smoke(script: str, folder: Path, *arguments: str) -> str:
    """Standard output of a script's smoke run in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def written(name: str, folder: Path) -> Any:
    """The numbers that a smoke run has left; the tables must be there too."""
    results = folder / "runs" / f"{name}-smoke"
    assert "|---" in (results / f"{name}.md").read_text().replace(" ", "")
    return json.loads((results / f"{name}.json").read_text())


def figures(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in a JSON value, each with the nearest key above it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from figures(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from figures(value, name)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, content


def check(content: Any, positive: set[str]) -> None:
    """All numbers are finite, and those under some keys, all of which occur, are positive."""
    numbers = list(figures(content))
    assert all(math.isfinite(value) for _, value in numbers)
    assert positive <= {name for name, _ in numbers}
    assert [(name, value) for name, value in numbers if name in positive and value <= 0] == []


@pytest.mark.slow
def test_seeking_start(tmp_path):
    smoke("seeking_start.py", tmp_path)
    content = written("seeking_start", tmp_path)
    assert len(content["results"]) == 6
    check(content["results"], {"kl", "loss"})


@pytest.mark.slow
def test_wall_time(tmp_path):
    smoke("wall_time.py", tmp_path, "--seeds", "1")
    content = written("wall_time", tmp_path)
    assert len(content["runs"]) == 4
    check(content["runs"], {"steps", "construction", "seconds", "kl"})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load(tmp_path):
    smoke("load.py", tmp_path)
    content = written("load", tmp_path)
    assert content.keys() == {"examples", "length", "vocabulary", "depth", "streaming"}
    check([run["phases"] for case in content.values() for run in case["runs"]], {"cpu", "wall", "disk_mb", "step"})


@pytest.mark.slow
def test_signals(tmp_path):
    smoke("signals.py", tmp_path, "--repeats", "1")
    content = written("signals", tmp_path)
    assert content["processes"].keys() == {"1", "2", "4"} and len(content["schedules"]) == 5
    check([one["run"] for one in content["schedules"]], {"mb", "seconds"})


@pytest.mark.slow
def test_efficiency(tmp_path):
    smoke("efficiency.py", tmp_path)
    content = written("efficiency", tmp_path)
    assert content.keys() == {"pair", "vocabulary32k", "depth", "length", "vocabulary"}
    results = [run["result"] for case in content.values() for run in case["runs"]]
    check(results, {"seconds", "construction", "steps", "by_stage", "tokens", "peak_mb"})
    assert (tmp_path / "runs" / "efficiency-smoke" / "efficiency.png").stat().st_size > 0


@pytest.mark.slow
def test_pairs_and_ablation(tmp_path):
    built = smoke("pairs.py", tmp_path, "styles")
    pair = tmp_path / "runs" / "pairs" / "styles-smoke"
    models = json.loads((pair / "pair.json").read_text())
    assert models.keys() == {"source", "absent", "weak"} and "knows the styles" in built
    check(models, {"parameters", "layers", "loss", "entropy"})
    arguments = ["--recipe", str(pair / "weak.yaml"), "--grids", "compute", "trials", "--seeds", "1", "--jobs", "1"]
    smoke("ablation.py", tmp_path, *arguments)
    content = written("ablation", tmp_path)
    assert len(content["cells"]) == 5
    check(content["cells"], {"kl", "loss", "steps", "seconds"})
    steps = {name: cell["runs"][0]["steps"] for name, cell in content["cells"].items()}
    assert steps["SFT, equal compute"] > 8
    results = next((tmp_path / "runs").rglob("ends/results.json"))
    results.write_text(json.dumps({"metrics": content["ends"] | {"source": {"kl": 0.0, "loss": 7.25}}}))
    assert "7.250" in smoke("ablation.py", tmp_path, *arguments)  # nothing that is there runs again


@pytest.mark.slow
def test_alignment(tmp_path):
    for name, tokenizer in (("whole", two_tokenizers.byte_level()), ("digits", two_tokenizers.byte_level(digits=True))):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(
        json_lines([{"question": "The sum?", "answer": f"It is {n}.\n#### {n}"} for n in range(9)])
    )
    command = [sys.executable, str(BENCHMARKS / "alignment.py"), "--tokenizers", "whole", "digits", "--files", "rows.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    content = json.loads(done.stdout.splitlines()[-1])
    check(content, {"rows", "aligned", "comparable", "one to one", "rows a minute", "classes", "shared rows"})
    assert [row["left out"] for row in content] == [0, 0] and done.stdout.count("| rows.jsonl |") == 2


@pytest.mark.slow
def test_kernels(tmp_path):
    times = re.findall(r"\| ([\d.]+) \(([\d.]+) to ([\d.]+)\)", smoke("loss_kernels.py", tmp_path))
    assert len(times) == 5  # a case of each table, none of which failed
    assert all(0 < float(low) <= float(median) <= float(high) for median, low, high in times)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_maps(tmp_path):
    output = smoke("maps.py", tmp_path)
    rows = re.findall(r"\| 1e\+04 \| [a-z]+ \| (\S+) \| \S+ \| (\S+e-\S+) \|", output)
    errors = [(float(ours), float(single)) for ours, single in rows]
    assert len(errors) == len(KINDS) and all(0 < ours < 1e-8 < single for ours, single in errors)
    runs = re.findall(r"\| ([a-z]+[ \w]*) \| 1e\+0[04] \| 1 \|", output)  # of the map and of pinv, then of the larger heads
    assert runs == [*KINDS, "pinv float64", "readout", "pinv float32", "readout", "cosine"]


@pytest.mark.slow
def test_gpu(tmp_path):
    smoke("gpu.py", tmp_path)
    content = written("gpu", tmp_path)
    speeds = {"seconds", "tokens_per_s", "tflop", "utilisation"}
    check(content["compared"], {*speeds, "pass", "prefix", "steps", "SemAlign", "GKD", "times_gkd"})
    assert content["parts"].keys() == {"schedule", "schedule, joint", "gkd", "stream", "stream, whole activations", "map"}
    check(content["parts"], {"signals", "steps", "prefix", "first_step", "peak_gb", "source_gb", "seconds", "reached_tflops"})
    for name in ("schedule", "stream", "stream, whole activations"):
        part = content["parts"][name]
        assert (len(part["steps"]), len(part["prefix"])) == (4, 3)  # of four stages, and below three of them
    assert content["parts"]["map"]["difference"] < 1e-3
    assert not list((tmp_path / "runs").glob("gpu-*/source"))  # temporary files are gone


def script(name: str, folder: Path, *arguments: str) -> str:
    """Standard output of a script in a folder."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_prompts_of_the_standard_library(tmp_path):
    """No body of a function, and no function that a test row asks for."""
    row = {**mbpp_row(11), "code": "def fmean(data):\n    return 1", "test_list": ["assert fmean([1]) == 1"]}
    (tmp_path / "mbpp.jsonl").write_text(json_lines([row]))
    said = script("stdlib_prompts.py", tmp_path, "prompts.jsonl", "--mbpp", "mbpp.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    (prompt,) = (row["prompt"][0]["content"] for row in rows if "def median_low(" in row["prompt"][0]["content"])
    assert "Return the low median of numeric data." in prompt and "sorted(" not in prompt
    assert "def fmean(" not in str(rows)
    assert f"{len(rows)} prompts" in said and "13 words in a row with one of 1 test rows" in said


@pytest.mark.slow
def test_table_of_the_real_pair(tmp_path):
    """Both benchmarks count together, problem by problem; a run without its end stands below."""
    ends = {
        "source": {"kl": 0.0, "loss": 0.5, "outcomes": {"mbpp": "1111", "humaneval": "1111"}},
        "target": {"kl": 0.5, "loss": 1.0, "outcomes": {"mbpp": "0011", "humaneval": "0000"}},
    }
    half = {"kl": 0.25, "loss": 0.75, "outcomes": {"mbpp": "0111", "humaneval": "1000"}, "ends": ends}
    cells = [{"name": "stopped", "seed": 1, "kl": 0.125, "outcomes": {}}, {"name": "half", "seed": 1, "steps": 8, **half}]
    (tmp_path / "cells.json").write_text(json.dumps({"cells": cells}))
    said = script("real_pair_table.py", tmp_path, "cells.json").splitlines()
    assert said[2].startswith("| **source** |  |  | 100.0 | 100.0 | +75.0 (")
    assert said[4].startswith("| half | 1 | 8 | 75.0 | 25.0 | +25.0 (+0.0 to +62.5) | 0.250 | 0.750 | - |")
    assert said[5] == "| stopped | 1 |  | - | - | - | 0.125 | - | - |"
    assert (tmp_path / "cells.md").read_text().splitlines() == said[:6]


@pytest.mark.slow
def test_real_pair(tmp_path):
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    for name, model in (("target", byte_model()), ("source", tiny_llama(3, 24, vocab=259, max_position_embeddings=2048))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer(template).save_pretrained(tmp_path / name)
    rows = [mbpp_row(number) for number in (*range(511, 525), *range(601, 620))]
    (tmp_path / "mbpp.jsonl").write_text(json_lines(rows))
    said = script("real_pair.py", tmp_path, "source", "target", "mbpp.jsonl", "--rows", "4", "--batch", "2")
    table, _, found = said.strip().rpartition("\n")
    assert "| training, s a row |" in table and json.loads(found)["dtype"] == "float32"
    check(json.loads(found), {"peak memory, MB"})

    recipe = """
source: source
target: target
output_dir: unused
data: {task: mbpp, files: {train: mbpp.jsonl}, extract: 2, align: 4, eval: 2, max_new_tokens: 4}
training: {use_cpu: true, max_steps: 1, per_device_train_batch_size: 2, report_to: none}
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    for flags in ([], ["--on-policy"]):
        found = json.loads(script("real_pair_gkd.py", tmp_path, "recipe.yaml", "gkd", *flags).splitlines()[-1])
        results = json.loads((tmp_path / "gkd" / "results.json").read_text())
        assert results["steps"] == 1 and results["metrics"]["gkd"]["kl"] == found["kl"] > 0


@pytest.mark.slow
def test_two_tokenizers(tmp_path):
    """All cells, ours and TRL's, by one evaluation; nothing that is there runs again."""
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant {% endif %}"
    for name, layers, digits in (("source", 3, False), ("target", 2, True)):
        tokenizer = two_tokenizers.byte_level(digits=digits, template=template)
        tiny_llama(layers, 16, vocab=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [mbpp_row(number) for number in (*range(511, 525), *range(601, 620))]
    (tmp_path / "mbpp.jsonl").write_text(json_lines(rows))
    (tmp_path / "recipe.yaml").write_text("""
source: source
target: target
output_dir: unused
data: {task: mbpp, files: {train: mbpp.jsonl}, extract: 2, align: 8, eval: 2, max_new_tokens: 4}
training: {use_cpu: true, num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, report_to: none}
""")
    cells = ["target", "sft", "kd", "semalign", "equal", "gold", "gold-corrected", "gold-hybrid", "uld"]
    said = script("two_tokenizers.py", tmp_path, "recipe.yaml", "out", *cells)
    content = json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    assert content.keys() == set(cells) and (tmp_path / "out" / "table.md").read_text() in said
    check(content, {"kl", "loss", "kl_per_byte", "bits_per_byte"})
    assert {cell["steps"] for name, cell in content.items() if name != "target"} == {4}
    assert len({cell["kl"] for cell in content.values()}) == len(cells)
    assert content["equal"]["used"]["align"] < content["kd"]["used"]["align"]
    assert " s\n" not in script("two_tokenizers.py", tmp_path, "recipe.yaml", "out", *cells)


@pytest.mark.slow
def test_a_prompt_of_the_sources_own(tmp_path, monkeypatch):
    """All cells are trained and scored, and nothing that is there runs again."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    tokenizer = two_tokenizers.byte_level(template=template + "{% if add_generation_prompt %}<s>assistant {% endif %}")
    for name, layers in (("source", 3), ("target", 2)):
        tiny_llama(layers, 16, vocab=len(tokenizer), max_position_embeddings=2048).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [mbpp_row(number) for number in (*range(11, 14), *range(511, 515), *range(601, 620))]
    (tmp_path / "mbpp.jsonl").write_text(json_lines(rows))
    arguments = ["source_prompt.py", tmp_path, "source", "target", "mbpp.jsonl", "out", "--rows", "8", "--scored", "3"]
    said = script(*arguments)
    cells = json.loads((tmp_path / "out" / "source_prompt.json").read_text())
    assert "| source | - | - | - | " in said and "| kd-asked | " in said
    check(cells, {"tokens an answer", "P(fence closes)"})
    written = [cells.pop(name) for name in ("target", "target-asked", "kd", "kd-asked")]
    assert all(cell["rows"] == len(cell["outcomes"]) == 3 for cell in written) and list(cells) == ["source", "source-asked"]
    assert len({cell["P(fence closes)"] for cell in (*written, *cells.values())}) == 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "source_prompt.md"}
    assert script(*arguments) == said
    assert {path: path.stat().st_mtime_ns for path in before} == before
