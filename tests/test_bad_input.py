"""Bad input to the library: a clear error that says what was given and what to do, before any training.

One row a case. The command line: tests/test_bad_recipes.py. Folders on the disk: tests/test_bad_folders.py.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import PAPER, TEXTS, WORDS, batches_of, random_rows, table, tiny_llama, word_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, SemAlignError
from hf_semalign.experiments import analysis
from hf_semalign.experiments.analysis import layer_cka, recomposition_cosines
from hf_semalign.experiments.benchmarks.harness import run_benchmark
from hf_semalign.experiments.evaluation import answer_loss
from hf_semalign.method.attribution import LayerScores, attribute_layers
from hf_semalign.method.frontier import FrontierSchedule
from hf_semalign.method.losses import fisher_loss, output_kl, relation_loss, steering_loss
from hf_semalign.method.pairing import LayerPairing, pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.tokenization import IGNORED
from hf_semalign.trainer import SemAlignTrainer
from hf_semalign.training.engines import check_sharded, check_shards, check_zero

ROWS = random_rows([(4, 3)] * 24)

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
SHALLOW = "The source has 2 layers and the target 3.*'proportional', which can repeat"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def target(**config):
    return tiny_llama(3, 16, **{"pad_token_id": 0, **config})


def build(tmp_path, *, model=None, source=None, train=ROWS[:16], extract=ROWS[16:20], given=None, settings=None):
    settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **(settings or {})}
    return SemAlignTrainer(
        model if model is not None else target(),
        source if source is not None else tiny_llama(5, 24),
        SemAlignConfig(output_dir=str(tmp_path / "run"), **{**PAPER, **settings}),
        train,
        extract_dataset=extract,
        **(given or {}),
    )


SETTINGS = [
    ("pairing unknown", {"pairing": "best"}, "pairing is 'best': expected one of .* or a list of source layers"),
    ("pairing of words", {"pairing": ["a", "b", "c"]}, r"pairing is \['a', 'b', 'c'\]: expected one of"),
    ("pairing of fractions", {"pairing": [0, 1.5, 2]}, r"pairing is \[0, 1.5, 2\]: expected one of"),
    ("pairing of one layer", {"pairing": 2}, "pairing is 2: expected one of"),
    ("pairing cut short", {"pairing": "[0, 1"}, r"pairing is '\[0, 1': expected one of"),
    ("map_kind unknown", {"map_kind": "ridge"}, r"map_kind is 'ridge': expected one of \('readout', 'projection', 'cosine'\)"),
    ("scale unknown", {"scale": "auto"}, "scale is 'auto'"),
    ("frontier unknown", {"frontier": "window"}, "frontier is 'window'"),
    ("stage_budget unknown", {"stage_budget": "even"}, "stage_budget is 'even'"),
    ("layer_loss unknown", {"layer_loss": "mse"}, "layer_loss is 'mse'"),
    ("output_loss unknown", {"output_loss": "mse"}, r"output_loss is 'mse': expected one of \('kl', 'cosine', 'answers'\)"),
    ("signals unknown", {"signals": "disk"}, "signals is 'disk'"),
    ("signals streamed and online", {"signals": "online", "source_memory": "stream"}, "the source must be resident"),
    ("prefix_memory unknown", {"prefix_memory": "disk"}, "prefix_memory is 'disk': expected one of"),
    ("signals_dir a number", {"signals_dir": 5}, "signals_dir is 5: expected text"),
    ("weight_decay nan", {"weight_decay": float("nan")}, "weight_decay is nan: expected a finite number"),
    ("seed too large", {"seed": 2**32}, "seed is 4294967296: expected at most 4294967295"),
    ("LoRA in no module", {"lora_targets": []}, r"lora_targets is \[\]: expected a list of module names"),
    ("an unknown sampler", {"train_sampling_strategy": "foo"}, "train_sampling_strategy is 'foo': expected one of random, seq"),
    ("an unknown log level", {"log_level": "loud"}, "log_level is .loud.: expected one of detail, debug"),
    ("an unknown reporter", {"report_to": "foo"}, "foo is not supported, only"),
    ("kwargs of text", {"lr_scheduler_kwargs": "foo"}, "lr_scheduler_kwargs is 'foo': expected names and values"),
    ("relation_weight negative", {"relation_weight": -1.0}, "relation_weight is -1.0: expected a finite number of at least 0"),
    ("kl_weight not a number", {"kl_weight": float("nan")}, "kl_weight is nan: expected a finite number"),
    ("both weights zero", {"relation_weight": 0.0, "kl_weight": 0.0}, "relation_weight and kl_weight are both 0"),
    ("lora_r zero", {"lora_r": 0}, "lora_r is 0: expected a finite number of at least 1"),
    ("lora_r a fraction", {"lora_r": 2.5}, "lora_r is 2.5: expected a whole number"),
    ("lora_alpha a word", {"lora_alpha": "four"}, "lora_alpha is 'four': expected a whole number"),
    ("lora_targets a word", {"lora_targets": "v_proj"}, "lora_targets is 'v_proj': expected a list"),
    ("learning_rate negative", {"learning_rate": -1e-3}, "learning_rate is -0.001: expected a finite number of at least 0"),
    ("max_steps negative", {"max_steps": -5}, "max_steps is -5: expected at least 1, or -1 to use num_train_epochs"),
    ("max_steps zero", {"max_steps": 0}, "max_steps is 0: expected at least 1"),
    ("num_train_epochs infinite", {"num_train_epochs": float("inf")}, "num_train_epochs is inf: expected a finite number"),
    ("batch size zero", {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: expected .* at least 1"),
    ("accumulation zero", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: expected .* at least 1"),
    ("max_length negative", {"max_length": -3}, "max_length is -3: expected a finite number of at least 1"),
    ("seed missing", {"seed": None}, "seed is None: expected a whole number"),
    ("seed true", {"seed": True}, "seed is True: expected a whole number"),
    ("bf16 a word", {"bf16": "maybe"}, "bf16 is 'maybe': expected true or false"),
    ("label_smoothing_factor", {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ("hub_always_push", {"hub_always_push": True}, "hub_always_push is not supported: a run is published once"),
    ("hub_strategy", {"hub_strategy": "checkpoint"}, "hub_strategy is .*'checkpoint'.*: expected 'end'"),
    ("auto_find_batch_size", {"auto_find_batch_size": True}, "different batch size would move the stage boundaries"),
    ("bf16_full_eval", {"bf16_full_eval": True}, "bf16_full_eval is not supported: the target must keep one dtype"),
    ("torch_compile", {"torch_compile": True}, "torch_compile is not supported"),
    ("uneven batches", {"accelerator_config": {"even_batches": False}}, "must keep even_batches True"),
    ("split batches", {"accelerator_config": {"split_batches": True}}, "split_batches and dispatch_batches False"),
    ("fsdp", {"fsdp": True}, "fsdp is not supported: choose FSDP2 in an accelerate config"),
    ("deepspeed", {"deepspeed": "zero3.json"}, "deepspeed is not supported: choose ZeRO-2 in an accelerate config"),
    ("unused parameters", {"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters must not be False"),
    ("token averages", {"average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
    (
        "reentrant checkpointing",
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "use_reentrant must be",
    ),
]


@table("settings, message", SETTINGS)
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SemAlignConfig(output_dir=str(tmp_path), **{**PAPER, **settings})


def shortened():
    model = target()
    model.model.layers = nn.ModuleList(model.model.layers[:2])
    return model


def with_logits_of_no_head():
    model = target()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + logits.mean(-1, keepdim=True) ** 2 + logits**2)
    return model


def with_nan():
    model = target()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    return model


def with_lora():
    return get_peft_model(target(), LoraConfig(target_modules=["v_proj"]))


def shallow(pairing):
    return lambda: {"source": tiny_llama(2, 24), "settings": {"pairing": pairing}}


def without_pad():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = None
    return tokenizer


def settings(**values):
    return lambda: {"settings": values}


def rows(*records, tokenizer=True, **others):
    """Training rows, the last of which are bad; with a tokenizer, where they hold text."""
    good = TEXTS[:8] if tokenizer else ROWS[:8]
    return lambda: {
        "train": [*good, *records],
        "given": {"processing_class": word_tokenizer(WORDS)} if tokenizer else {},
        **others,
    }


def ids(input_ids, labels, **columns):
    return rows({"input_ids": input_ids, "labels": labels, **columns}, tokenizer=False)


def trained_on(train, extract=ROWS[16:20]):
    return lambda: {"train": train, "extract": extract}


MODELS = [
    ("layers not found", lambda: {"model": shortened()}, r"layers of LlamaForCausalLM not found.*ModuleList of 3.*'layers': 2"),
    ("logits of no head", lambda: {"model": with_logits_of_no_head()}, "of LlamaForCausalLM differ from its head applied"),
    ("weights with nan", lambda: {"model": with_nan()}, "are not finite: its weights contain nan or inf, or overflow in"),
    ("LoRA already", lambda: {"model": with_lora()}, "already has LoRA: pass a base model"),
    ("LoRA nowhere", settings(lora_targets=["query", "v_proj"]), r"\['query'\] occur .* Candidates: \['down_proj'"),
    ("parts without keys", settings(target_parts="model.layers"), "The parts 'model.layers' are not a mapping"),
    ("pairing too short", settings(pairing=[0, 1]), "lists 2 source layers"),
    ("pairing descending", settings(pairing=[2, 1, 0]), "ascending"),
    ("pairing too deep", settings(pairing=[0, 1, 9]), "between 0 and 4"),
    ("pairing of others", lambda: {"given": {"pairing": pair_layers(8, 3, "last")}}, "for 8 .* these models have 5 and 3"),
    *((f"shallow source, {name}", shallow(name), SHALLOW) for name in ("attribution", "banded", "uniform", "last")),
    ("fewer steps than stages", settings(max_steps=2), "2 optimizer steps for 3 stages.*The smallest budget is 3"),
    ("schedule without restart", settings(**PLATEAU), "cannot restart with each stage"),
]
TOKENIZERS = [
    ("no pad token in a config", lambda: {"model": target(pad_token_id=None)}, "no pad token"),
    ("no pad token", lambda: {"given": {"processing_class": without_pad()}}, "The tokenizer has no pad token: set tokenizer.p"),
    ("none for text", trained_on(TEXTS), "pass its tokenizer as processing_class"),
    ("none for messages", rows({"messages": TURNS}), "has no chat template for messages: use prompt and completion"),
]
DATA = [
    ("no rows", trained_on([]), "The align split has no rows"),
    ("a stream", trained_on(row for row in ROWS), "is a generator: expected a Dataset or a list of rows. Rows are read more"),
    ("a dict of splits", trained_on({"train": ROWS}), r"align split is a dict: .* It has \['train'\]: pass a single row"),
    ("a strategy as pairing", lambda: {"given": {"pairing": "last"}}, "pairing is a str: .* goes into args.pairing"),
    ("a matrix as map", lambda: {"given": {"semantic_map": torch.eye(3)}}, "semantic_map is a Tensor: expected a SemanticMap"),
    ("a name as callback", lambda: {"given": {"callbacks": ["early"]}}, "callbacks is .*: expected a list of TrainerCallbacks"),
    (
        "a name as tokenizer",
        lambda: {"given": {"processing_class": "gpt2"}},
        "processing_class is a str: expected a transformers tokenizer",
    ),
    ("fp16 on a CPU", settings(fp16=True), "fp16 is for a GPU, and does nothing on a CPU"),
    ("a path", trained_on("rows.jsonl"), "align split is a str: expected a Dataset or a list of rows"),
    ("None", trained_on(None), "align split is a NoneType: expected a Dataset"),
    ("rows of text", trained_on(["hello"] * 8), r"align\[0\] is a str: expected a row, a dict of its columns"),
    (
        "an eval split of None",
        lambda: {"given": {"eval_dataset": {"a": ROWS[20:22], "b": None}}},
        r"eval_dataset has None for \['eval_b'\]",
    ),
    (
        "a metric of no evaluation",
        settings(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", metric_for_best_model="bleu"),
        "metric_for_best_model is 'bleu': expected one of loss, kl, relation",
    ),
    ("too few to hold out", trained_on(ROWS[:4], None), "4 training rows are too few .* pass extract_dataset"),
    ("one prompt to hold out", trained_on(ROWS[:1] * 16, None), "All 16 training rows share .* pass extract_dataset"),
    ("unknown columns", rows({"question": "a", "answer": "b"}), r"align\[8\] has the columns \['answer', 'question'\]"),
    ("prompt a number", rows({"prompt": 5, "completion": "w1"}), r"align\[8\] has {'prompt': 5, .*: expected text in prompt"),
    ("held out a number", rows({"prompt": 5, "completion": "w1"}, extract=None), r"align\[8\] has {'prompt': 5, .*: expected"),
    ("no completion", rows({"prompt": "w9", "completion": None}), r"align\[8\] has .*'completion': None}: expected text"),
    ("text after messages", rows({"prompt": TURNS[:1], "completion": "w1"}), r"align\[8\] has .* or lists of messages with"),
    ("messages of text", rows({"messages": "hello"}), r"align\[8\] has {'messages': 'hello'}: expected .* lists of messages"),
    ("messages without content", rows({"messages": [{"role": "user"}]}), r"align\[8\] has .* with role and content"),
    ("ids that are fractions", ids([5.5, 6], [IGNORED, 6]), r"align\[8\] has input_ids or labels that are not a list of"),
    ("ids below zero", ids([5, -6], [IGNORED, 6]), r"align\[8\] has the token id -6: expected ids from 0 up"),
    ("labels below zero", ids([5, 6], [-1, 6]), r"align\[8\] has the token id -1: .* and -100 for ignored labels"),
    ("labels too few", ids([5, 6, 7], [IGNORED, 6]), r"align\[8\] has 3 input_ids but 2 labels; expected equal lengths"),
    ("mask too short", ids([5, 6, 7], [5, 6, 7], attention_mask=[1]), "3 labels and an attention_mask of 1"),
    ("ids of no token", ids([5, 200], [IGNORED, 6]), "Token id 200 in the align split: the source has embeddings for 97"),
    ("labels of no token", ids([5, 6], [IGNORED, 200]), "Token id 200 in the align split"),
    ("no answer", ids([5, 6, 7], [IGNORED] * 3), r"No valid positions in 1 of 9 rows of the align split \(rows \[8\]\)"),
    ("answers cut off", settings(max_length=4), r"raise max_length \(now 4\)"),
    ("extract overlaps", trained_on(ROWS[:16], ROWS[10:14]), r"(?s)Overlapping splits: 4 .*extract\[0\] = align\[10\]"),
    ("eval overlaps", lambda: {"given": {"eval_dataset": ROWS[10:14]}}, r"(?s)Overlapping splits: 4 .*align\[10\] = eval\[0\]"),
]


@table("make, message", [*MODELS, *TOKENIZERS, *DATA])
def test_models_tokenizers_and_data(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **make())


def test_shallow_source_under_proportional_pairing_works(tmp_path):
    assert build(tmp_path, source=tiny_llama(2, 24), settings={"pairing": "proportional"}).pairing.source_layers == (0, 0, 1)


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


def test_loaded_models_with_tokenizers_of_their_own_are_compared(tmp_path):
    folders = [save(tmp_path / "target", target(), WORDS), save(tmp_path / "source", tiny_llama(5, 24), WORDS[::-1])]
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in folders]
    with pytest.raises(ValueError, match="94 of them under different ids"):
        build(tmp_path, model=models[0], source=models[1], given={"processing_class": word_tokenizer(WORDS)})


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


ZERO = {"ACCELERATE_USE_FSDP": None, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ENGINES = [
    ("ZeRO-3", {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage 1 and 2, not 3: .*fsdp2.yaml .* zero2.yaml"),
    ("DeepSpeed alone", {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "with zero_stage 1 and 2, not 0"),
    ("offloaded states", {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device must"),
    ("another clipping", {**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping must be auto or 1.0"),
    ("DeepSpeed, uncounted", ZERO, {}, "DeepSpeed needs a distributed backend: .* ddp_backend gloo"),
    ("torch.compile", {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, {}, "asks for torch_compile .* after the frontier moves"),
    ("FSDP1", {"FSDP_VERSION": "1"}, {}, "FSDP1 is not supported: .* share one requires_grad, .* Set fsdp_version: 2"),
    ("FSDP by default", {"FSDP_VERSION": None}, {}, "FSDP1 is not supported"),
    ("sharded states", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type must be FULL_STATE_DICT"),
    ("no wrap policy", {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {}, "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
    ("weights at one rank", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading must be false"),
    ("unsharded after", {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward must be true"),
    ("checkpointed twice", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "set activation_checkpointing instead"),
    ("offloaded", {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params must be false"),
    ("ignored modules", {"FSDP_IGNORED_MODULES": ".*norm"}, {}, "fsdp_ignored_modules must not be set"),
    ("other parallelism", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config must not be set: .* untested"),
    ("online signals", {}, {"signals": "online"}, "signals 'online' would load the whole source in every process: use"),
    ("two faults", {"FSDP_OFFLOAD_PARAMS": "true"}, {"signals": "online"}, "fsdp_offload_params .*; signals 'online'"),
    ("FSDP on a CPU", {}, {}, "asks for FSDP, but accelerate does not use FSDP on CPUs or in a single process: use several"),
]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@table("variables, settings, message", ENGINES)
def test_engines_of_the_accelerate_config_that_are_not_supported(tmp_path, monkeypatch, variables, settings, message):
    args = SemAlignConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{**PAPER, **settings})
    for name, value in {**SHARDED, **variables}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        SemAlignTrainer(target(), tiny_llama(5, 24), args, ROWS)


def test_a_deepspeed_config_of_ones_own(tmp_path, monkeypatch):
    args = SemAlignConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with pytest.raises(ValueError, match=r"must not set an optimizer .*; gradient_clipping must be auto"):
        check_zero(args)


@table(
    "rows, processes, fits",
    [("even", 16, 8, True), ("uneven", 5, 3, True), ("too few", 2, 3, False), ("in twos", 16, 12, False)],
)
def test_lora_that_cannot_be_dealt_out(rows, processes, fits):
    layers = nn.ModuleList([nn.ModuleDict({"lora_A": nn.Linear(32, rows), "norm": nn.Linear(1, 1)})])
    with nullcontext() if fits else pytest.raises(ValueError, match=f"{rows} rows are too few for {processes} processes"):
        check_shards(layers, processes)


def test_layers_that_are_not_wrapped():
    with pytest.raises(ValueError, match=r"not wrapped the decoder layers \[0, 1, 2\]: .* their class \(LlamaDecoderLayer\)"):
        check_sharded(target().model.layers)


def test_plain_training_arguments():
    with pytest.raises(ValueError, match="expected a SemAlignConfig"):
        SemAlignTrainer(target(), tiny_llama(5, 24), object(), ROWS)


def test_map_of_other_models(tmp_path):
    other = build(tmp_path / "a", model=tiny_llama(3, 8, pad_token_id=0)).semantic_map
    with pytest.raises(ValueError, match=r"The map has the shape \(8, 24\); these models need \(16, 24\)"):
        build(tmp_path / "b", given={"semantic_map": other})


def test_budget_changed_after_the_stages_were_planned(tmp_path):
    trainer = build(tmp_path)
    trainer.args.max_steps = 6
    with pytest.raises(ValueError, match="The run has 6 steps, but its stages were planned for 3"):
        trainer.train()


def test_a_refused_budget_leaves_the_model_usable(tmp_path):
    model = target()
    with pytest.raises(ValueError, match="2 optimizer steps for 3 stages"):
        build(tmp_path, model=model, settings={"max_steps": 2})
    build(tmp_path, model=model).train()
    with pytest.raises(ValueError, match="already has LoRA"):
        build(tmp_path, model=model)


def test_nothing_was_trained_or_written_before_an_error(tmp_path):
    model = target()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="lists 1 source layers"):
        build(tmp_path, model=model, settings={"pairing": [0]})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "run" / "semantic_map.safetensors").exists()


STATES = torch.zeros(2, 5, 4)
VALID = torch.ones(2, 5, dtype=torch.bool)
HEAD = torch.randn(7, 4)


@table(
    "loss, message",
    [
        ("a mask of 0 and 1", lambda: steering_loss(STATES, STATES, VALID.long()), r"valid is torch.int64 .* mask.bool\(\)"),
        ("the same", lambda: fisher_loss(STATES, STATES, HEAD, VALID.float()), "valid is torch.float32"),
        (
            "a mask transposed",
            lambda: relation_loss(STATES, STATES, STATES, VALID.T),
            r"shape \(5, 2\): expected bool of .*\(2, 5\)",
        ),
        ("a mask cut", lambda: relation_loss(STATES, STATES, STATES, VALID[:, 1:]), r"of shape \(2, 4\)"),
        ("states of one channel", lambda: relation_loss(STATES, STATES, STATES[..., :1], VALID), r"supervision \(2, 5, 1\)"),
        ("one sequence", lambda: steering_loss(STATES[0], STATES[0], VALID[0]), r"expected \[B, T, D\] for all"),
        ("more of the source", lambda: output_kl(STATES[0], HEAD, torch.zeros(9, 4), HEAD), r"\(9, 4\) \(source states\)"),
        ("another vocabulary", lambda: output_kl(STATES[0], HEAD, STATES[0], HEAD[:5]), r"\(5, 4\) \(source head\): expected"),
        ("no data", lambda: output_kl(STATES[0], HEAD.to("meta"), STATES[0], HEAD), "no head on the meta device"),
        ("no position", lambda: output_kl(STATES[0, :0], HEAD, STATES[0, :0], HEAD), "N at least 1"),
        (
            "a head with nan",
            lambda: SemanticMap.from_heads(HEAD * torch.nan, HEAD),
            "The source head is .* finite real numbers",
        ),
        ("a head of zeros", lambda: SemanticMap.from_heads(HEAD, 0 * HEAD), r"The target head .* \(7, 4\): .* not all zero"),
        ("scores by layer", lambda: pair_layers({0: 1.0, 1: 2.0}, 1), "expected one score per source layer"),
        ("no source layer", lambda: pair_layers(0, 3, "proportional"), "scores is 0 and num_target_layers is 3: expected"),
        ("no target layer", lambda: pair_layers(5, 0, "last"), "num_target_layers is 0: expected"),
        ("fractions of layers", lambda: pair_layers(5, 2, [0.5, 3.7]), r"lists \[0.5, 3.7\]: expected whole numbers"),
        ("a pairing that descends", lambda: LayerPairing((2, 0), 3, "explicit"), "must be ascending"),
        ("a pairing of others", lambda: LayerPairing((1, 7), 3, "explicit"), "between 0 and 2"),
        ("stages of nan", lambda: FrontierSchedule(2, float("nan")), "expected whole numbers"),
    ],
)
def test_functions(loss, message):
    """What torch would broadcast, index by, or take for a number."""
    with pytest.raises(ValueError, match=message):
        loss()


@pytest.mark.parametrize("read", [LayerScores.from_json, LayerPairing.from_json, SemanticMap.load])
@table(
    "content, error, message",
    [
        ("none", None, FileNotFoundError, "There is no .*kept.json: check the name"),
        ("empty", "", ValueError, "kept.json is damaged.*: copy it again"),
        ("cut short", '{"values": [0.1', ValueError, "kept.json is damaged.*: copy it again"),
        ("a list", "[1]", ValueError, r"kept.json is (\[1\]: expected names and values|damaged)"),
        ("of nothing", "{}", ValueError, r"kept.json (lacks \['(values|source_layers)', |is damaged)"),
        ("no text", b"\xff\xfe", ValueError, "kept.json is damaged"),
    ],
)
def test_files_that_hold_something_else(tmp_path, read, content, error, message):
    if content is not None:
        (tmp_path / "kept.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SemAlignError, match=message) as found:
        read(tmp_path / "kept.json")
    assert isinstance(found.value, error)


@table(
    "read, change, message",
    [
        ("scores of words", LayerScores, {"values": ["a", "b"]}, r"values\[0\] of .* is 'a': expected a number"),
        ("scores without deviations", LayerScores, {"deviations": []}, "There are 2 scores and 0 deviations"),
        ("pairs of fractions", LayerPairing, {"source_layers": [0.5, 1]}, r"source_layers\[0\] of .* is 0.5: expected a whole"),
        ("too few scores", LayerPairing, {"scores": [1.0]}, "There are 1 scores for 2 source layers: expected one each"),
    ],
)
def test_files_with_values_of_another_kind(tmp_path, read, change, message):
    whole = {"values": [1.0, 2.0], "deviations": [0.1, 0.1], "num_examples": 3, "aggregate": "dot"}
    whole |= {"source_layers": [0, 1], "num_source_layers": 2, "strategy": "last", "of a later version": True}
    (tmp_path / "kept.json").write_text(json.dumps(whole))
    read.from_json(tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(InputError, match=message):
        read.from_json(tmp_path / "kept.json")


BATCH = batches_of(ROWS[:2], 2)[0]
SMALL = tiny_llama(2, 16)


@pytest.mark.parametrize("use", [attribute_layers, recomposition_cosines, answer_loss], ids=lambda use: use.__name__)
@table(
    "batches, message",
    [
        (
            "no labels",
            [{name: BATCH[name] for name in ("input_ids", "attention_mask")}],
            "A batch has .*'labels': None}: expected",
        ),
        (
            "lists",
            [{name: tensor.tolist() for name, tensor in BATCH.items()}],
            "A batch has .*: expected input_ids, attention_m",
        ),
        (
            "a list of rows",
            [ROWS[:2]],
            "A batch has list: expected input_ids, attention_mask, labels as integer tensors",
        ),
        ("ids of fractions", [{**BATCH, "input_ids": BATCH["input_ids"].float()}], "A batch has .*torch.float32"),
        ("one sequence", [{name: tensor[0] for name, tensor in BATCH.items()}], r"A batch has .*\[7\]"),
        ("labels cut", [{**BATCH, "labels": BATCH["labels"][:, 1:]}], r"A batch has .*\[2, 6\].*of one shape"),
        ("a token too many", [{**BATCH, "input_ids": BATCH["input_ids"] + 90}], "token id .*: the model has embeddings for 97"),
        ("no answers", [{**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)}], "[Nn]o valid positions in"),
        ("no batches", iter(()), "got no batches|no valid positions in the batches"),
    ],
)
def test_batches(use, batches, message):
    with pytest.raises(InputError, match=message):
        use(SMALL, batches)


def test_batches_that_are_gone_through_once(monkeypatch):
    monkeypatch.setattr(analysis, "MOMENTS", 1)  # a group for each source layer
    with pytest.raises(InputError, match="batches is an iterator, but the analysis iterates over it more than once"):
        layer_cka(SMALL, SMALL, iter([BATCH]), SemanticMap.from_models(SMALL, SMALL))
    with pytest.raises(InputError, match="batches is a dict: expected an iterable of batches"):
        attribute_layers(SMALL, BATCH)
    with pytest.raises(InputError, match="The model is a str: expected a transformers causal LM, or its name"):
        attribute_layers("gpt2", [BATCH])


@table(
    "name, message",
    [
        ("no embedded model", "embedded:other", "No embedded model 'embedded:other': use embedded:source or embedded:target"),
        ("no folder", Path("/nowhere"), "The model '/nowhere' cannot be read: give a Hub id, or a folder"),
        ("a number", 5, "The model is a int: expected a transformers causal LM, or its name"),
        ("another module", nn.Linear(2, 2), "The model is a Linear: expected a transformers causal LM"),
    ],
)
def test_names_that_are_no_models(tmp_path, name, message):
    for given in ({"model": name}, {"source": name}):
        with pytest.raises(InputError, match=message):
            build(tmp_path, **given)


def test_a_tokenizer_of_whole_words_meets_others(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "How many?", "answer": "#### 5"}')
    model = tiny_llama(2, 16, max_position_embeddings=2048)
    with pytest.raises(InputError, match=r"does not know a word of the text and has no token for unknown words \(.*UNK"):
        run_benchmark(model, word_tokenizer([*WORDS[1:], "a"]), "gsm8k", files=tmp_path)


def test_rows_for_evaluation_with_an_example_id_of_their_own_are_encoded_like_others(tmp_path):
    """Padding included, which an ``attention_mask`` marks."""
    trainer = build(tmp_path, settings={"signals": "online"})
    padded = [{**row, "input_ids": [*row["input_ids"], 0], "labels": [*row["labels"], 0]} for row in ROWS[20:24]]
    rows = [{**row, "attention_mask": [*[1] * (len(row["input_ids"]) - 1), 0]} for row in padded]
    plain, own = trainer.evaluate(rows), trainer.evaluate(Dataset.from_list([{**row, "example_id": 5} for row in rows]))
    assert plain["eval_loss"] == own["eval_loss"] and plain["eval_kl"] == own["eval_kl"]
    assert trainer.evaluate(ROWS[20:24])["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="The eval split has no rows"):
        trainer.evaluate([])


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    """A finite gradient and a learning rate that no number stands: neither the end nor a checkpoint keeps what comes of it."""
    settings = {"frontier": "joint", "relation_weight": 0.1, "learning_rate": 1e38, "max_grad_norm": 0.0}
    with pytest.raises(FloatingPointError, match=r"not finite after step 1, .* the last checkpoint: none was written"):
        build(tmp_path, settings={**settings, "max_steps": 1}).train()
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        build(tmp_path, settings={**settings, "save_steps": 1, "max_steps": 3}).train()
    assert not list((tmp_path / "run").glob("checkpoint-*/adapter_model.safetensors"))
