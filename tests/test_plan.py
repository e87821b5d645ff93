"""Plans against operations counted by torch, and against runs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import PAPER, WORDS, random_rows, tiny_llama, tiny_model, word_tokenizer
from test_baselines import SETTINGS
from test_recipe import QUICKSTART
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from hf_semalign.cli import main
from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.plan import CPU_SHARE, GPU_FLOPS, LIBRARIES, plan, plan_recipe
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.models.anatomy import Size, dissect
from hf_semalign.training.preparation import prepare

WIDE = {"vocab": 200, "heads": 2, "pad_token_id": 0}
ROWS = random_rows([(4 + i % 3, 5 + i % 4) for i in range(24)], vocab=200)


def test_size_of_a_small_llama():
    model = tiny_llama(3, 16, tie_word_embeddings=True)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = 97 * 16
    outputs = sum(p.shape[0] for p in model.model.layers[0].parameters() if p.dim() == 2)
    assert Size.of(dissect(model)) == Size(3, layer, head, 16, sum(p.numel() for p in model.parameters()), outputs, 4)
    assert Size.of(dissect(model)).forward(tokens=10, valid=4) == 10 * 3 * layer + 4 * head
    assert Size.of(dissect(model)).forward(tokens=10, layers=1) == 10 * layer


def test_of_experts_those_that_a_token_is_sent_to_count():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    models = [
        tiny_model(
            MixtralForCausalLM, MixtralConfig, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=k, **shape
        )
        for k in (1, 2)
    ]
    sizes = [Size.of(dissect(model)) for model in models]
    assert sizes[1].layer - sizes[0].layer == 3 * 16 * 32  # one expert more: gate, up and down
    assert sizes[1].parameters == sizes[0].parameters


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("kd", {}),
        ("sft", {}),
        ("semalign", {"frontier": "joint"}),
        ("semalign", {"frontier": "single", "num_train_epochs": 6}),  # with the target prefix
        ("semalign", {"frontier": "cumulative", "signals": "online"}),
    ],
)
def test_training_costs_what_torch_counts(method, settings, tmp_path):
    """Up to LoRA, attention and the losses between positions, which are small in layers as wide as these."""
    trainer_class = METHODS[method].trainer
    settings = {**SETTINGS, "max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 1, "lora_r": 1} | settings
    args = SemAlignConfig(output_dir=str(tmp_path), **{**PAPER, "pairing": "last", **settings, **trainer_class.settings})
    source, target = tiny_llama(4, 96, seed=2, **WIDE), tiny_llama(3, 64, seed=1, **WIDE)
    trainer = trainer_class(target, source, args, ROWS)
    trainer.prepare()
    planned = plan(prepare(tiny_llama(3, 64, seed=1, **WIDE), source, args, ROWS), args, method)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    cost = planned.cost["training"] + planned.cost.get("prefix", 0)
    assert trainer.state.global_step == planned.steps
    assert 2 * cost * planned.multiplications == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_the_pass_of_the_source_costs_what_torch_counts(tmp_path):
    args = SemAlignConfig(output_dir=str(tmp_path), **{**PAPER, "pairing": "last", **SETTINGS, "frontier": "joint"})
    source, target = tiny_llama(4, 96, seed=2, **WIDE), tiny_llama(3, 64, seed=1, **WIDE)
    planned = plan(prepare(target, source, args, ROWS), args, "semalign")
    with FlopCounterMode(display=False) as counter:
        METHODS["semalign"].trainer(tiny_llama(3, 64, seed=1, **WIDE), source, args, ROWS).prepare()
    # Beside the pass: the map, and a look at whether heads explain the logits of a few tokens.
    assert 2 * planned.cost["signals"] * planned.multiplications == pytest.approx(counter.get_total_flops(), rel=0.3)


@pytest.mark.parametrize("frontier", ["joint", "single"])
@pytest.mark.parametrize("method", ["semalign", "kd", "sft", "seeking"])
def test_steps_for_a_budget(method, frontier, no_weights):
    small = ["data.align=256", "data.eval=8", "data.extract=4", f"training.frontier={frontier}", f"method={method}"]
    recipe = load_recipe(QUICKSTART, [*small, "training.max_steps=100"])
    planned = plan_recipe(recipe)
    total = sum(planned.cost.values())
    assert planned.steps_for(total) == planned.steps == 100
    steps = planned.steps_for(1.7 * total)
    again = plan_recipe(replace(recipe, training={**recipe.training, "max_steps": steps}))
    assert sum(again.cost.values()) == pytest.approx(1.7 * total, rel=1.5 / steps)
    with pytest.raises(ValueError, match="raise the budget"):
        planned.steps_for(total - planned.cost["training"])


@pytest.mark.parametrize("method", ["kd", "sft"])
def test_baselines_without_pairs_count_no_attribution(method, no_weights):
    small = ["data.align=64", "data.eval=8", "data.extract=4", "training.max_steps=4", "training.pairing=attribution"]
    assert "attribution" not in plan_recipe(load_recipe(QUICKSTART, [*small, f"method={method}"])).cost


def test_a_plan_is_that_of_the_run(no_weights):
    recipe = load_recipe(QUICKSTART, ["training.frontier=single", "training.pairing=last"])
    planned = plan_recipe(recipe)
    assert planned.source_layers == (2, 3, 4, 5)
    assert [last - first for first, last in pairwise(planned.stages)] == [450] * 4
    assert planned.splits["align"].rows == 8192
    assert planned.cost.keys() == {"signals", "prefix", "training"}
    strict, joint = planned.cost["training"], plan_recipe(load_recipe(QUICKSTART)).cost["training"]
    assert 0.4 < strict / joint < 0.8
    valid = sum(planned.splits[name].valid for name in ("align", "eval"))
    assert planned.disk_bytes == valid * (48 + 4 * 32) * 4
    assert planned.memory_bytes["target prefix"] == planned.splits["align"].tokens * 32 * 4


def test_dry_run_prints_the_plan(no_weights, capsys, tmp_path):
    arguments = [
        "train",
        "--config",
        str(QUICKSTART),
        "--dry-run",
        f"output_dir={tmp_path / 'run'}",
        "training.frontier=single",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("embedded:source to embedded:target", "4: 0-450, 450-900", "chosen by attribution", "signals", "GFLOP"):
        assert text in shown
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_what_is_held_is_counted_in_the_dtype_that_weights_will_have(good, tmp_path):
    """Half-precision files are computed with in float32 without bf16, and stand beside that while they are loaded."""
    for name, shape in (("target", (3, 64)), ("source", (5, 96))):
        tiny_llama(*shape, pad_token_id=0, heads=2).to(torch.bfloat16).save_pretrained(tmp_path / name)
        word_tokenizer(WORDS).save_pretrained(tmp_path / name)
    models = [f"{name}={tmp_path / name}" for name in ("source", "target")]
    full, half = (
        plan_recipe(load_recipe(good / "recipe.yaml", [*models, f"output_dir={tmp_path / 'run'}", f"training.bf16={bf16}"]))
        for bf16 in ("false", "true")
    )
    weights = {name: size.parameters for name, size in full.sizes.items()}
    assert full.sizes["source"].bytes == full.sizes["target"].bytes == 4 and half.sizes["source"].bytes == 2
    for planned in (full, half):
        assert planned.memory_bytes["source"] > LIBRARIES + sum(size.parameters * size.bytes for size in planned.sizes.values())
    streamed = plan_recipe(
        load_recipe(good / "recipe.yaml", [*models, f"output_dir={tmp_path / 'run'}", "training.source_memory=stream"])
    )
    assert streamed.memory_bytes["source"] < full.memory_bytes["source"] - weights["source"]


def test_time_is_that_of_the_machine_that_the_recipe_names(monkeypatch, capsys):
    monkeypatch.setattr("hf_semalign.experiments.plan.product_seconds", lambda dtype, size: 2 * 64 * size**2 / 1e10)
    here, there = (
        plan_recipe(load_recipe(QUICKSTART, [f"training.use_cpu={use_cpu}", "data.align=64", "data.eval=8", "data.extract=4"]))
        for use_cpu in ("true", "false")
    )
    assert here.flops == pytest.approx(CPU_SHARE * 1e10) and there.flops == GPU_FLOPS
    assert here.cost == there.cost
    assert main(["train", "--config", str(QUICKSTART), "--dry-run", "data.align=64"]) == 0
    assert "at 7 GFLOP/s sustained, as this CPU in torch.float32" in capsys.readouterr().out


def test_a_recipe_for_a_gpu_is_planned_without_one(no_weights, capsys, tmp_path):
    settings = ["training.use_cpu=false", "training.bf16=true", "data.align=64", f"output_dir={tmp_path}"]
    assert main(["train", "--config", str(QUICKSTART), "--dry-run", *settings]) == 0
    assert "100 TFLOP/s sustained" in capsys.readouterr().out
