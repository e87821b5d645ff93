"""Comparisons: which cells there are, what is run again, and what the summary says of them."""

import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from test_recipe import QUICKSTART

from hf_semalign import compare
from hf_semalign.cli import main
from hf_semalign.compare import BUDGETS, cells, load_comparison, plans, run_comparison

SMALL = ["data.align=64", "data.eval=12", "data.extract=4", "training.max_steps=6", "training.frontier=joint"]
OTHERS = "forgetting={copy: {task: symbols, eval: 6, skills: [copy]}}"
CONTENT = {
    "output_dir": "cells",
    "tasks": {"symbols": str(QUICKSTART)},
    "methods": {"SemAlign": {}, "Its paper's": {"frontier": "single"}, "KD": {"method": "kd"}, "SFT": {"method": "sft"}},
    "seeds": [1, 2],
    "budgets": list(BUDGETS),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A comparison in a folder of its own, with changes."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
        return tmp_path / "compare.yaml"

    return write


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process; what was run is listed."""
    started, streams = [], {name: getattr(subprocess, name) for name in ("STDOUT", "DEVNULL")}

    def run(command, **settings):
        started.append(command[-1])
        return SimpleNamespace(returncode=main(command[3:]))

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, **streams))
    return started


def test_cells(written):
    comparison = load_comparison(written(), SMALL)
    planned = plans(comparison)
    found = cells(comparison, planned)
    assert len({cell.folder for cell in found}) == len(found)
    by_name = {name: [cell for cell in found if cell.name == name] for name in CONTENT["methods"]}
    assert [cell.budgets for cell in by_name["SemAlign"]] == [tuple(BUDGETS)] * 2  # itself is what compute is equal to
    budget = sum(planned["symbols", "SemAlign"].cost.values())
    for name in ("Its paper's", "SFT"):
        equal, more = by_name[name][:2]
        assert (equal.budgets, more.budgets) == (("equal data",), ("equal compute",))
        assert equal.recipe.training["max_steps"] == 6 < more.recipe.training["max_steps"]
        assert more.recipe.training["max_steps"] == planned["symbols", name].steps_for(budget)
    assert [cell.recipe.training["seed"] for cell in by_name["SFT"]] == [1, 1, 2, 2]
    assert {cell.recipe.method for cell in by_name["KD"]} == {"kd"}
    assert {cell.recipe.training["signals_dir"] for cell in found} == {"cells/_signals"}
    assert not any(cell.recipe.baselines for cell in found)


def test_summary_is_that_of_the_runs(written, here, tmp_path):
    path = written(
        methods={"SemAlign": {}, "SFT": {"method": "sft"}},
        budgets=["equal data"],
        reported={"origin": "a paper", "rows": {"X": {"symbols": 12.5}}},
    )
    assert main(["compare", str(path), *SMALL, "--jobs", "1", OTHERS]) == 0
    record = json.loads((tmp_path / "cells" / "compare.json").read_text())
    (table,) = record["tables"]
    assert [row["name"] for row in table["methods"]] == ["SemAlign", "SFT"]
    runs = [json.loads((tmp_path / "cells/symbols" / f"sft-6-seed{seed}" / "results.json").read_text()) for seed in (1, 2)]
    row = table["methods"][1]
    kl = [run["metrics"]["sft"]["kl"] for run in runs]
    assert row["kl"] == {"mean": pytest.approx(statistics.mean(kl)), "std": pytest.approx(statistics.stdev(kl))}
    before, source = (statistics.mean(runs[0]["metrics"][role]["exact_match"].values()) for role in ("target", "source"))
    scores = [statistics.mean(run["metrics"]["sft"]["exact_match"].values()) for run in runs]
    assert row["score"]["mean"] == pytest.approx(statistics.mean(scores))
    assert row["closed"]["mean"] == pytest.approx((statistics.mean(scores) - before) / (source - before))
    assert row["gap"]["mean"] == pytest.approx(source - statistics.mean(scores))
    forgot = [run["metrics"]["sft"]["forgetting"]["copy"]["kl"] for run in runs]
    assert row["forgotten_kl"]["mean"] == pytest.approx(statistics.mean(forgot))
    assert statistics.mean(forgot) > 0
    assert row["cost"]["mean"] == pytest.approx(sum(runs[0]["cost"].values()))
    size = (tmp_path / "cells/symbols/sft-6-seed1/adapter_model.safetensors").stat().st_size
    assert row["adapter_mb"]["mean"] == pytest.approx(size / 1e6)
    assert table["target"]["kl"] == pytest.approx(runs[0]["metrics"]["target"]["kl"])
    for name in ("compare.md", "compare.tex", "compare.png", "compare.svg"):
        assert (tmp_path / "cells" / name).stat().st_size > 0
    assert "12.50" in (tmp_path / "cells" / "compare.md").read_text()
    assert len(here) == 4


def test_whole_cells_are_not_run_again_and_failed_ones_are(written, here, tmp_path, monkeypatch, caplog):
    path = written(methods={"SemAlign": {}, "KD": {"method": "kd"}}, seeds=[1], budgets=["equal data"])
    comparison = load_comparison(path, SMALL)
    run = compare.subprocess.run
    broken = lambda command, **settings: SimpleNamespace(returncode=1) if "kd" in command[-1] else run(command)  # noqa: E731
    monkeypatch.setattr(compare.subprocess, "run", broken)
    with pytest.raises(ChildProcessError, match=r"1 of 2 cells failed \(symbols, KD, equal data, seed 1\)"):
        run_comparison(comparison)
    assert [row["name"] for row in json.loads((tmp_path / "cells/compare.json").read_text())["tables"][0]["methods"]] == [
        "SemAlign"
    ]
    monkeypatch.setattr(compare.subprocess, "run", run)
    here.clear()
    record = run_comparison(comparison)
    assert [command for command in here if "kd" in command] == here != []
    assert [row["name"] for row in record["tables"][0]["methods"]] == ["SemAlign", "KD"]
    here.clear()
    run_comparison(comparison)
    assert here == []
    with pytest.raises(ValueError, match="was run with other settings"):
        run_comparison(load_comparison(path, [*SMALL, "training.learning_rate=1e-4"]))


def test_a_cell_is_a_process_of_its_own(written, tmp_path):
    """Whose output is in its log, and whose failure is told with its last lines."""
    path = written(methods={"KD": {"method": "kd"}}, seeds=[1], budgets=["equal data"])
    comparison = load_comparison(path, SMALL)
    record = run_comparison(comparison)
    cell = tmp_path / "cells/symbols/kd-6-seed1"
    assert "Distillation (KL only)" in (cell / "log.txt").read_text()
    assert record["tables"][0]["methods"][0]["memory_mb"]["mean"] > 100
    again = subprocess.run(
        [sys.executable, "-m", "hf_semalign.cli", "train", "--config", str(cell / "recipe.yaml"), "--dry-run"], check=False
    )
    assert again.returncode == 0  # the recipe in the folder is one that can be run


def test_dry_run_loads_no_weights(written, no_weights, capsys, monkeypatch):
    path = written(hardware={"name": "an abacus", "tflops": 1e-6})
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", str(path), "--dry-run", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "estimated for an abacus" in " ".join(shown.split())
    assert shown.count("│ symbols │") == 7
    assert "hours at 1e-06 TFLOP/s" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "methods of the comparison .* expected a dict that is not empty"),
        ({"seeds": [1.5]}, "seed is 1.5: expected a whole number"),
        ({"seeds": 3}, "seeds of the comparison .* is 3: expected a list"),
        ({"budgets": ["equal date"]}, "did you mean 'equal data'"),
        ({"methods": {"A": {"method": "sfd"}}}, "did you mean 'sft'"),
        ({"methods": {"A": {"frontyer": "joint"}}}, "did you mean 'frontier'"),
        ({"methods": {"A": "kd"}}, r"section methods\.A .* is 'kd': expected keys and values"),
        ({"tasks": {"x": "nowhere.yaml"}}, "No recipe .*nowhere.yaml"),
        ({"reported": {"rows": {}}}, r"expected \['origin', 'rows'\]"),
        ({"hardware": {"name": "x", "tflops": "fast"}}, "tflops is 'fast': expected a number"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
    ],
)
def test_what_cannot_be_compared(written, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_comparison(written(**changes))


def test_a_method_that_cannot_be_run_is_refused_before_any_other_is(written, here):
    path = written(methods={"SemAlign": {}, "Odd": {"pairing": [0, 1]}})
    with pytest.raises(ValueError, match="pairing"):
        run_comparison(load_comparison(path, SMALL))
    assert here == []
