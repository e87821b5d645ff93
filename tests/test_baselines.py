"""Distillation and fine-tuning: the settings that make them up, and fine-tuning against TRL's."""

import json

import pytest
import torch
from conftest import PAPER, batches_of, random_rows, tiny_llama
from peft import LoraConfig
from test_recipe import QUICKSTART
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig
from trl import SFTTrainer as Reference

from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.baselines.kd import KDTrainer
from hf_semalign.experiments.baselines.sft import SFTTrainer
from hf_semalign.experiments.evaluation import answer_loss, drift, final_states
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.experiments.run import HeldOut, run_recipe
from hf_semalign.hub.card import METHOD_NAMES
from hf_semalign.hub.loading import load_transfer
from hf_semalign.models.anatomy import dissect
from hf_semalign.models.loading import load_weights
from hf_semalign.models.names import resolve_model
from hf_semalign.splits import Collator

ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(30)])
SETTINGS = {
    "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 3,
}  # fmt: skip


def make(trainer, folder, **settings):
    args = SemAlignConfig(output_dir=str(folder), **{**PAPER, **SETTINGS, **trainer.settings, **settings})
    source, target = tiny_llama(5, 24, seed=2, pad_token_id=0), tiny_llama(3, 16, seed=1, pad_token_id=0)
    return trainer(target, source, args, ROWS[:18], eval_dataset=ROWS[18:24], extract_dataset=ROWS[24:])


def adapter(model):
    state = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    assert state
    return state


def test_fine_tuning_is_that_of_trl(tmp_path):
    """The same losses in every step and the same adapter, over accumulated batches of unequal lengths and two epochs."""
    ours = make(SFTTrainer, tmp_path / "ours")
    ours.train()
    collate = Collator(pad_token_id=0)
    target = tiny_llama(3, 16, seed=1, pad_token_id=0)
    names = {path.rpartition(".")[2] for path in adapter_modules(ours.model)}
    theirs = Reference(
        model=target,
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            gradient_checkpointing=False,
            **SETTINGS,
        ),
        data_collator=lambda rows: {k: v for k, v in collate(rows).items() if k != "example_id"},
        train_dataset=ours.train_dataset,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})), pad_token="<pad>"),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=sorted(names), task_type="CAUSAL_LM"),
    )
    start = {name: p.clone() for name, p in adapter(make(SFTTrainer, tmp_path / "start").model).items()}
    theirs.model.load_state_dict(start, strict=False)
    theirs.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    mine, reference = adapter(ours.model), adapter(theirs.model)
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name])


def adapter_modules(model):
    return {name.split(".lora_")[0] for name in adapter(model)}


def test_fine_tuning_asks_nothing_of_the_source_but_its_evaluation(tmp_path):
    """The source runs over the eval split, for the KL. No layer is scored and no state is mapped."""
    trainer = make(SFTTrainer, tmp_path, pairing="attribution")
    signals = trainer.signals.splits
    trainer.prepare()
    for split, there in (("eval", True), ("align", False)):
        assert (signals[split]._states.missing(signals[split]._final) == {}) == there
    assert trainer.seconds.keys() == {"loading the target", "semantic map", "source signals"}
    kept = {path.parent.name for path in tmp_path.rglob("*.safetensors") if path.parent.parent == signals["eval"].folder}
    assert kept == {"final"}
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics.keys() >= {"eval_kl", "eval_loss"} and "eval_relation" not in metrics


def test_fine_tuning_learns_the_answers_and_not_the_source(tmp_path):
    trainer = make(SFTTrainer, tmp_path, max_steps=60)
    batches = batches_of(ROWS[:18], 6)
    before = answer_loss(trainer.model, batches)
    trainer.train()
    assert answer_loss(trainer.model, batches) < 0.5 * before
    with pytest.raises(ValueError, match="No source signals for example"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize("trainer", [KDTrainer, SFTTrainer])
def test_a_baseline_is_what_its_settings_say(trainer, tmp_path):
    with pytest.raises(ValueError, match=rf"{trainer.__name__} requires .*; got .*'frontier': 'single'"):
        make(trainer, tmp_path, frontier="single")
    made = make(trainer, tmp_path)
    assert made.record()["method"] == trainer.method
    assert len(made.lora_layers) == len(dissect(made.model).layers)
    assert all(p.requires_grad for layer in made.lora_layers for p in layer)


@pytest.mark.parametrize("method", ["kd", "sft", "seeking", "laten"])
def test_a_recipe_of_a_baseline_leaves_the_folder_of_any_run(method, tmp_path):
    small = ["training.max_steps=4", "data.align=64", "data.eval=8", "data.extract=4", "baselines=[]"]
    small += ["forgetting={copy: {task: symbols, eval: 4, skills: [copy]}}"]
    results = run_recipe(load_recipe(QUICKSTART, [*small, f"method={method}", f"output_dir={tmp_path}"]))
    assert set(results["metrics"]) == {"target", "source", method}
    assert results["metrics"][method]["kl"] != results["metrics"]["target"]["kl"]
    card = (tmp_path / "README.md").read_text()
    assert f"# {METHOD_NAMES[method]}: embedded:source → embedded:target" in card
    assert "relation loss" not in card
    assert "map_kind" not in card
    assert json.loads((tmp_path / "semalign.json").read_text())["method"] == method
    loaded, record = load_transfer(tmp_path)
    assert record["method"] == method
    again = HeldOut.load(load_recipe(QUICKSTART, small), AutoTokenizer.from_pretrained(tmp_path))[0]
    batches = DataLoader(again.rows, 4, collate_fn=Collator(pad_token_id=0))
    before = [states for states, _ in final_states(load_weights(resolve_model("embedded:target")), batches)]
    # It is the adapter that was measured.
    found, told = drift(loaded, batches, before), results["metrics"][method]["forgetting"]["copy"]
    assert found == pytest.approx({name: told[name] for name in found}, rel=1e-3, abs=1e-6)
    assert not (tmp_path / "figures" / "layers.png").exists()


def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match=r"Unknown key 'sfd' in the method of .*did you mean 'sft'"):
        load_recipe(QUICKSTART, ["method=sfd"])
