"""Seeking against brute force, against what the models themselves say, and against peft's own conversion."""

import json

import pytest
import torch
from conftest import PAPER, batches_of, random_rows, tiny_llama
from families import build
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import adapter

from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.baselines.extraction import Needs, best_window, extract, low_rank, sensitivities
from hf_semalign.experiments.baselines.seeking import SeekingTrainer, extraction_cost, fold
from hf_semalign.hub.loading import load_transfer
from hf_semalign.method.pairing import pair_layers
from hf_semalign.models.anatomy import dissect

ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(30)], vocab=50)
TOKENS = torch.arange(3, 21).view(3, 6)
SETTINGS = {
    "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "lora_r": 4, "lora_alpha": 8, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "pairing": "last",
}  # fmt: skip
PAIRS = {
    "Llama": (lambda: build("Llama", 5, 24, intermediate_size=40, seed=2), lambda: build("Llama", seed=1)),
    "heads of the source written out": (
        lambda: build("Llama", 5, 32, intermediate_size=40, num_key_value_heads=1, seed=2),
        lambda: build("Llama", num_key_value_heads=4, seed=1),
    ),
    "a fused source without a gate": (lambda: build("GPTNeoX", 5, 32, seed=2), lambda: build("Qwen3", seed=1)),
    "matrices the other way round": (lambda: build("GPT2", 4, 24, seed=2), lambda: build("GPT2", seed=1)),
    "a fused target": (lambda: build("Llama", 4, 32, seed=2), lambda: build("Phi3", seed=1)),
}


def make(tmp_path, pair="Llama", source=None, target=None, **settings):
    folder = settings.pop("run", "run")
    args = SemAlignConfig(output_dir=str(tmp_path / folder), **{**PAPER, **SETTINGS, **SeekingTrainer.settings, **settings})
    models = (given or made() for given, made in zip((target, source), reversed(PAIRS[pair]), strict=True))
    trainer = SeekingTrainer(*models, args, ROWS[:18], eval_dataset=ROWS[18:24], extract_dataset=ROWS[24:])
    trainer.prepare()
    return trainer


def brute_sensitivity(model, rows):
    """``sum_j |theta * grad_j|`` of every parameter, by transformers' own loss."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches_of(rows, 1):
        model.zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        for name, p in model.named_parameters():
            total[name] += (p.detach() * p.grad).abs()
    model.zero_grad()
    return total


@pytest.mark.parametrize(("family", "path"), [("Llama", "mlp.up_proj"), ("GPT2", "mlp.c_fc")])
def test_sensitivities_are_those_of_each_example_by_itself(family, path):
    model = build(family)
    expected = brute_sensitivity(model, ROWS[:5])
    first = next(model.parameters()).requires_grad_(False)
    scores, kept = sensitivities(model.train(), batches_of(ROWS[:5], 1), [[path], [], [path]])
    for k in range(3):
        own = {name: s for name, s in expected.items() if f".{k}." in name}
        assert len(own) >= 9
        assert scores[k] == pytest.approx(sum(s.sum().item() for s in own.values()), rel=1e-5)
        if k != 1:
            (weight,) = (s for name, s in own.items() if name.endswith(f"{path}.weight"))
            torch.testing.assert_close(kept[k][path], weight.T if family == "GPT2" else weight)
    assert kept[1] == {}
    assert model.training
    assert not first.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(p.grad is None for p in model.parameters())


def test_sensitivities_of_half_precision_are_added_up_in_float32():
    model = build("Llama")
    exact, _ = sensitivities(model, batches_of(ROWS, 1), [["mlp.up_proj"]] * 3)
    rounded, sums = sensitivities(model.bfloat16(), batches_of(ROWS, 1), [["mlp.up_proj"]] * 3)
    assert sums[0]["mlp.up_proj"].dtype == torch.float32
    assert rounded == pytest.approx(exact, rel=0.05)
    assert (sums[0]["mlp.up_proj"] != sums[0]["mlp.up_proj"].bfloat16()).any()


@pytest.mark.parametrize(("batches", "message"), [(batches_of(ROWS, 2), "one example per batch"), ([], "split is empty")])
def test_sensitivities_need_one_example_at_a_time(batches, message):
    with pytest.raises(ValueError, match=message):
        sensitivities(build("Llama"), batches, [[]] * 3)


@pytest.mark.parametrize("shape", [(3, 4), (7, 9), (7, 2), (1, 1), (5, 9)])
@pytest.mark.parametrize("most", [2, 1000])
def test_the_best_window_is_that_of_brute_force(shape, most):
    """Whole numbers, so that ties are exact: with few of them the first of many equal windows is wanted."""
    values = torch.randint(0, most, (7, 9), generator=torch.Generator().manual_seed(most))
    places = [(i, j) for i in range(8 - shape[0]) for j in range(10 - shape[1])]
    sums = [values[i : i + shape[0], j : j + shape[1]].sum().item() for i, j in places]
    assert best_window(values.float(), shape) == places[sums.index(max(sums))]


def test_a_window_among_large_sums_is_found_in_float64():
    """In float32 the table's corners, of 1e9, would drown a window's lead of 10."""
    values = torch.full((300, 300), 1e4)
    values[200, 123] += 10
    assert best_window(values, (100, 100)) == (101, 24)  # the first that holds it


def test_low_rank_is_the_best_approximation():
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 4, 6):
        down, up = low_rank(matrix, rank)
        assert (down.shape, up.shape) == ((rank, 9), (6, rank))
        torch.testing.assert_close(down @ down.T, torch.eye(rank))
        torch.testing.assert_close((matrix - up @ down).square().sum(), values[rank:].square().sum(), atol=1e-5, rtol=1e-5)
    down, up = low_rank(matrix, 8)
    torch.testing.assert_close(up @ down, matrix)
    assert not down[6:].any()
    assert not up[:, 6:].any()


def test_folding_is_the_difference():
    down, first_down = torch.randn(2, 3, 5)
    up, first_up = torch.randn(2, 4, 3)
    wide, tall = fold(down, up, first_down, first_up)
    torch.testing.assert_close(tall @ wide, up @ down - first_up @ first_down)


def test_what_is_extracted_are_windows_of_the_most_sensitive_layers():
    """NeoX to Qwen3, at full rank: each start is a piece of the source where sensitivity is highest, heads unpicked by hand."""
    source, target = (make() for make in PAIRS["a fused source without a gate"])
    found = extract(source, batches_of(ROWS[24:], 1), Needs.of(dissect(source), dissect(target)), 24)
    expected = brute_sensitivity(source, ROWS[24:])
    scores = [sum(s.sum().item() for name, s in expected.items() if f".layers.{k}." in name) for k in range(5)]
    assert found.scores == pytest.approx(scores, rel=1e-4)
    assert found.source_layers == list(pair_layers(scores, 3).source_layers) == sorted(found.source_layers)
    assert found.examples == 6
    names = {
        "self_attn.v_proj": ("value", "attention.query_key_value"),
        "self_attn.o_proj": ("output", "attention.dense"),
        "mlp.up_proj": ("up", "mlp.dense_h_to_4h"),
        "mlp.down_proj": ("down", "mlp.dense_4h_to_h"),
    }
    for k, (layer, windows) in enumerate(zip(found.source_layers, found.windows, strict=True)):
        assert windows.keys() == names.keys() == found.factors[k].keys()
        for path, (role, supplier) in names.items():
            name = f"gpt_neox.layers.{layer}.{supplier}.weight"
            weight, sensitivity = source.get_parameter(name), expected[name]
            if role == "value":  # rows by head, then query, key, value
                weight, sensitivity = (one.view(4, 3, 8, 32)[:, 2].reshape(32, 32) for one in (weight, sensitivity))
            height, width = dissect(target).layers[k].get_submodule(path).weight.shape
            row, column = best_window(sensitivity, (height, width))
            assert windows[path] == {role: [supplier, row, column]}
            down, up = found.factors[k][path]
            torch.testing.assert_close(up @ down, weight[row : row + height, column : column + width], atol=1e-5, rtol=1e-4)


def test_a_fused_target_is_put_together_from_windows_of_its_parts():
    source, target = (make() for make in PAIRS["a fused target"])
    found = extract(source, batches_of(ROWS[24:], 1), Needs.of(dissect(source), dissect(target), ["qkv_proj", "o_proj"]), 32)
    windows, (down, up) = found.windows[0]["self_attn.qkv_proj"], found.factors[0]["self_attn.qkv_proj"]
    layer = source.model.layers[found.source_layers[0]].self_attn
    pieces = []
    for role, size in (("query", 16), ("key", 8), ("value", 8)):
        path, row, column = windows[role]
        assert path == f"self_attn.{role[0]}_proj"
        pieces.append(getattr(layer, f"{role[0]}_proj").weight[row : row + size, column : column + 16])
    torch.testing.assert_close(up @ down, torch.cat(pieces), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_start_is_the_target_and_the_published_adapter_the_trained_model(tmp_path, pair):
    """The function at step 0; then the merged weights on the target as it was, with nothing but peft."""
    untouched, fresh = PAIRS[pair][1](), PAIRS[pair][1]()
    trainer = make(tmp_path, pair)
    assert all(p.abs().sum() > 0 for layer in trainer.lora_layers for p in layer)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(TOKENS).logits, untouched(TOKENS).logits, atol=1e-4, rtol=1e-4)
    start = adapter(trainer)
    trainer.train()
    trainer.save_model()
    assert (adapter(trainer) - start).abs().max() > 1e-3
    published = PeftModel.from_pretrained(fresh, tmp_path / "run")
    config = published.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 16)
    assert (trainer.model.peft_config["default"].r, trainer.model.peft_config["default"].lora_alpha) == (4, 8)
    theirs = published.merge_and_unload().state_dict()
    ours = trainer.model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, weight in untouched.state_dict().items():
        assert (ours[name] - theirs[name]).abs().max() < 1e-6, name
        changed += (ours[name] - weight).abs().max() > 1e-3
    assert changed == sum(len(layer) for layer in trainer.extraction.factors)


def test_folding_is_that_of_peft(tmp_path):
    """Its conversion of adapters that began with a changed base, given the start as an adapter of its own."""
    trainer = make(tmp_path)
    trainer.save_model(str(tmp_path / "before"), _internal_call=True)
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "before")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("run", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("run", "theirs")]
    assert [[config[name] for name in ("r", "lora_alpha")] for config in configs] == [[8, 16]] * 2


def test_a_run_that_is_resumed_in_its_middle_is_the_same_and_never_loads_the_source(tmp_path, monkeypatch):
    for name, made in zip(("source", "target"), PAIRS["Llama"], strict=True):
        made().save_pretrained(tmp_path / name)
    places = {name: str(tmp_path / name) for name in ("source", "target")}
    shared = {"signals_dir": str(tmp_path / "signals"), "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, **places, **shared, run="whole")
    whole.train()
    monkeypatch.setattr(Source, "_need_weights", lambda self: pytest.fail("the source was loaded"))
    with pytest.raises(ValueError, match="is a checkpoint of Seeking, which only its run can use"):
        load_transfer(tmp_path / "whole/checkpoint-4")
    saved = load_file(tmp_path / "whole/checkpoint-4/adapter_model.safetensors")
    assert {len(matrix) for name, matrix in saved.items() if "lora_A" in name} == {4}  # and not 8, as it is published
    (said,) = (tmp_path / "signals").glob("source-*")  # which stands for the source where its weights are not
    again = make(tmp_path, source=str(said), target=places["target"], **shared, run="again")
    assert again.extraction.source_layers == whole.extraction.source_layers
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    mine, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert mine.keys() == theirs.keys()
    assert whole.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]


def test_a_checkpoint_of_another_start_is_refused(tmp_path):
    shared = {"save_strategy": "steps", "save_steps": 3}
    make(tmp_path, **shared, signals_dir=str(tmp_path / "signals")).train()
    (kept,) = (tmp_path / "signals").rglob("seeking-*.safetensors")
    other = make(tmp_path, **shared)
    other.extraction.factors[0]["mlp.up_proj"][0][0, 0] += 1
    with pytest.raises(ValueError, match="was made with other start of the adapter"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert kept.is_file()


def test_what_was_extracted_is_kept_and_made_again_where_it_is_damaged(tmp_path, caplog):
    shared = {"signals_dir": str(tmp_path / "signals")}
    first = make(tmp_path, **shared).extraction
    (kept,) = (tmp_path / "signals").rglob("seeking-*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-3] ^= 8
    kept.write_bytes(content)
    again = make(tmp_path, **shared).extraction
    assert f"{kept.name} is damaged" in caplog.text
    assert all(
        torch.equal(mine, theirs)
        for before, after in zip(first.factors, again.factors, strict=True)
        for path in before
        for mine, theirs in zip(before[path], after[path], strict=True)
    )
    make(tmp_path, **shared, lora_r=2)
    assert len(list((tmp_path / "signals").rglob("seeking-*.safetensors"))) == 2


def test_online_nothing_is_kept(tmp_path):
    trainer = make(tmp_path, signals="online")
    trainer.train()
    assert not list(tmp_path.rglob("seeking-*"))
    assert trainer.evaluate()["eval_loss"] > 0


def test_what_the_record_says(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    record = load_transfer(tmp_path / "run", target=save(PAIRS["Llama"][1](), tmp_path / "target"))[1]
    sums = {name: record[name] for name in ("adapter_checksum", "adapter_sha256")}
    assert record == json.loads(json.dumps(trainer.record())) | sums
    assert record["method"] == "seeking"
    facts = record["seeking"]
    assert len(facts["scores"]) == 5
    assert len(facts["source_layers"]) == len(facts["windows"]) == 3
    assert facts["windows"][0]["mlp.up_proj"]["up"][0] == "mlp.up_proj"
    assert (facts["extract"], facts["source_passes"]) == (6, {"forward": 6, "backward": 6})
    assert facts["adapter_rank"] == 8
    assert facts["base_rounding"] < 1e-6


def test_what_it_costs_beside_fine_tuning(tmp_path):
    """By hand: tokens of the extract split times the source's layers, valid positions times its head, and thrice that."""
    trainer = make(tmp_path)
    source, rows = PAIRS["Llama"][0](), ROWS[24:]
    layers = sum(p.numel() for p in source.model.layers.parameters())
    tokens, valid = (sum(keep(token) for row in rows for token in row["labels"]) for keep in (lambda _: 1, lambda t: t >= 0))
    cost = extraction_cost(trainer.known, trainer.args)
    assert cost == {"sensitivities": pytest.approx(3 * (tokens * layers + valid * 50 * 24))}


def save(model, folder):
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


def test_in_bfloat16_the_base_is_rounded_and_the_record_says_so(tmp_path):
    source, target = (made().bfloat16() for made in PAIRS["Llama"])
    trainer = make(tmp_path, source=source, target=target, bf16=True)
    assert 1e-4 < trainer.record()["seeking"]["base_rounding"] < 2**-6
    with torch.no_grad():
        logits = trainer.model.eval()(TOKENS).logits.float(), PAIRS["Llama"][1]().bfloat16()(TOKENS).logits.float()
    assert ((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.05


def test_without_an_extract_split_rows_of_the_align_split_are_taken(tmp_path):
    args = SemAlignConfig(output_dir=str(tmp_path), **{**PAPER, **SETTINGS, **SeekingTrainer.settings})
    trainer = SeekingTrainer(*(made() for made in reversed(PAIRS["Llama"])), args, ROWS[:20])
    trainer.prepare()
    assert trainer.extraction.examples == 4
    assert len(trainer.train_dataset) == 16


@pytest.mark.parametrize(
    ("source", "target", "settings", "message"),
    [
        (lambda: tiny_llama(3, 24), lambda: tiny_llama(4, 16), {}, "The source has 3 layers and the target 4"),
        (
            lambda: tiny_llama(5, 24, intermediate_size=30),
            lambda: tiny_llama(3, 16),
            {},
            r"mlp.up_proj of the target LlamaForCausalLM needs a projection with the role up and the shape \(32, 16\) or "
            r"larger in the source LlamaForCausalLM, but its layer 0 has .*up mlp.up_proj \(30, 24\)",
        ),
        (
            lambda: build("GPTNeoX", 4, 32),
            lambda: tiny_llama(3, 16, vocab=50),
            {"lora_targets": ["gate_proj"]},
            r"needs a projection with the role gate and the shape \(32, 16\) or larger in the source GPTNeoXForCausalLM",
        ),
        (lambda: tiny_llama(5, 24, vocab=50), lambda: build("Bloom"), {}, r"\['self_attention.query_key_value'\].* is unknown"),
        (lambda: tiny_llama(5, 24), lambda: tiny_llama(3, 16), {"source_memory": "stream"}, "source_memory must be 'resident'"),
    ],
)
def test_what_cannot_be_supplied_is_refused_before_any_work(tmp_path, monkeypatch, source, target, settings, message):
    given = {"source": save(source(), tmp_path / "source"), "target": save(target(), tmp_path / "target")}
    monkeypatch.setattr("hf_semalign.models.loading.load_weights", lambda *args, **kw: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given, **settings)


@pytest.mark.parametrize("which", ["source", "target"])
def test_quantised_models_are_refused(tmp_path, which):
    models = {"source": PAIRS["Llama"][0](), "target": PAIRS["Llama"][1]()}
    models[which].config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="is quantised: Seeking needs a source and a target that are not quantised"):
        make(tmp_path, **models)


def test_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("hf_semalign.training.preparation.check_engine", lambda args: None)  # which refuses FSDP on CPUs
    with pytest.raises(ValueError, match="untested under FSDP"):
        make(tmp_path)
