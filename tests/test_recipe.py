"""Recipes: keys are checked, overrides apply, and a run leaves a folder that anyone can load."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_semalign import load_transfer
from hf_semalign.cache.source import Source
from hf_semalign.cli import main
from hf_semalign.experiments.comparison import load_comparison
from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.recipe import load_recipe, load_run
from hf_semalign.experiments.run import results_table, run_recipe, run_signals
from hf_semalign.models.names import resolve_model
from hf_semalign.trainer import SemAlignTrainer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart" / "semalign.yaml"
YAML = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate"]
RECIPES = [path for path in YAML if path.stem != "compare"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path)
    own = f"runs/{path.parent.name}/{path.stem}" if path.parent != QUICKSTART.parent else f"runs/{path.stem}"
    assert recipe.output_dir == ("runs/quickstart" if path == QUICKSTART else own)


@pytest.mark.parametrize("path", sorted(set(YAML) - set(RECIPES)), ids=lambda path: path.parent.name)
def test_every_comparison_is_valid(path):
    """Its own keys and those of its recipes; what it would run is in tests/test_compare.py."""
    comparison = load_comparison(path)
    assert comparison.output_dir == f"runs/compare/{path.parent.name}"
    assert {changes.get("method", "semalign") for changes in comparison.methods.values()} == set(METHODS)
    assert len(comparison.seeds) == 3
    if comparison.reported:
        assert {task for row in comparison.reported.rows.values() for task in row} == set(comparison.tasks)


def test_overrides_reach_their_section():
    recipe = load_recipe(QUICKSTART, ["training.seed=7", "--data.eval=3", "training.pairing=[0, 1, 2, 5]", "baselines=[]"])
    assert (recipe.training["seed"], recipe.data.eval, recipe.training["pairing"], recipe.baselines) == (7, 3, [0, 1, 2, 5], ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sourc=x", "Unknown key 'sourc' in the recipe .*did you mean 'source'"),
        ("data.extracts=3", "Unknown key 'extracts' in the data section .*did you mean 'extract'"),
        ("training.relation_wieght=1", "did you mean 'relation_weight'"),
        ("baselines=[kdd]", "did you mean 'kd'"),
        ("training.seed", "expected key=value"),
        ("data=7", "data of the recipe .* is 7: expected names and values"),
        ("training.seed.value=7", "the recipe has no section 'training.seed'"),
        ("training.max_length=7", "Set data.max_length instead of training.max_length"),
        ("training.output_dir=x", "Set output_dir instead of training.output_dir"),
        ("data.task=symbolz", "did you mean 'symbols'"),
    ],
)
def test_bad_keys_are_refused_with_the_nearest_one(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(QUICKSTART, [override])


def test_numbers_without_a_dot_are_numbers():
    assert load_recipe(QUICKSTART, ["training.learning_rate=3e-4"]).training["learning_rate"] == 3e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected keys and values"),
        ("source: a\ntarget: b\noutput_dir: c", r"lacks \['data'\]"),
        ("source: a\ntarget: b\noutput_dir: c\ndata: {task: symbols, extract: 1, align: 1}", r"lacks \['eval'\]"),
    ],
)
def test_incomplete_recipes_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_missing_recipe():
    with pytest.raises(FileNotFoundError, match=r"No recipe 'nowhere.yaml'"):
        load_recipe("nowhere.yaml")


def test_embedded_model_that_does_not_exist(tmp_path):
    recipe = load_recipe(QUICKSTART, ["source=embedded:other", f"output_dir={tmp_path}", "data.align=8", "data.eval=8"])
    with pytest.raises(ValueError, match="use embedded:source or embedded:target"):
        run_recipe(recipe)


def test_pad_token_must_be_a_token(tmp_path):
    recipe = load_recipe(QUICKSTART, ["pad_token=<fill>", f"output_dir={tmp_path}", "data.align=8", "data.eval=8"])
    with pytest.raises(ValueError, match="pad_token '<fill>' is not in the tokenizer"):
        run_recipe(recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    small = [
        "training.max_steps=150",
        "training.frontier=joint",
        "training.logging_steps=10",
        "data.align=2048",
        "data.eval=80",
        "data.extract=16",
    ]
    recipe = load_recipe(QUICKSTART, [*small, f"output_dir={folder}"])
    return recipe, run_recipe(recipe), folder


def test_run_folder_is_complete(run):
    _, results, folder = run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith(("kd/", "_signals/"))}
    expected = {"adapter_model.safetensors", "adapter_config.json", "semalign.json", "README.md", "results.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "semantic_map.safetensors", "_lock", "_seconds.json"}
    expected |= {f"figures/{name}.{kind}" for name in ("layers", "losses", "comparison") for kind in ("png", "svg")}
    assert files == expected
    assert json.loads((folder / "results.json").read_text()) == results
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    for name in ("README.md", "results.json", "semalign.json", "adapter_config.json"):
        assert str(folder.parent) not in (folder / name).read_text()
        assert str(ROOT) not in (folder / name).read_text()


def test_results_tell_what_was_run(run):
    _, results, _ = run
    assert results["steps"] == 150
    assert set(results["metrics"]) == {"target", "source", "semalign", "kd"}
    assert {entry["stage"] for entry in results["history"]} >= {1}
    assert results["metrics"]["source"]["kl"] == 0.0
    assert results["metrics"]["semalign"]["kl"] < results["metrics"]["target"]["kl"]
    assert {
        "data",
        "loading the target",
        "attribution",
        "semantic map",
        "source signals",
        "training",
        "baseline kd",
        "total",
    } <= set(results["seconds"])
    assert results["peak_memory_mb"] > 100


def test_table_shows_every_method(run):
    shown = StringIO()
    Console(width=80, file=shown).print(results_table(run[1]))
    text = shown.getvalue()
    for row in ("Target before", "Distillation (KL only)", "SemAlign", "Source", "reverse %"):
        assert row in text


def test_plain_peft_loads_the_run_folder_and_reproduces_the_result(run):
    recipe, results, folder = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:target"))
    adapted = PeftModel.from_pretrained(base, folder)
    again, record = load_transfer(folder)
    inputs = tokenizer("sort c a b z =", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, again(**inputs).logits)
    assert record["source"] == "embedded:source"
    assert exact_match(again, tokenizer, recipe.data.load().eval) == results["metrics"]["semalign"]["exact_match"]


def test_a_baseline_that_fails_costs_nothing_of_the_main_run(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise MemoryError("simulated")

    small = ["training.max_steps=4", "data.align=32", "data.eval=8", "data.extract=4", f"output_dir={tmp_path}"]
    recipe = load_recipe(QUICKSTART, small)
    train = SemAlignTrainer.train
    monkeypatch.setattr(SemAlignTrainer, "train", lambda self, **kw: (fail if self.method == "kd" else train)(self, **kw))
    with pytest.raises(MemoryError):
        run_recipe(recipe)
    assert set(json.loads((tmp_path / "results.json").read_text())["metrics"]) == {"target", "source", "semalign"}
    assert {"README.md", "adapter_model.safetensors", "figures"} <= {path.name for path in tmp_path.iterdir()}


def test_a_second_run_never_loads_the_source(tmp_path, monkeypatch):
    """All that it says was kept, for other settings of training and for a baseline as well."""
    small = ["training.max_steps=4", "data.align=32", "data.eval=8", "data.extract=4", f"output_dir={tmp_path / 'a'}"]
    first = run_recipe(load_recipe(QUICKSTART, [*small, f"training.signals_dir={tmp_path / 'signals'}"]))
    monkeypatch.setattr(Source, "_need_weights", lambda self: pytest.fail("the source was loaded"))
    changes = ["training.seed=2", "training.frontier=single", f"output_dir={tmp_path / 'b'}"]
    second = run_recipe(load_recipe(QUICKSTART, [*small, f"training.signals_dir={tmp_path / 'signals'}", *changes]))
    assert second["metrics"]["source"] == first["metrics"]["source"]


@pytest.mark.parametrize("away", ["signals_dir", "source"])
def test_signals_made_alone_serve_a_run_on_a_machine_without_the_source(tmp_path, away, capsys):
    shutil.copytree(QUICKSTART.parents[2] / "hf_semalign" / "data" / "pair" / "source", tmp_path / "big")
    small = ["training.max_steps=12", "data.align=32", "data.eval=8", "data.extract=4", "baselines=[]"]
    small += ["training.frontier=single", "training.per_device_train_batch_size=8"]
    here = [f"source={tmp_path / 'big'}", f"output_dir={tmp_path / 'a'}", f"training.signals_dir={tmp_path / 'here'}"]
    assert main(["signals", "--config", str(QUICKSTART), *small, *here]) == 0
    (folder,) = (tmp_path / "here").iterdir()
    assert str(folder) in capsys.readouterr().out
    whole = run_recipe(load_recipe(QUICKSTART, [*small, *here]))

    if away == "source":
        shutil.rmtree(tmp_path / "big")
    (tmp_path / "there").mkdir()
    moved = shutil.move(folder, tmp_path / "there" / "renamed" if away == "source" else tmp_path / "there")
    source = moved if away == "source" else tmp_path / "big"
    if away == "signals_dir":
        for path in source.glob("*.safetensors"):
            os.utime(path)
    there = [f"source={source}", f"output_dir={tmp_path / 'b'}", f"training.signals_dir={tmp_path / 'there'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_semalign.models.frozen.load_model", refuse_to_load_a_source)
        again = run_recipe(load_recipe(QUICKSTART, [*small, *there]))
    assert again["metrics"] == whole["metrics"]
    assert json.loads((tmp_path / "b" / "semalign.json").read_text())["source"] == "big"


def refuse_to_load_a_source(*args, **kwargs):
    raise AssertionError("the source was loaded")


def test_a_recipe_with_a_streamed_source(tmp_path, capsys):
    """Whose own generation is not evaluated, since it is never held whole."""
    small = ["training.max_steps=4", "data.align=32", "data.eval=8", "data.extract=4", f"output_dir={tmp_path / 'a'}"]
    assert main(["train", "--config", str(QUICKSTART), *small, "training.source_memory=stream"]) == 0
    assert "SemAlign" in capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["metrics"]["source"] == {"kl": 0.0}
    assert results["metrics"]["kd"].keys() > {"kl", "exact_match"}
    assert results["metrics"]["semalign"].keys() == results["metrics"]["kd"].keys() | {"relation"}


def test_nothing_is_kept_of_an_online_source(tmp_path):
    with pytest.raises(ValueError, match="so nothing would be saved"):
        run_signals(load_recipe(QUICKSTART, ["training.signals=online", f"output_dir={tmp_path}"]))


def test_after_its_evaluation_the_source_is_let_go(tmp_path, monkeypatch):
    """With cached signals training needs none of it, on the device or off it."""
    seen = []
    train = SemAlignTrainer.train
    monkeypatch.setattr(SemAlignTrainer, "train", lambda self, **kw: (seen.append(self.source._model), train(self, **kw))[1])
    small = ["training.max_steps=4", "data.align=32", "data.eval=8", "data.extract=4", f"output_dir={tmp_path}"]
    run_recipe(load_recipe(QUICKSTART, small))
    assert seen == [None, None]  # the run's and its baseline's


def test_folder_without_a_record_is_no_transfer(tmp_path):
    with pytest.raises(FileNotFoundError, match="it is not a run folder"):
        load_transfer(tmp_path)


def test_command_line_reports_a_bad_recipe_in_one_line(capsys, caplog):
    assert main(["train", "--config", str(QUICKSTART), "training.relation_wieght=1"]) == 2
    assert "did you mean 'relation_weight'" in caplog.text


def test_help_needs_no_torch():
    code = "import sys, hf_semalign.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_importable():
    code = "from hf_semalign import *; import hf_semalign; [getattr(hf_semalign, name) for name in hf_semalign.__all__]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_forgetting_is_measured_on_tasks_that_are_not_transferred(tmp_path):
    small = ["training.max_steps=8", "data.align=64", "data.eval=8", "data.extract=4", "data.skills=[sort]"]
    others = ["forgetting={copy: {task: symbols, eval: 12, skills: [copy]}, shift: {task: symbols, eval: 6, skills: [shift]}}"]
    results = run_recipe(load_recipe(QUICKSTART, [*small, *others, f"output_dir={tmp_path}"]))
    for method, changed in (("target", False), ("semalign", True), ("kd", True)):
        found = results["metrics"][method]["forgetting"]
        assert found.keys() == {"copy", "shift"}
        assert found["copy"].keys() == {"kl", "loss", "accuracy", "exact_match"}
        assert found["copy"]["exact_match"].keys() == {"copy"}
        assert (found["copy"]["kl"] > 1e-4) == changed
    assert results["metrics"]["target"]["forgetting"]["copy"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "forgetting" not in results["metrics"]["source"]
    card = (tmp_path / "README.md").read_text()
    assert "was not measured" not in card
    assert "copy" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("forgetting={copy: {task: symbols}}", r"forgetting\.copy of the recipe .* lacks \['eval'\]"),
        ("forgetting={copy: {task: symbolz, eval: 3}}", "did you mean 'symbols'"),
        ("forgetting={copy: {task: symbols, eval: 3, skill: x}}", "did you mean 'skills'"),
        ("forgetting=[copy]", r"forgetting of the recipe .* expected names and values"),
    ],
)
def test_a_forgetting_section_that_cannot_be_used(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(QUICKSTART, [change])


def test_seconds_are_those_of_all_starts_and_a_task_has_the_name_of_the_recipe(good, tmp_path):
    recipe = load_recipe(good / "recipe.yaml", [f"output_dir={tmp_path / 'run'}", "data.name=tides", "training.save_steps=1"])
    first = run_recipe(recipe)["seconds"]
    second = run_recipe(recipe)  # nothing is left to train
    assert first["training"] <= second["seconds"]["training"] < first["training"] + 1
    assert second["seconds"]["total"] > first["total"]
    assert second["task"] == "tides" and "The task is tides." in (tmp_path / "run" / "README.md").read_text()
    assert load_run(tmp_path / "run").data.task == "records"
    anew = run_recipe(
        load_recipe(good / "recipe.yaml", [f"output_dir={tmp_path / 'run'}", "training.resume_from_checkpoint=false"])
    )
    assert anew["seconds"]["total"] < second["seconds"]["total"]
