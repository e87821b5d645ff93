"""Comparisons: which cells there are, what is run again, and what the summary says of them."""

import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_recipe import QUICKSTART
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_semalign.cli import main
from hf_semalign.experiments import compare
from hf_semalign.experiments import plan as plan_module
from hf_semalign.experiments.compare import run_comparison
from hf_semalign.experiments.comparison import (
    EQUAL_COMPUTE,
    EQUAL_DATA,
    OF_ANSWERS,
    cells,
    costs_table,
    equal_compute,
    load_comparison,
    plans,
)
from hf_semalign.experiments.paired import paired_difference
from hf_semalign.experiments.plan import plan_recipe
from hf_semalign.experiments.recipe import DataSettings
from hf_semalign.experiments.tables import latex, markdown
from hf_semalign.models import loading

SMALL = ["data.align=64", "data.eval=12", "data.extract=4", "training.max_steps=6", "training.frontier=joint"]
OTHERS = "forgetting={copy: {task: symbols, eval: 6, skills: [copy]}}"
CONTENT = {
    "output_dir": "cells",
    "tasks": {"symbols": str(QUICKSTART)},
    "methods": {"SemAlign": {}, "Its paper's": {"frontier": "single"}, "KD": {"method": "kd"}, "SFT": {"method": "sft"}},
    "seeds": [1, 2],
    "budgets": [EQUAL_DATA, EQUAL_COMPUTE],
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
    assert [cell.budgets for cell in by_name["SemAlign"]] == [
        (EQUAL_DATA, EQUAL_COMPUTE)
    ] * 2  # itself is what compute is equal to
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
    encoded, encode = [], plan_module.encode_splits
    monkeypatch.setattr(plan_module, "encode_splits", lambda *given: (encoded.append(1), encode(*given))[1])
    assert main(["compare", str(path), "--dry-run", *SMALL]) == 0
    assert len(encoded) == 1  # for all methods
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if "FLOP " in line]) == 7
    assert "hours on an abacus, 1e-06 TFLOP/s sustained" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "methods of the comparison .* is {}: expected at least one"),
        ({"seeds": [1.5]}, r"seeds\[0\] of the comparison .* is 1.5: expected a whole number"),
        ({"seeds": [1, 1]}, r"seeds of the comparison .* is \[1, 1\]: expected different numbers"),
        ({"seeds": [-1]}, "expected different numbers from 0 to"),
        ({"methods": {"A": {"max_length": 8}}}, r"methods.A .* has max_length, which is set in the task's recipe"),
        ({"methods": {"A": {"seed": 8}}}, r"methods.A .* has seed, which is set by seeds"),
        ({"methods": {1: {}}}, "the name 1 of methods of the comparison .* expected text"),
        (
            {"reported": {"origin": "x", "rows": {"KD": {"a": "90%"}}}},
            "reported.rows.KD.a of the comparison .* is '90%': expected a number",
        ),
        ({"hardware": {"name": "x", "tflops": 0}}, "tflops of hardware is 0: expected a number above 0"),
        ({"seeds": 3}, "seeds of the comparison .* is 3: expected a list"),
        ({"budgets": ["equal date"]}, "did you mean 'equal data'"),
        ({"methods": {"A": {"method": "sfd"}}}, "did you mean 'sft'"),
        ({"methods": {"A": {"frontyer": "joint"}}}, "did you mean 'frontier'"),
        ({"methods": {"A": "kd"}}, r"methods\.A of the comparison .* is 'kd': expected names and values"),
        ({"tasks": {"x": "nowhere.yaml"}}, "No recipe .*nowhere.yaml"),
        ({"reported": {"rows": {}}}, r"reported of the comparison .* lacks \['origin'\]"),
        ({"hardware": {"name": "x", "tflops": "fast"}}, "hardware.tflops of the comparison .* is 'fast': expected a number"),
        ({"output_dir": 3}, "output_dir of the comparison .* is 3: expected text"),
        ({"methods": {"A": {"data": {"rounds": "two"}}}}, "rounds of data of methods.A .* is 'two': expected a whole number"),
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


LLAMA = {"13b": (40, 5120, 13824, 40), "7b": (32, 4096, 11008, 32)}
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The paper's models as far as a dry run looks: configuration, a tokenizer, and a file of weights that nobody reads."""
    folder = tmp_path_factory.mktemp("shapes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, rows in (("13b", 32000), ("13b-coder", 32001), ("7b", 32000)):
        layers, width, inner, heads = LLAMA[name.partition("-")[0]]
        shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
        LlamaConfig(vocab_size=rows, dtype="float16", **shape).save_pretrained(folder / name)
        words = ["<unk>", "<s>", "</s>", *alphabet, *(f"<{i}>" for i in range(rows - 3 - len(alphabet)))]
        tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        fast.chat_template = CHAT
        fast.save_pretrained(folder / name)
        save_file({"unread": torch.zeros(1)}, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows_of(task, folder):
    """As many rows as a recipe of the paper wants, in the format of the task's local files."""
    if task == "mmlu":
        (folder / "mmlu").mkdir()
        lines = [f"Which is {i}?,{i},{i + 1},{i + 2},{i + 3},A" for i in range(1300)]
        (folder / "mmlu" / "counting_dev.csv").write_text("\n".join(lines))
        return folder / "mmlu"
    make = {
        "gsm8k": lambda i: {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"},
        "humaneval": lambda i: {"instruction": f"Return {i}.", "output": f"def f():\n    return {i}"},
        "mbpp": lambda i: {
            "task_id": i, "text": f"Return {i}.", "code": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"],
        },
    }[task]  # fmt: skip
    ids = range(511, 975) if task == "mbpp" else range(1300)
    (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(make(i)) for i in ids))
    return folder / f"{task}.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "task"),
    [
        *(("llama2-13b-to-7b", task) for task in ("mmlu", "gsm8k", "humaneval", "mbpp")),
        *(("codellama-13b-to-llama2-7b", task) for task in ("humaneval", "mbpp")),
        *(("wizardcoder-13b-to-llama2-7b", task) for task in ("humaneval", "mbpp")),
    ],
)
def test_dry_run_of_the_papers_tables(pair, task, shapes, tmp_path, no_weights, capsys, monkeypatch):
    """Everything but the weights, with the real shapes: all methods, and what they would cost."""
    monkeypatch.setenv("COLUMNS", "200")
    source = shapes / ("13b-coder" if pair.startswith("wizard") else "13b")
    path = QUICKSTART.parents[1] / pair / "compare.yaml"
    changes = [
        f"tasks={{{task}: {task}.yaml}}",
        f"output_dir={tmp_path / 'out'}",
        f"source={source}",
        f"target={shapes / '7b'}",
    ]
    files = f"data.files={{train: {rows_of(task, tmp_path)}}}"
    assert main(["compare", str(path), "--dry-run", *changes, files, "training.use_cpu=true"]) == 0
    shown = capsys.readouterr().out
    for name in ("SemAlign", "SemAlign, all layers at once", "Distillation", "Fine-tuning", "Seeking", "LaTen"):
        assert f"  {name} " in shown
    assert "PFLOP" in shown
    assert "one A100 80 GB at 40 % of its peak, 125 TFLOP/s sustained" in shown


def test_methods_are_compared_problem_by_problem():
    """Over both benchmarks and the seeds that both have."""

    def runs(**outcomes):
        return [
            (
                SimpleNamespace(recipe=SimpleNamespace(method="kd", training={"seed": int(seed[1:])})),
                {"metrics": {"kd": {"benchmarks": [{"task": task, "outcomes": text} for task, text in pair.items()]}}},
            )
            for seed, pair in outcomes.items()
        ]

    reference = compare._outcomes(runs(s1={"mbpp": "0011", "humaneval": "10"}, s2={"mbpp": "0111", "humaneval": "00"}))
    ours = compare._outcomes(
        runs(s1={"mbpp": "1011", "humaneval": "10"}, s2={"mbpp": "0111", "humaneval": "11"}, s3={"mbpp": "1"})
    )
    # Of humaneval's problems, then of mbpp's.
    means = [1, 0.5, 0.5, 0.5, 1, 1], [0.5, 0, 0, 0.5, 1, 1]
    expected = dict(zip(("mean", "low", "high"), paired_difference(*means), strict=True))
    assert compare._ahead(ours, reference) == {"ahead": expected}
    assert expected["mean"] == pytest.approx(1.5 / 6)
    assert compare._ahead(ours, {}) == {}
    both = {
        "kl": 0.1,
        "benchmarks": [{"task": "mbpp", "value": 0.5, "rows": 4}, {"task": "humaneval", "value": 1.0, "rows": 2}],
    }
    assert compare._figures(both) == {"kl": 0.1, "score": pytest.approx(4 / 6), "score:mbpp": 0.5, "score:humaneval": 1.0}
    old = {"kl": 0.1, "benchmark": {"task": "mbpp", "value": 0.5, "rows": 4}}  # as earlier versions wrote it
    assert compare._figures(old) == {"kl": 0.1, "score": 0.5}


def test_methods_whose_runs_would_have_one_folder_are_refused(written):
    with pytest.raises(ValueError, match=r"methods of .* has 'SemAlign' and 'SemAlign\+', which would share the folder"):
        load_comparison(written(), ["methods={SemAlign: {}, SemAlign+: {frontier: single}}"])


def test_a_cell_that_is_there_is_known_again_by_its_settings(written):
    """Also where a newer version has settings that its recipe lacks."""
    path = written(methods={"KD": {"method": "kd"}}, seeds=[1], budgets=["equal data"])

    def checked(*changes):
        comparison = load_comparison(path, [*SMALL, *changes])
        (cell,) = cells(comparison, plans(comparison))
        compare._check(cell)
        return cell

    cell = checked()
    cell.folder.mkdir(parents=True)
    content = yaml.safe_load(compare._yaml(cell.recipe))
    content["data"] = {name: value for name, value in content["data"].items() if name not in OF_ANSWERS}
    (cell.folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    checked()
    with pytest.raises(ValueError, match="was run with other settings"):
        checked("training.weight_decay=0.1")


def test_cells_are_not_published_and_hold_no_token(written):
    changes = ["training.push_to_hub=true", "training.hub_token=secret", "training.hub_model_id=a/b"]
    comparison = load_comparison(written(), [*SMALL, *changes])
    for cell in cells(comparison, plans(comparison)):
        assert not [key for key in cell.recipe.training if key.startswith(("push", "hub"))]


def test_equal_compute_counts_the_stages_of_a_budget_for_each(written):
    changes = ["methods={Distillation: {method: kd}, SemAlign: {frontier: single, stage_budget: per_stage}}"]
    comparison = load_comparison(written(), [*SMALL, *changes])
    planned = plans(comparison)
    for cell in cells(comparison, planned):
        known = plan_recipe(cell.recipe)
        if "equal compute" in cell.budgets:
            wanted = planned[cell.task, "Distillation"].cost
            assert sum(known.cost.values()) == pytest.approx(sum(wanted.values()), rel=0.4)
        assert int(cell.folder.name.split("-")[-2]) == known.steps


def test_methods_may_differ_in_who_writes_the_answers(written):
    methods = {
        "KD": {"method": "kd"},
        "KD, source's answers": {"method": "kd", "data": {"answers": "source", "max_new_tokens": 30}},
        "KD, on-policy": {"method": "kd", "data": {"answers": "target", "temperature": 1.0, "rounds": 3}},
    }
    comparison = load_comparison(written(methods=methods, seeds=[1], budgets=["equal data"]), SMALL)
    planned = plans(comparison)
    found = {cell.name: cell.recipe.data for cell in cells(comparison, planned)}
    assert {name: (data.answers, data.rounds, data.max_new_tokens) for name, data in found.items()} == {
        "KD": ("dataset", 1, 512), "KD, source's answers": ("source", 1, 30), "KD, on-policy": ("target", 3, 512),
    }  # fmt: skip
    cost = {name: planned["symbols", name].cost for name in methods}
    assert "answers" not in cost["KD"] and cost["KD, source's answers"]["answers"] > 0
    assert cost["KD, on-policy"]["signals"] == pytest.approx(3 * cost["KD"]["signals"])


def test_a_method_that_costs_more_than_equal_compute_before_it_trains_is_left_out_there(written, no_weights, capsys):
    path = written(
        methods={"SFT": {"method": "sft"}, "Source's answers": {"method": "sft", "data": {"answers": "source"}}}, seeds=[1]
    )
    comparison = load_comparison(path, ["data.align=64", "data.eval=8", "data.extract=4", "training.max_steps=1"])
    planned = plans(comparison)
    assert [(cell.name, cell.budgets) for cell in cells(comparison, planned)] == [
        ("SFT", (EQUAL_DATA, EQUAL_COMPUTE)), ("Source's answers", (EQUAL_DATA,)),
    ]  # fmt: skip
    (sentence,) = equal_compute(comparison, planned)[1].values()
    assert sentence.startswith("Source's answers is left out of equal compute: sft costs ")
    assert main(["compare", str(path), "--dry-run", "data.align=64", "data.eval=8", "training.max_steps=1"]) == 0
    assert "Source's answers is left out of equal compute" in capsys.readouterr().out
    ends = {"kl": 1.0}
    table = {"task": "symbols", "budget": EQUAL_COMPUTE, "target": ends, "source": ends, "methods": [], "left_out": [sentence]}
    record = {"pair": {"source": "a", "target": "b"}, "tables": [table], "reported": None, "reference": "SFT"}
    assert sentence in markdown(record) and sentence in latex(record)


def test_what_is_known_of_a_task_is_read_once(written, monkeypatch):
    loaded, drawn = [], []
    find, load = loading.AutoTokenizer.from_pretrained, DataSettings.load
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda *name, **how: (loaded.append(name), find(*name, **how))[1]
    )
    monkeypatch.setattr(DataSettings, "load", lambda self: (drawn.append(self), load(self))[1])
    costs_table(load_comparison(written(), SMALL))
    assert len(loaded) == 2 and len(drawn) == 1  # the target's and the source's, for four methods under two budgets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{align: 3}", "Unknown key 'align' in the data of methods.KD"),
        ("3", "data of methods.KD of the comparison .* is 3: expected names and values"),
        ("{rounds: 2}", "data.rounds of methods.KD of the comparison .* is 2: several rounds need data.answers=target"),
        ("{answers: oracle}", "Unknown key 'oracle' in the answers of methods.KD"),
    ],
)
def test_answers_of_a_method_are_checked(written, changes, message):
    with pytest.raises(ValueError, match=message):
        load_comparison(written(), [f"methods={{KD: {{method: kd, data: {changes}}}}}"])


def test_values_of_a_method_are_read_as_those_of_a_recipe(written):
    comparison = load_comparison(written(), ["methods={A: {learning_rate: 1e-4, save_strategy: no}}"])
    assert comparison.methods == {"A": {"learning_rate": 1e-4, "save_strategy": "no"}}
