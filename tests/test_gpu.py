"""On an NVIDIA GPU: what CPUs learn, cached and online alike, with every engine and every method; skipped without one."""

import gc
import json
from functools import partial

import pytest
import test_architectures
import test_laten
import test_prefix
import test_seeking
import test_trainer
import torch
from conftest import tiny_llama
from families import FAMILIES, build
from peft import PeftModel
from ranks import ROWS
from test_engines import RECIPE, SETTINGS, accelerate, distance, run, same_adapters
from test_trainer import EVEN, adapter, make_trainer
from transformers import AutoModelForCausalLM

from hf_semalign.cli import main
from hf_semalign.experiments.baselines.kd import KDTrainer
from hf_semalign.method.attribution import attribute_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.hooks import without_cudnn_attention
from hf_semalign.splits import Collator, encode

pytestmark = pytest.mark.skipif(torch.cuda.device_count() != 1, reason="wants one NVIDIA GPU, see CUDA_VISIBLE_DEVICES")
GPU = {"use_cpu": False}
ON_GPU = ["training.use_cpu=false"]


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
def test_a_gpu_learns_what_a_cpu_learns(tmp_path, frontier):
    """Attribution, map, signals, prefix and all stages."""
    runs = []
    for name, settings in (("cpu", {}), ("gpu", GPU)):
        runs.append(make_trainer(tmp_path / name, frontier=frontier, max_steps=18, **settings))
        runs[-1].train()
    cpu, gpu = runs
    assert next(gpu.model.parameters()).is_cuda
    assert cpu.pairing.source_layers == gpu.pairing.source_layers
    assert distance(adapter(cpu), adapter(gpu).cpu()) < 1e-3
    assert gpu.evaluate()["eval_kl"] == pytest.approx(cpu.evaluate()["eval_kl"], rel=1e-3)


@pytest.mark.parametrize("frontier", ["single", "cumulative", "joint"])
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_cached_is_online(tmp_path, frontier, memory):
    """Also of a source that comes from the disk a layer at a time."""
    common = {**GPU, **EVEN, "frontier": frontier, "max_steps": 18}
    cached = make_trainer(tmp_path / "cached", source_memory=memory, **common)
    online = make_trainer(tmp_path / "online", signals="online", **common)
    for trainer in (cached, online):
        trainer.train()
    assert distance(adapter(online), adapter(cached)) < 1e-5


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_differs_from_online_by_less_than_two_online_runs_do(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(test_trainer, "tiny_llama", partial(tiny_llama, dtype=weights))
    between, spread = test_prefix.bf16_distances(tmp_path, **GPU)
    assert between < spread


@pytest.mark.parametrize("stop", [3, 7, 12])
def test_resuming_equals_an_undisturbed_run(tmp_path, stop):
    settings = {**test_prefix.SETTINGS, **GPU, "save_strategy": "steps", "save_steps": stop}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert distance(adapter(whole), adapter(resumed)) < 1e-6


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = (
        make_trainer(tmp_path / str(on), activation_checkpointing=on, max_steps=12, **GPU) for on in (False, True)
    )
    plain.train()
    checkpointed.train()
    assert distance(adapter(plain), adapter(checkpointed)) < 1e-6


def test_the_source_leaves_the_gpu_before_training(tmp_path):
    """Its 50 MB are not there any more when the first step begins."""
    source = tiny_llama(12, 256, heads=4, intermediate_size=1024, vocab=97, seed=2, pad_token_id=0)
    size = sum(p.numel() * p.element_size() for p in source.parameters())
    assert size > 40e6
    source.save_pretrained(tmp_path / "source")
    del source
    other = make_trainer(tmp_path / "other", **GPU)
    other.train()  # after which there is all that the libraries keep for themselves
    args = other.args
    del other
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer = test_trainer.SemAlignTrainer(
        tiny_llama(3, 16, seed=1, pad_token_id=0), str(tmp_path / "source"), args, ROWS[:16], extract_dataset=ROWS[16:20]
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert torch.cuda.max_memory_allocated() - before < size / 4


def test_scores_and_map_are_those_of_a_cpu():
    source, target = tiny_llama(5, 24, seed=2), tiny_llama(3, 16, seed=1)
    rows = encode(ROWS[:8], None, split="extract")
    batches = [Collator(0)([row]) for row in rows]
    scores, matrix = attribute_layers(source, batches), SemanticMap.from_models(source, target).matrix
    gpu_scores = attribute_layers(source.cuda(), batches)
    gpu_matrix = SemanticMap.from_models(source, target.cuda()).matrix
    # Nothing is left of the last score but rounding: the norm above it lets no gradient along the state through.
    assert gpu_scores.values == pytest.approx(scores.values, rel=1e-4, abs=1e-6)
    assert gpu_matrix.is_cuda
    torch.testing.assert_close(gpu_matrix.cpu(), matrix, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(tmp_path, family):
    """Through all stages, cached with a prefix, with the adapter of online training."""
    made = {"layers": test_architectures.LAYERS + 1, "width": 32, "seed": 1}, {"layers": test_architectures.LAYERS, "width": 16}
    runs = []
    for signals in ("cached", "online"):
        source, target = (build(family, **sizes) for sizes in made)
        trainer, moved = test_architectures.train(tmp_path / signals, source, target, signals=signals, **GPU)
        assert moved.layers == [{stage} for stage in range(test_architectures.LAYERS) for _ in range(6)]
        assert moved.with_prefix is (signals == "cached")
        runs.append(test_architectures.adapter(trainer))
    assert distance(runs[1], runs[0]) < 1e-4


def test_distillation(tmp_path):
    source, target = tiny_llama(5, 24, seed=2, pad_token_id=0), tiny_llama(3, 16, seed=1, pad_token_id=0)
    settings = {**test_seeking.SETTINGS, **KDTrainer.settings, **GPU, "max_steps": 12}
    args = test_trainer.SemAlignConfig(output_dir=str(tmp_path), **settings)
    trainer = KDTrainer(target, source, args, ROWS[:16], eval_dataset=ROWS[16:24], extract_dataset=ROWS[24:28])
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before


@pytest.mark.parametrize("pair", ["Llama", "a fused target", "matrices the other way round"])
def test_seeking_learns_what_it_learns_on_a_cpu(tmp_path, pair):
    runs = []
    for name, settings in (("cpu", {}), ("gpu", GPU)):
        runs.append(test_seeking.make(tmp_path / name, pair, **settings))
        runs[-1].train()
    batch = runs[0].data_collator(runs[0].train_dataset.select(range(4)))
    with torch.no_grad():
        logits = [
            run.model.eval()(input_ids=batch["input_ids"].to(run.args.device), attention_mask=None).logits.cpu() for run in runs
        ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_laten_learns_what_it_learns_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(test_laten.laten, "LEARNING_RATES", (3e-3, 1e-2))
    runs = []
    for name, settings in (("cpu", {}), ("gpu", GPU)):
        runs.append(test_laten.make(tmp_path / name, **settings))
        runs[-1].train()
        runs[-1].save_model(tmp_path / name / "saved")
    loaded = [
        PeftModel.from_pretrained(tiny_llama(3, 24, seed=1, pad_token_id=0), tmp_path / name / "saved").eval()
        for name in ("cpu", "gpu")
    ]
    ids = torch.tensor([test_laten.ROWS[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(*(model(input_ids=ids).logits for model in loaded), rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """The run folder of a recipe in one process."""
    folder = tmp_path_factory.mktemp("recipe")
    assert main(["train", *RECIPE, *SETTINGS, *ON_GPU, f"output_dir={folder}"]) == 0
    return folder


def test_a_recipe_runs_and_its_adapter_loads_anywhere(on_gpu):
    results = json.loads((on_gpu / "results.json").read_text())
    assert results["machine"]["device"] == torch.cuda.get_device_name()
    target = AutoModelForCausalLM.from_pretrained("hf_semalign/data/pair/target")
    model = PeftModel.from_pretrained(target, on_gpu)
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("name", ["vectors", "cka", "pairing"])
def test_analyses(on_gpu, name, tmp_path):
    changes = [] if name == "pairing" else ["data.eval=16", *ON_GPU]  # the pairing is in the run's record
    assert main(["analyze", name, str(on_gpu), "--output", str(tmp_path), *changes]) == 0
    assert (tmp_path / f"{name}.json").is_file()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_under_nccl(tmp_path, on_gpu, engine):
    """The engine's own path with its own collectives."""
    command = accelerate(engine, "--num_processes", "1", folder=tmp_path)
    run([*command, *ON_GPU, "training.per_device_train_batch_size=32"])
    same_adapters(on_gpu, tmp_path)


def test_attention_has_finite_gradients_at_lengths_where_those_of_cudnn_are_not():
    """The case of https://github.com/pytorch/pytorch/issues/196678: 704 tokens, a mask, and queries that like no key."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 704, 64, device="cuda", dtype=torch.bfloat16)
    query, key = 0.1 * query, 0.1 * key
    query[..., 0], key[..., 0] = 1.0, -960.0
    mask = torch.ones(704, 704, dtype=torch.bool, device="cuda").tril()[None, None]
    query.requires_grad_()
    with without_cudnn_attention():
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert query.grad.isfinite().all()
