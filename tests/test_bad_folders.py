"""Bad models, tokenizers, checkpoints, adapters and caches on the disk: a clear error, before weights are loaded.

One row a case. Recipes and data: tests/test_bad_recipes.py. The library: tests/test_bad_input.py.
"""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import WORDS, table, tiny_llama, tiny_model, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_semalign import load_transfer
from hf_semalign.cli import main


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def changed(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def pickled(name):
    def convert(folder):
        torch.save(load_file(folder / name), (folder / name).with_suffix(".bin"))
        (folder / name).unlink()

    return convert


def of_t5(folder):
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=97)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def without_layer(folder):
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "layers.1." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_tokenizer(tokenizer, **changes):
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return lambda folder: tokenizer.save_pretrained(folder)


MODELS = [
    ("no folder", shutil.rmtree, "The model '.*' cannot be read: give a Hub id, or a folder"),
    ("no config", without("config.json"), "cannot be read: .*Should have a `model_type` key in its config.json"),
    ("config no JSON", text("config.json", "{oops"), "cannot be read: .*is not a valid JSON file"),
    ("config of no family", changed("config.json", model_type="llamma"), "cannot be read: .*does not recognize this arch"),
    ("config of no width", changed("config.json", hidden_size="wide"), "cannot be read: .*'hidden_size' expected int"),
    ("config of no causal model", of_t5, "cannot be read: .*T5Config"),
    ("quantised otherwise", changed("config.json", quantization_config={"quant_method": "gptq"}), "quantised with gptq are no"),
    ("no weights", without("model.safetensors"), r"has no \*.safetensors files: give a folder saved by save_pretrained"),
    ("weights cut short", cut("model.safetensors"), "model.safetensors is damaged or truncated .*: copy or download it again"),
]
LOADED = [
    ("weights of another shape", changed("config.json", hidden_size=32), "do not match its config.json: .*missing or have a d"),
    ("weights of a layer missing", without_layer, "9 of them are missing .* such as .'model.layers.1.input_layernorm.weight'"),
    ("weights with nan", with_nan, "LlamaForCausalLM '.*' are not finite: its weights contain nan or inf"),
]
TOKENIZERS = [
    ("none", without("tokenizer.json", "tokenizer_config.json"), "The target '.*' has no tokenizer: save one next to its"),
    ("no JSON", text("tokenizer.json", "{oops"), "The tokenizer of '.*' is damaged .*: copy or save it again"),
    ("settings no JSON", text("tokenizer_config.json", "{oops"), "The tokenizer of '.*' is damaged"),
    ("no pad token", with_tokenizer(word_tokenizer(WORDS), pad_token=None), "no pad token: set .* pad_token in a recipe"),
    ("other ids", with_tokenizer(word_tokenizer(WORDS[::-1])), "94 of them under different ids"),
]


def damaged(good, tmp_path, role, damage):
    shutil.copytree(good / role, tmp_path / role)
    damage(tmp_path / role)
    return f"{role}={tmp_path / role}"


@pytest.mark.parametrize("role", ["source", "target"])
@table("damage, message", MODELS)
def test_models(good, refused, no_weights, tmp_path, role, damage, message):
    refused(message, damaged(good, tmp_path, role, damage))


@pytest.mark.parametrize("role", ["source", "target"])
@table("damage, message", LOADED)
def test_weights(good, refused, tmp_path, role, damage, message):
    refused(message, damaged(good, tmp_path, role, damage))


@table("damage, message", TOKENIZERS)
def test_tokenizers(good, refused, no_weights, tmp_path, damage, message):
    refused(message, damaged(good, tmp_path, "target", damage))


CHECKPOINTS = [
    ("no adapter", without("adapter_model.safetensors"), "missing adapter_model.safetensors. Name another checkpoint, or none"),
    ("adapter cut short", cut("adapter_model.safetensors"), "altered adapter_model.safetensors"),
    ("adapter pickled", pickled("adapter_model.safetensors"), "missing adapter_model.safetensors"),
    ("no record", without("semalign.json"), "missing semalign.json"),
    ("record no JSON", text("semalign.json", "{oops"), "altered semalign.json"),
    ("no state", without("trainer_state.json", "optimizer.pt"), "missing optimizer.pt, trainer_state.json"),
    ("unfinished", without("checksums.json"), "it was never finished: checksums.json is missing"),
]


@table("damage, message", CHECKPOINTS)
def test_checkpoints(good, refused, no_weights, tmp_path, damage, message):
    shutil.copytree(good / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(tmp_path / "checkpoint-2")
    refused(f"Cannot resume from .*: {message}", f"training.resume_from_checkpoint={tmp_path / 'checkpoint-2'}")


def test_a_checkpoint_of_another_run(good, refused, no_weights):
    changes = [f"training.resume_from_checkpoint={good / 'run' / 'checkpoint-2'}", "training.seed=3"]
    refused("The checkpoint .* was made with other seed: resume with the same models, data and settings", *changes)


ADAPTERS = [
    ("no folder", shutil.rmtree, FileNotFoundError, "is not a run folder, and was not found on the Hub"),
    ("no record", without("semalign.json"), FileNotFoundError, "has no semalign.json: it is not a run folder"),
    ("record no JSON", text("semalign.json", "{oops"), ValueError, "semalign.json is damaged .*: copy it again"),
    ("record of nothing", text("semalign.json", "{}"), ValueError, r"semalign.json lacks \['method', 'source', 'target'"),
    ("no adapter", without("adapter_model.safetensors"), FileNotFoundError, r"lacks \['adapter_model.safetensors'\]"),
    ("adapter pickled", pickled("adapter_model.safetensors"), FileNotFoundError, r"lacks \['adapter_model.safetensors'\]"),
    ("adapter cut short", cut("adapter_model.safetensors"), ValueError, "adapter_model.safetensors is damaged or truncated"),
    ("no adapter config", without("adapter_config.json"), FileNotFoundError, r"lacks \['adapter_config.json'\]"),
    ("adapter config no JSON", text("adapter_config.json", "{oops"), ValueError, "adapter_config.json is damaged"),
]


@pytest.fixture
def run(good, tmp_path):
    return shutil.copytree(good / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))


@table("damage, error, message", ADAPTERS)
def test_adapters(good, run, no_weights, damage, error, message):
    damage(run)
    with pytest.raises(error, match=message):
        load_transfer(run, target=str(good / "target"))


@table(
    "make, message",
    [
        ("deeper", lambda: tiny_llama(4, 16), "8 weights are in only one of them, such as base_model.model.model.layers.3."),
        ("shallower", lambda: tiny_llama(2, 16), "8 weights are in only one of them"),
        ("wider", lambda: tiny_llama(3, 24), "size mismatch"),
        (
            "of another family",
            lambda: tiny_model(GPT2LMHeadModel, GPT2Config, n_embd=16, n_layer=3, n_head=2),
            "not found in the",
        ),
    ],
)
def test_an_adapter_of_another_target(run, tmp_path, make, message):
    make().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"(?s)The adapter of .* does not fit .*other: .*{message}.*Pass its own target"):
        load_transfer(run, target=tmp_path / "other")


RUNS = [
    ("record a list", text("semalign.json", "[1]"), r"semalign.json is \[1\]: expected names and values"),
    ("record cut short", cut("semalign.json"), "semalign.json is damaged"),
    ("no settings", changed("semalign.json", settings=None), "settings of .*semalign.json is None: expected names and values"),
    ("a method of later", changed("semalign.json", method="magic"), "method of .*semalign.json is 'magic': expected one of"),
    ("rows of words", changed("semalign.json", data={"align": {"rows": "many"}}), r"data.align of .* lacks \['fingerprint'\]"),
    (
        "pairs of words",
        changed("semalign.json", pairing={"source_layers": ["a"], "num_source_layers": 5, "strategy": "last"}),
        r"source_layers\[0\] of the pairing of .*semalign.json is 'a': expected a whole number",
    ),
    (
        "pairs of others",
        changed("semalign.json", pairing={"source_layers": [4, 9], "num_source_layers": 5, "strategy": "last"}),
        r"The pairing \[4, 9\] must be ascending 0-based source layers between 0 and 4",
    ),
    ("results cut short", cut("results.json"), "results.json is damaged"),
    ("results a list", text("results.json", "[]"), r"results.json is \[\]: expected names and values"),
    ("results of nothing", text("results.json", "{}"), r"results.json lacks \['task', 'dataset', 'metrics'"),
    ("results of another run", changed("results.json", adapter_checksum="0"), "results.json is from another adapter than sem"),
    ("results of another method", changed("results.json", metrics={"kd": {}}), "results.json is from another adapter than sem"),
    (
        "a figure of words",
        changed("results.json", metrics={"kd": {"kl": "low"}}),
        "metrics.kd.kl of .* is 'low': expected a num",
    ),
]


@pytest.mark.parametrize("command", [["report"], ["push"], ["analyze", "cka"]], ids=lambda words: words[0])
@table("damage, message", RUNS)
def test_runs_of_another_form(run, no_weights, caplog, command, damage, message):
    damage(run)
    assert main([*command, str(run), *["me/run"] * (command == ["push"])]) == 2
    assert re.search(f"error: .*{message}", caplog.text)


def test_figures_of_a_card_that_are_not_there_are_missed_by_a_push_alone(run, caplog):
    (run / "figures" / "comparison.png").unlink()
    assert main(["push", str(run), "me/run"]) == 2
    assert "README.md shows ['figures/comparison.png'], but the folder lacks them" in caplog.text
    assert main(["report", str(run)]) == 0


def test_results_that_are_not_finite_are_shown(run):
    changed("results.json", metrics={"semalign": {"kl": math.nan, "loss": 1.0}, "target": {"kl": 1.0, "loss": math.inf}})(run)
    assert main(["report", str(run)]) == 0
    assert "nan" in (run / "report.html").read_text()


def test_benchmarks_of_another_adapter_are_not_reported(run, caplog):
    content = {"model": "run", "target": "target", "adapter_checksum": "0", "benchmarks": []}
    (run / "benchmarks.json").write_text(json.dumps(content))
    assert main(["report", str(run)]) == 2
    assert "benchmarks.json is from another adapter: run `semalign evaluate` again" in caplog.text


def test_a_transfer_whose_target_is_elsewhere(run):
    with pytest.raises(ValueError, match=r"The model 'target' cannot be read: .* pass the target's folder as target"):
        load_transfer(run)


def test_an_adapter_is_no_model(good, refused, no_weights, run):
    refused("cannot be read: give a Hub id, or a folder in which save_pretrained has saved a complete", f"target={run}")


@table(
    "damage, message",
    [
        ("record of nothing", text("semalign.json", "{}"), "semalign.json lacks"),
        ("no results", without("results.json"), "has no results.json, so its task is unknown: pass the recipe"),
        ("results no JSON", text("results.json", "{oops"), "results.json is damaged"),
        ("models elsewhere", without(), "The source 'source' was not found: set source="),
    ],
)
def test_runs_to_analyse(refused, no_weights, run, damage, message):
    damage(run)
    refused(message, command="cka", recipe=run)


FACTS = [
    ("facts no JSON", text("source.json", "{oops"), "source.json is damaged .*: copy it again, or recreate its folder"),
    ("facts of nothing", text("source.json", "{}"), r"source.json lacks \['name', 'identity', "),
    ("no facts", without("source.json"), r"has no \*.safetensors files"),
    ("no config", without("config.json"), "damaged or missing: config.json"),
]
ASKED = "has hidden states of source on some data, not its weights, .* Run `semalign signals` with the same recipe"
SIGNALS = [
    ("head missing", without("head.safetensors"), (), ASKED),
    ("head cut short", cut("head.safetensors"), (), ASKED),
    ("scores missing", lambda folder: [path.unlink() for path in folder.glob("scores-*")], (), ASKED),
    ("states cut short", lambda folder: [cut(path.name)(path.parent) for path in folder.glob("*/*/*.safetensors")], (), ASKED),
    ("other data", without(), ("data.align=20",), ASKED),
    ("asked online", without(), ("training.signals=online",), ASKED),
]


def kept(good, tmp_path, damage):
    (folder,) = (good / "signals").iterdir()
    damage(shutil.copytree(folder, tmp_path / "signals"))
    return f"source={tmp_path / 'signals'}"


@table("damage, message", FACTS)
def test_caches_that_say_nothing_of_the_source(good, refused, no_weights, tmp_path, damage, message):
    refused(message, kept(good, tmp_path, damage))


@table("damage, changes, message", SIGNALS)
def test_caches_that_lack_what_is_needed(good, refused, tmp_path, damage, changes, message):
    refused(message, kept(good, tmp_path, damage), *changes)


def test_an_undamaged_cache_stands_for_the_source(good, tmp_path):
    changes = [kept(good, tmp_path, without()), f"output_dir={tmp_path / 'run'}"]
    assert main(["train", "--config", str(good / "recipe.yaml"), *changes]) == 0
