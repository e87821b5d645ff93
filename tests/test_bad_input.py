"""Bad input: a clear error that says what was given and what to do, before any training."""

import pytest
import torch
from conftest import random_rows, tiny_llama, word_tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_semalign.config import SemAlignConfig
from hf_semalign.pairing import pair_layers
from hf_semalign.splits import IGNORED
from hf_semalign.trainer import SemAlignTrainer

ROWS = random_rows([(4, 3)] * 24)
WORDS = [f"w{i}" for i in range(94)]


def target(**config):
    return tiny_llama(3, 16, **{"pad_token_id": 0, **config})


def build(tmp_path, *, model=None, source=None, train=ROWS[:16], extract=ROWS[16:20], given=None, settings=None):
    settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **(settings or {})}
    return SemAlignTrainer(
        model if model is not None else target(),
        source if source is not None else tiny_llama(5, 24),
        SemAlignConfig(output_dir=str(tmp_path / "run"), **settings),
        train,
        extract_dataset=extract,
        **(given or {}),
    )


SETTINGS = [
    ({"pairing": "best"}, "pairing is 'best': expected one of"),
    ({"map_kind": "ridge"}, r"map_kind is 'ridge': expected one of \('readout', 'projection', 'cosine'\)"),
    ({"scale": "auto"}, "scale is 'auto'"),
    ({"frontier": "window"}, "frontier is 'window'"),
    ({"stage_budget": "even"}, "stage_budget is 'even'"),
    ({"layer_loss": "mse"}, "layer_loss is 'mse'"),
    ({"output_loss": "mse"}, r"output_loss is 'mse': expected one of \('kl', 'cosine'\)"),
    ({"relation_weight": -1.0}, "relation_weight is -1.0: expected a finite number of at least 0"),
    ({"relation_weight": 0.0, "kl_weight": 0.0}, "are both 0"),
    ({"lora_r": 0}, "lora_r is 0"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ({"push_to_hub": True}, "push_to_hub is not supported: train, then publish"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported: another batch size would move the stages"),
    ({"bf16_full_eval": True}, "bf16_full_eval is not supported: the target must keep one dtype"),
    ({"torch_compile": True}, "torch_compile is not supported"),
    ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters must not be False"),
    ({"signals": "disk"}, "signals is 'disk'"),
    ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
    ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant must be"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=["-".join(case[0]) for case in SETTINGS])
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SemAlignConfig(output_dir=str(tmp_path), **settings)


def test_rows_without_valid_positions_are_named(tmp_path):
    rows = [*ROWS[:15], {"input_ids": [5, 6, 7], "labels": [IGNORED] * 3}]
    with pytest.raises(ValueError, match=r"No valid positions in 1 of 16 rows of the align split \(rows \[15\]\)"):
        build(tmp_path, train=rows)


def test_answers_cut_off_by_max_length(tmp_path):
    with pytest.raises(ValueError, match=r"raise max_length \(now 4\)"):
        build(tmp_path, settings={"max_length": 4})


@pytest.mark.parametrize(("split", "row"), [("extract", r"extract\[0\] = align\[10\]"), ("eval", r"align\[10\] = eval\[0\]")])
def test_overlapping_splits_name_the_rows(tmp_path, split, row):
    arguments = {"extract": ROWS[10:14]} if split == "extract" else {"given": {"eval_dataset": ROWS[10:14]}}
    with pytest.raises(ValueError, match=r"Overlapping splits: 4 prompts") as error:
        build(tmp_path, **arguments)
    assert error.match(row)


@pytest.mark.parametrize("strategy", ["attribution", "banded", "uniform", "last"])
def test_source_shallower_than_target(tmp_path, strategy):
    with pytest.raises(ValueError, match=r"The source has 2 layers and the target 3.*'proportional', which may repeat"):
        build(tmp_path, source=tiny_llama(2, 24), settings={"pairing": strategy})


def test_shallow_source_under_proportional_pairing_works(tmp_path):
    assert build(tmp_path, source=tiny_llama(2, 24), settings={"pairing": "proportional"}).pairing.source_layers == (0, 0, 1)


@pytest.mark.parametrize(
    ("layers", "message"), [([0, 1], "lists 2 source layers"), ([2, 1, 0], "ascending"), ([0, 1, 9], "0 and 4")]
)
def test_explicit_pairings_that_do_not_fit(tmp_path, layers, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, settings={"pairing": layers})


def test_pairing_of_other_models(tmp_path):
    with pytest.raises(ValueError, match="The pairing is for 8 source and 3 target layers; these models have 5 and 3"):
        build(tmp_path, given={"pairing": pair_layers(8, 3, "last")})


def test_hidden_layers_not_found(tmp_path):
    model = target()
    model.model.layers = nn.ModuleList(model.model.layers[:2])
    with pytest.raises(ValueError, match=r"Hidden layers of LlamaForCausalLM not found.*one ModuleList of 3.*'layers': 2"):
        build(tmp_path, model=model)


def test_lora_modules_not_found(tmp_path):
    with pytest.raises(ValueError, match=r"\['query'\] occur in no layer. Candidates: \['down_proj'"):
        build(tmp_path, settings={"lora_targets": ["query", "v_proj"]})


def test_fewer_steps_than_stages(tmp_path):
    with pytest.raises(ValueError, match=r"2 optimizer steps for 3 stages.*The smallest budget is 3 steps"):
        build(tmp_path, settings={"max_steps": 2})


def test_missing_pad_token(tmp_path):
    with pytest.raises(ValueError, match="no pad token"):
        build(tmp_path, model=target(pad_token_id=None))
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="The tokenizer has no pad token"):
        build(tmp_path, given={"processing_class": tokenizer})


def save(folder, model, words):
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return str(folder)


def test_unrelated_tokenizers_state_how_many_tokens_are_shared(tmp_path):
    model = save(tmp_path / "target", target(), WORDS)
    source = save(tmp_path / "source", tiny_llama(5, 24), [f"v{i}" for i in range(94)])
    with pytest.raises(ValueError, match="share 3 tokens of 97"):
        build(tmp_path, model=model, source=source)


def test_one_vocabulary_under_other_ids(tmp_path):
    model = save(tmp_path / "target", target(), WORDS)
    source = save(tmp_path / "source", tiny_llama(5, 24), WORDS[::-1])
    with pytest.raises(ValueError, match="94 of them under different ids"):
        build(tmp_path, model=model, source=source)


def test_text_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="pass its tokenizer as processing_class"):
        build(tmp_path, train=[{"prompt": "a", "completion": "b"}] * 8)


def test_unknown_columns(tmp_path):
    with pytest.raises(ValueError, match=r"has the columns \['answer', 'question'\]"):
        build(tmp_path, train=[{"question": "a", "answer": "b"}] * 8, given={"processing_class": word_tokenizer(WORDS)})


def test_empty_training_data(tmp_path):
    with pytest.raises(ValueError, match="The align split has no rows"):
        build(tmp_path, train=[])


def test_too_few_rows_to_hold_an_extract_split_out(tmp_path):
    with pytest.raises(ValueError, match=r"4 training rows are too few .* pass extract_dataset"):
        build(tmp_path, train=ROWS[:4], extract=None)


def test_peft_model_as_target(tmp_path):
    adapted = get_peft_model(target(), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="carries LoRA already: pass a base model"):
        build(tmp_path, model=adapted)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND"])
def test_engines_of_the_accelerate_config_that_are_not_supported(tmp_path, monkeypatch, variable):
    args = SemAlignConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv(variable, "inductor" if "DYNAMO" in variable else "true")
    with pytest.raises(ValueError, match=f"The accelerate config asks for .* \\({variable}\\)"):
        SemAlignTrainer(target(), tiny_llama(5, 24), args, ROWS)


def test_budget_changed_after_the_stages_were_planned(tmp_path):
    trainer = build(tmp_path)
    trainer.args.max_steps = 6
    with pytest.raises(ValueError, match="The run has 6 steps, but its stages were planned for 3"):
        trainer.train()


def test_map_of_other_models(tmp_path):
    other = build(tmp_path / "a", model=tiny_llama(3, 8, pad_token_id=0)).semantic_map
    with pytest.raises(ValueError, match=r"The map is of shape \(8, 24\); these models need \(16, 24\)"):
        build(tmp_path / "b", given={"semantic_map": other})


def test_stream_of_rows(tmp_path):
    with pytest.raises(ValueError, match="generator without a length: pass a Dataset or a list"):
        build(tmp_path, train=(row for row in ROWS))


def test_a_refused_budget_leaves_the_model_usable(tmp_path):
    model = target()
    with pytest.raises(ValueError, match="2 optimizer steps for 3 stages"):
        build(tmp_path, model=model, settings={"max_steps": 2})
    build(tmp_path, model=model).train()
    with pytest.raises(ValueError, match="carries LoRA already"):
        build(tmp_path, model=model)


def test_loaded_models_with_tokenizers_of_their_own_are_compared(tmp_path):
    folders = [save(tmp_path / "target", target(), WORDS), save(tmp_path / "source", tiny_llama(5, 24), WORDS[::-1])]
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in folders]
    with pytest.raises(ValueError, match="94 of them under different ids"):
        build(tmp_path, model=models[0], source=models[1], given={"processing_class": word_tokenizer(WORDS)})


def test_plain_training_arguments():
    with pytest.raises(ValueError, match="expected a SemAlignConfig"):
        SemAlignTrainer(target(), tiny_llama(5, 24), object(), ROWS)


def test_learning_rate_schedule_that_cannot_restart(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match="cannot restart with each stage"):
        build(tmp_path, settings=settings, given={"eval_dataset": ROWS[20:]})


def test_logits_that_no_head_explains(tmp_path):
    model = target()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + logits.mean(-1, keepdim=True) ** 2 + logits**2)
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not those of its head on its decoder's output"):
        build(tmp_path, model=model)


def test_a_token_that_the_source_has_no_embedding_for(tmp_path):
    tiny_llama(5, 24).save_pretrained(tmp_path / "source")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "source")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": " w3 w4"} for i in range(24)]
    rows[5]["completion"] = " w3 <added>"
    with pytest.raises(
        ValueError, match=r"Token id 97 \('<added>'\) in the align split: the source has embeddings for 97 tokens"
    ):
        build(
            tmp_path,
            model=target(vocab=98),
            source=str(tmp_path / "source"),
            train=rows[:16],
            extract=rows[16:],
            given={"processing_class": word_tokenizer([*WORDS, "<added>"])},
        )


def test_nothing_was_trained_or_written_before_an_error(tmp_path):
    model = target()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lists 1 source layers"):
        build(tmp_path, model=model, settings={"pairing": [0]})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "run" / "semantic_map.safetensors").exists()
