"""LaTen: neuron scores against brute force, Delta against weights that are changed by hand, and what a run leaves."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PAPER, batches_of, random_rows, table, tiny_llama, word_tokenizer
from families import build
from peft import PeftModel
from torch.func import functional_call

from hf_semalign.config import SemAlignConfig
from hf_semalign.experiments.baselines import laten
from hf_semalign.experiments.baselines.carrier import NEURON_ROLES, Hypernetworks
from hf_semalign.experiments.baselines.laten import Draw, LaTenTrainer, one_cycle, transfer_cost
from hf_semalign.experiments.baselines.neurons import (
    Located,
    Unembedding,
    addition_scores,
    answer_label,
    check_neurons,
    locate,
    neuron_parts,
    neuron_scores,
    trace,
)
from hf_semalign.experiments.evaluation import answer_loss
from hf_semalign.hub.loading import load_transfer
from hf_semalign.models.anatomy import Size, base_model, dissect
from hf_semalign.tokenization import IGNORED

ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(60)])
IDS, LABEL = torch.tensor([5, 17, 3, 40, 8, 22]), 11
SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 5, "per_device_eval_batch_size": 8, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
}  # fmt: skip
GQA = {"num_key_value_heads": 2}


def make(folder, source=None, target=None, *, train=ROWS[:30], extract=ROWS[30:34], evaluation=ROWS[34:44], **settings):
    args = SemAlignConfig(output_dir=str(folder), **{**PAPER, **SETTINGS, **LaTenTrainer.settings, **settings})
    source = source or tiny_llama(5, 32, seed=2, pad_token_id=0)
    target = target or tiny_llama(3, 24, seed=1, pad_token_id=0)
    return LaTenTrainer(target, source, args, train, eval_dataset=evaluation, extract_dataset=extract)


@pytest.fixture
def lively(monkeypatch):
    """Learning rates at which a width of 32 moves as the published ones move a width of thousands."""
    monkeypatch.setattr(laten, "LEARNING_RATES", (3e-3, 1e-2))


# Scores by brute force: the whole model once with its attention maps, then every neuron's logits on their own, in float64.


def reference(model):
    """Log-probability gains by layer: of attention, of the FFN, of each attention neuron, of each FFN neuron."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(IDS[None], output_hidden_states=True, output_attentions=True)
        compute = neox_layer if model.config.model_type == "gpt_neox" else llama_layer
        layers = [
            compute(layer, model.config, h[0], maps[0, :, -1])
            for layer, h, maps in zip(dissect(model).layers, out.hidden_states, out.attentions, strict=False)
        ]
        entering, attention, ffn = layers[-1][:3]
        read = readout(model, entering + attention + ffn)
        torch.testing.assert_close(read(entering + attention + ffn), out.logits[0, -1])
        gains = []
        for entering, attention, ffn, heads, neurons in layers:
            middle = entering + attention
            gains.append(
                [
                    gain(read, entering, attention),
                    gain(read, middle, ffn),
                    [gain(read, entering, value) for value in heads],
                    [gain(read, middle, value) for value in neurons],
                ]
            )
    return (
        [torch.tensor(column, dtype=torch.float64) for column in zip(*gains, strict=True)],
        math.log(torch.softmax(out.logits[0, -1], 0)[LABEL]),
        read(layers[0][0]),
    )


def gain(read, before, added):
    after, was = torch.softmax(read(before + added), 0)[LABEL], torch.softmax(read(before), 0)[LABEL]
    return (after.log() - was.log()).item()


def readout(model, final):
    """Logits of any state with the final norm's scale fixed at ``final``."""
    decoder, head = dissect(model).decoder, model.get_output_embeddings().weight
    if model.config.model_type == "gpt_neox":
        norm = decoder.final_layer_norm
        scale = (final.var(unbiased=False) + norm.eps) ** -0.5
        return lambda v: head @ ((v - v.mean()) * scale * norm.weight + norm.bias)
    scale = ((final * final).mean() + decoder.norm.variance_epsilon) ** -0.5
    return lambda v: head @ (decoder.norm.weight * v * scale)


def llama_layer(layer, config, states, alpha):
    """At the last position: input, attention, FFN, and the vectors that single neurons add."""
    attention, mlp = layer.self_attn, layer.mlp
    size, group = attention.head_dim, config.num_attention_heads // config.num_key_value_heads
    values = attention.v_proj(layer.input_layernorm(states))
    heads = []
    for h in range(config.num_attention_heads):
        for e in range(size):
            coefficient = sum(alpha[h, p] * values[p, h // group * size + e] for p in range(len(states)))
            heads.append(coefficient * attention.o_proj.weight[:, h * size + e])
    added = sum(heads)
    inner = layer.post_attention_layernorm(states[-1] + added)
    m = F.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner)
    neurons = [m[j] * mlp.down_proj.weight[:, j] for j in range(len(m))]
    return states[-1], added, sum(neurons), heads, neurons


def neox_layer(layer, config, states, alpha):
    """The same with fused query, key and value, biases, no gate, and attention and FFN side by side."""
    attention, mlp = layer.attention, layer.mlp
    size = config.hidden_size // config.num_attention_heads
    fused = attention.query_key_value(layer.input_layernorm(states)).view(len(states), -1, 3, size)
    heads = []
    for h in range(config.num_attention_heads):
        for e in range(size):
            coefficient = sum(alpha[h, p] * fused[p, h, 2, e] for p in range(len(states)))
            heads.append(coefficient * attention.dense.weight[:, h * size + e])
    m = F.gelu(mlp.dense_h_to_4h(layer.post_attention_layernorm(states[-1])))
    neurons = [m[j] * mlp.dense_4h_to_h.weight[:, j] for j in range(len(m))]
    return states[-1], sum(heads) + attention.dense.bias, sum(neurons) + mlp.dense_4h_to_h.bias, heads, neurons


def lifelike(model):
    """A model whose norms and biases are not ones and zeros."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


KNOWN = ["Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX"]


@pytest.mark.parametrize("family", KNOWN)
def test_scores_are_those_of_brute_force(family):
    """Layers and single neurons, of grouped queries, biases, norms on queries, a fused and a parallel family."""
    model = lifelike(build(family, layers=2, width=16))
    (attention, ffn, heads, neurons), log_probability, entering = reference(model)
    found, (_, parts), unembedding = trace(model, IDS[None]), neuron_parts(dissect(model)), Unembedding(model)
    read = unembedding.at(found.leaving[-1, 0])
    before, middle = found.entering[:, 0], found.entering[:, 0] + found.attention[:, 0]
    close = {"rtol": 2e-4, "atol": 2e-5, "check_dtype": False}
    with torch.no_grad():
        torch.testing.assert_close(addition_scores(read, before, found.attention[:, 0], LABEL), attention, **close)
        torch.testing.assert_close(addition_scores(read, middle, found.ffn[:, 0], LABEL), ffn, **close)
        for k, part in enumerate(parts):
            for chunk in (2**24, 130):  # all at once, and two at a time
                ours = neuron_scores(read, before[k], found.heads[k, 0], part.output.weight, LABEL, chunk)
                torch.testing.assert_close(ours, heads[k], **close)
                ours = neuron_scores(read, middle[k], found.activations[k, 0], part.down.weight, LABEL, chunk)
                torch.testing.assert_close(ours, neurons[k], **close)
    total = attention.sum() + ffn.sum()  # of all layers: from the embedding to the output, but for the norms in float32
    assert total.item() == pytest.approx(log_probability - torch.log_softmax(entering, 0)[LABEL].item(), abs=1e-6)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_the_best_layers_and_neurons_are_located(family):
    model = lifelike(build(family, layers=4, width=16))
    (attention, ffn, heads, neurons), *_ = reference(model)
    found = locate(model, Unembedding(model), IDS, LABEL, layers=2, attention=3, ffn=5)
    for layers, scores, ours, single, count in (
        (found.attention_layers, attention, found.attention, heads, 3),
        (found.ffn_layers, ffn, found.ffn, neurons, 5),
    ):
        assert set(layers) == set(scores.topk(2).indices.tolist())
        assert layers == sorted(layers)
        for k, indices in zip(layers, ours.tolist(), strict=True):
            assert indices == sorted(range(len(single[k])), key=lambda j, s=single[k]: -s[j])[:count]


def test_scores_hold_for_a_target_that_carries_lora(tmp_path):
    """Its LoRA is wrapped around the modules that are looked at."""
    trainer = make(tmp_path)
    bare = tiny_llama(3, 24, seed=1, pad_token_id=0)
    counts = {"layers": 3, "attention": 24, "ffn": 48}
    ours = locate(trainer.model.eval(), Unembedding(trainer.model), IDS, LABEL, **counts)
    theirs = locate(bare, Unembedding(bare), IDS, LABEL, **counts)
    assert torch.equal(ours.ffn, theirs.ffn)
    assert torch.equal(ours.attention, theirs.attention)


def test_what_an_attention_neuron_names():
    """Eight columns of output; four rows of value, each for two heads; of a fused module the last third of each head."""
    _, (llama, *_) = neuron_parts(dissect(tiny_llama(2, 8, heads=4, **GQA)))
    assert llama.value_rows.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert (llama.value.out_features, llama.output.in_features) == (4, 8)
    _, (neox, *_) = neuron_parts(dissect(build("GPTNeoX", layers=2, width=8)))
    assert neox.value_rows.tolist() == [4, 5, 10, 11, 16, 17, 22, 23]


@pytest.mark.parametrize("family", KNOWN)
def test_a_value_row_moves_the_neurons_that_name_it_and_no_other(family):
    model = build(family, layers=2, width=16)
    value_rows = neuron_parts(dissect(model))[1][0].value_rows
    before = trace(model, IDS[None]).heads[0, 0]
    for row in (value_rows[0].item(), value_rows[-1].item()):
        changed = copy.deepcopy(model)
        neuron_parts(dissect(changed))[1][0].value.weight.data[row].normal_()
        moved = (trace(changed, IDS[None]).heads[0, 0] - before).abs() > 1e-4
        assert moved.nonzero().flatten().tolist() == (value_rows == row).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "family, message",
    [
        ("Gemma", "the logits are not those of head and norm"),
        ("Gemma2", "its logits are capped"),
        ("Gemma3", "a layer does not add attention and FFN to its input"),
        ("Granite", "a layer does not add attention and FFN to its input"),
        ("Cohere", "the logits are not those of head and norm"),
        ("GPT2", "The neurons of GPT2LMHeadModel are unknown: expected one module per layer of each name in v_proj, o_proj"),
        ("Phi3", "The neurons of Phi3ForCausalLM are unknown"),
        ("Mixtral", "The neurons of MixtralForCausalLM are unknown"),
        ("Mamba", "The neurons of MambaForCausalLM are unknown"),
    ],
)
def test_other_families_are_refused(family, message):
    changes = {"residual_multiplier": 0.5} if family == "Granite" else {}
    with pytest.raises(ValueError, match=message):
        check_neurons(lifelike(build(family, **changes)))


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_families_pass_in_both_dtypes(family, dtype):
    check_neurons(lifelike(build(family)).to(dtype))


# What an example is located by


def test_the_label_is_the_last_token_that_says_something():
    tokenizer = word_tokenizer(["answer", "42", ".", ")", ".)", "4.", "}"])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}

    def position(*tokens, prompt=1):
        row = [ids[token] for token in tokens]
        return answer_label({"input_ids": row, "labels": [IGNORED] * prompt + row[prompt:]}, tokenizer, {ids["</s>"]})

    assert position("answer", "42", ".", ".)", "</s>") == 1
    assert position("answer", "42", "4.", ".") == 2  # not only punctuation
    assert position("answer", "42", "}", "</s>") == 2  # none that LaTen's code takes off
    assert position("answer", "answer", "42", ".", prompt=2) == 2
    with pytest.raises(ValueError, match=r"has only special tokens and punctuation.*remove this row"):
        position("answer", "42", ".", "</s>", prompt=2)
    row = [7, 8, 9, 2]
    assert answer_label({"input_ids": row, "labels": [IGNORED, 8, 9, 2]}, None, {2}) == 2


# Translation and injection


@pytest.mark.parametrize("steps", [20, 32, 200])
def test_the_learning_rate_is_torchs_one_cycle(steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=0.1, final_div_factor=1, anneal_strategy="cos"
    )
    for step in range(steps):
        assert one_cycle(step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_short_runs_have_a_learning_rate(steps):
    """torch's divides by zero at ten steps."""
    factors = [one_cycle(step, steps) for step in range(steps)]
    assert max(factors) == pytest.approx(1.0, abs=0.05)
    assert min(factors) >= 1 / 25 - 1e-12
    assert steps < 10 or factors[-1] == pytest.approx(1 / 25)


def test_hypernetworks_are_small_and_float32():
    torch.manual_seed(0)
    networks = Hypernetworks(64, 32)
    weights = torch.cat([p.detach().flatten() for p in networks.parameters()])
    assert [tuple(p.shape) for p in networks.networks["up"].parameters()] == [(64, 64), (32, 64)]
    assert len(weights) == 4 * (64 * 64 + 32 * 64)
    assert weights.dtype == torch.float32
    assert weights.std().item() == pytest.approx(1e-5, rel=0.02)  # and not its square
    x = torch.randn(3, 2, 64)
    first, _, second = networks.networks["value"]
    torch.testing.assert_close(networks({"value": x})["value"], (x @ first.weight.T).clamp_min(0) @ second.weight.T)


def changed_by_hand(model, located, deltas):
    """Weights of a bare target by name, with Delta added row by row and column by column."""
    names, layers = {id(p): name for name, p in model.named_parameters()}, dissect(model).layers
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    size = config.head_dim
    for place in range(len(layers)):
        mlp, attention = layers[located.ffn_layers[place]].mlp, layers[located.attention_layers[place]].self_attn
        for n, j in enumerate(located.ffn[place].tolist()):
            weights[names[id(mlp.up_proj.weight)]][j, :] += deltas["up"][place, n]
            weights[names[id(mlp.down_proj.weight)]][:, j] += deltas["down"][place, n]
        for n, index in enumerate(located.attention[place].tolist()):
            row = index // size // group * size + index % size
            weights[names[id(attention.v_proj.weight)]][row, :] += deltas["value"][place, n]
            weights[names[id(attention.o_proj.weight)]][:, index] += deltas["output"][place, n]
    return weights


def merged(adapted):
    return dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())


PAIRS = {
    "Llama": lambda: (tiny_llama(5, 32, seed=2, pad_token_id=0), tiny_llama(3, 24, seed=1, pad_token_id=0)),
    "grouped": lambda: (
        tiny_llama(5, 32, seed=2, pad_token_id=0, **GQA),
        tiny_llama(3, 40, seed=1, pad_token_id=0, num_key_value_heads=1),
    ),
    "GPT-NeoX to Qwen3": lambda: (
        build("GPTNeoX", layers=5, width=32, vocab=97),
        build("Qwen3", layers=3, width=24, vocab=97),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_saved_is_the_target_and_delta(pair, tmp_path, lively):
    source, target = PAIRS[pair]()
    untouched = copy.deepcopy(target)
    trainer = make(tmp_path, source, target)
    trainer.train()
    trainer.save_model()
    deltas, located = trainer.deltas, trainer.located[1]
    width, inner = target.config.hidden_size, target.config.intermediate_size
    source_width = source.config.hidden_size
    assert {role: tuple(delta.shape) for role, delta in deltas.items()} == {
        "up": (3, inner // 10, width), "down": (3, inner // 10, width),
        "value": (3, width // 10, width), "output": (3, width // 10, width),
    }  # fmt: skip
    assert all(delta.abs().max() > 1e-6 for delta in deltas.values())
    assert trainer.located[0].ffn.shape == located.ffn.shape
    assert source_width != width
    by_hand = changed_by_hand(untouched, located, deltas)
    loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    for name, weight in merged(loaded).items():
        torch.testing.assert_close(weight, by_hand[name], rtol=0, atol=1e-7)
    changed = {name for name, p in untouched.named_parameters() if not torch.equal(p, by_hand[name])}
    assert {name.split(".")[-2] for name in changed} == {"up_proj", "down_proj", "v_proj", "o_proj"}
    assert len(changed) == 4 * 3
    batch = batches_of(ROWS[:4], 4)[0]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = functional_call(untouched, by_hand, (), inputs).logits
        torch.testing.assert_close(loaded.eval()(**inputs).logits, theirs)
        assert not torch.allclose(untouched(**inputs).logits, theirs, atol=1e-5)
    for name, p in base_model(trainer.model).named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, untouched.get_parameter(name.replace(".base_layer", ""))), name


SHARING = torch.tensor([[0, 10, 3, 21]] * 3)  # heads of ten channels: two neurons have the row 0, one 3, one 1


def test_neurons_that_share_a_row_of_value_add_to_it_together(tmp_path):
    """One key-value head for four query heads."""
    _, target = PAIRS["grouped"]()
    untouched = copy.deepcopy(target)
    trainer = make(tmp_path, *PAIRS["grouped"]())
    located = Located([0, 1, 2], [0, 1, 2], SHARING, torch.tensor([[7, 3, 1, 0, 2, 4, 6, 9]] * 3))
    counts = {"up": 8, "down": 8, "value": 4, "output": 4}
    deltas = {role: torch.randn(3, count, 40) for role, count in counts.items()}
    laten.Carrier(trainer.model).write(located, deltas)
    by_hand = changed_by_hand(untouched, located, deltas)
    for name, weight in merged(trainer.model).items():
        torch.testing.assert_close(weight, by_hand[name], rtol=0, atol=1e-6)
    change = by_hand["model.layers.1.self_attn.v_proj.weight"] - untouched.model.layers[1].self_attn.v_proj.weight
    torch.testing.assert_close(change[0], deltas["value"][1, :2].sum(0))
    assert change.any(1).nonzero().flatten().tolist() == [0, 1, 3]
    laten.Carrier(trainer.model).clear()
    for name, weight in merged(trainer.model).items():
        assert torch.equal(weight, untouched.get_parameter(name))


def test_only_the_hypernetworks_learn_and_their_gradients_are_those_of_changed_weights(tmp_path):
    """Against autograd through a target whose weights are W + Delta, with the loss written out."""
    trainer = make(tmp_path, *PAIRS["grouped"]())
    model, source = trainer.model.eval(), trainer.source.model("cpu")
    examples = [trainer._extract[0]]
    ours, theirs = trainer._locate(source, examples)[0], trainer._locate(model, examples)[0]
    theirs = theirs._replace(attention=SHARING)
    knowledge = laten.knowledge_of(neuron_parts(dissect(source))[1], ours)
    torch.manual_seed(0)
    networks = Hypernetworks(32, 40)
    for p in networks.parameters():
        p.data.normal_(std=0.05)
    batch = [trainer.train_dataset[k] for k in range(8)]  # in two parts of five and three
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    carrier = laten.Carrier(model)
    loss = trainer._backward(carrier, theirs, networks(knowledge), batch)
    found = [p.grad.clone() for p in networks.parameters()]
    networks.zero_grad()

    bare = PAIRS["grouped"]()[1]
    deltas = networks(knowledge)
    weights = changed_by_hand_differentiably(bare, theirs, deltas)
    total = 0.0
    for row in batch:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = functional_call(bare, weights, (), {"input_ids": ids[None]}).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED)
    assert loss == pytest.approx(total.item() / 8, rel=1e-5)
    squares = sum(deltas[role].square().sum() / deltas[role].numel() for role in NEURON_ROLES)
    (total + 8 * 1000 * squares).backward()
    for gradient, p in zip(found, networks.parameters(), strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name])
            assert p.grad is None


def changed_by_hand_differentiably(model, located, deltas):
    names = {id(p): name for name, p in model.named_parameters()}
    weights = dict(model.named_parameters())
    size = model.config.head_dim
    for k, layer in enumerate(dissect(model).layers):
        for module, index, delta, by_columns in (
            (layer.mlp.up_proj, located.ffn[k], deltas["up"][k], False),
            (layer.mlp.down_proj, located.ffn[k], deltas["down"][k], True),
            (layer.self_attn.v_proj, located.attention[k] % size, deltas["value"][k], False),  # one key-value head
            (layer.self_attn.o_proj, located.attention[k], deltas["output"][k], True),
        ):
            name = names[id(module.weight)]
            full = module.weight.T if by_columns else module.weight
            full = full.index_add(0, index, delta)
            weights[name] = full.T if by_columns else full
    return weights


# Runs


def test_a_run_is_a_function_of_its_seed(tmp_path, lively):
    first = make(tmp_path / "a")
    first.train()
    kept = {role: delta.clone() for role, delta in first.deltas.items()}
    first.train()  # starts anew, on the target as it was
    second = make(tmp_path / "b")
    second.train()
    other = make(tmp_path / "c", seed=4)
    other.train()
    for role in NEURON_ROLES:
        assert torch.equal(kept[role], first.deltas[role])
        assert torch.equal(kept[role], second.deltas[role])
        assert not torch.equal(kept[role], other.deltas[role])


def test_the_learning_rate_is_chosen_on_align_rows_that_prealignment_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(laten, "LEARNING_RATES", (3e-3, 1.0))  # the second is no good
    trainer = make(tmp_path, evaluation=None)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    found = trainer.record()["laten"]
    losses = found["held_out_loss"]
    assert found["learning_rate"] == 3e-3
    assert losses["0.003"] < losses["1.0"]
    plan = trainer._draw
    assert not set(plan.held_out) & ({plan.injected} | {k for drawn in plan.drawn for k in drawn})
    held_out = [trainer.train_dataset[k] for k in plan.held_out]
    assert losses["0.003"] == pytest.approx(answer_loss(trainer.model, batches_of(held_out, 8)), rel=1e-6)
    assert losses["target"] == pytest.approx(answer_loss(before, batches_of(held_out, 8)), rel=1e-6)
    seen = [entry for entry in trainer.state.log_history if "answers" in entry]
    assert [entry["step"] for entry in seen] == [1, 2, 3, 4]
    assert seen[0]["learning_rate"] == pytest.approx(3e-3)


def test_what_rows_are_used_for():
    plan = Draw.draw(1000, 20, seed=1)
    assert sorted(plan.order) == list(range(20))
    assert {len(set(drawn)) for drawn in plan.drawn} == {15}
    assert max(k for drawn in plan.drawn for k in drawn) < 80
    assert 80 <= plan.injected < 1000
    assert (len(plan.held_out), min(plan.held_out)) == (80, 80)
    assert plan != Draw.draw(1000, 20, seed=2)
    small = Draw.draw(19, 3, seed=1)
    assert {small.injected, *small.held_out} == {15, 16, 17, 18}
    with pytest.raises(
        ValueError, match=r"The align split has 18 rows: LaTen needs at least 19, for pre-alignment \(15 or more\)"
    ):
        Draw.draw(18, 3, seed=1)


def test_a_folder_and_a_record_like_any_other(tmp_path, lively):
    trainer = make(tmp_path)
    zero = trainer.evaluate()
    assert "learning_rate" not in trainer.record()["laten"]
    output = trainer.train(resume_from_checkpoint=True)
    after = trainer.evaluate()
    assert after.keys() >= {"eval_kl", "eval_loss"}
    assert after["eval_loss"] != zero["eval_loss"]
    assert (output.global_step, trainer.state.global_step) == (4, 4)
    trainer.save_model()
    record = json.loads((tmp_path / "semalign.json").read_text())
    found = record["laten"]
    assert (record["method"], record["stages"], record["settings"]["lora_r"]) == ("laten", [0, 4], 4)
    assert record["settings"]["learning_rate"] == found["learning_rate"]
    assert (found["ffn_neurons"], found["attention_neurons"], found["steps"]) == (4, 2, 4)
    assert len(found["source_ffn_layers"]) == len(found["source_attention_layers"]) == 3
    held_out = found["held_out_rows"]
    assert held_out == 30 - 24 - 1
    assert found["cost"] == {
        "source_forward": 5,
        "target_forward": 5 + 2 * 4 * 16 + 3 * held_out,
        "target_backward": 2 * 4 * 16,
        "source_states_read": 5 * (4 * 5 + 3 * (32 + 64)),
        "target_states_read": 5 * (4 * 3 + 3 * (24 + 48)),
    }
    tiny_llama(3, 24, seed=1, pad_token_id=0).save_pretrained(tmp_path / "target")
    assert load_transfer(tmp_path, target=str(tmp_path / "target"))[1]["laten"] == found


def test_costs_are_counted_as_they_are(tmp_path, lively):
    """Forward passes over examples, counted at the embeddings of both models."""
    trainer = make(tmp_path)
    trainer.prepare()
    seen = {"source": 0, "target": 0}
    for name, model in (("source", trainer.source.model("cpu")), ("target", base_model(trainer.model))):

        def count(module, args, output, name=name):
            seen[name] += len(args[0])

        model.get_input_embeddings().register_forward_hook(count)
    trainer.train()
    cost = trainer.record()["laten"]["cost"]
    assert seen == {"source": cost["source_forward"], "target": cost["target_forward"]}


def test_a_plan_counts_what_a_run_does(tmp_path):
    """Rows of one length, so that multiplications are examples times those of one."""
    rows = random_rows([(4, 3)] * 40)
    trainer = make(tmp_path, train=rows[:30], extract=rows[30:34], evaluation=None)
    trainer.train()
    cost, found = trainer.record()["laten"]["cost"], transfer_cost(trainer.known, trainer.args)
    source, target = Size.of(dissect(trainer.source.shape)), Size.of(trainer.target_anatomy)
    assert found["locating"] == pytest.approx(
        cost["source_forward"] * source.forward(7)
        + 5 * target.forward(7)
        + cost["source_states_read"] * source.head
        + cost["target_states_read"] * target.head
    )
    networks = 4 * 3 * (2 * 4 + 2 * 2) * (32 * 32 + 32 * 24)  # steps, layers, neurons by role, both products
    passes = cost["target_backward"]
    assert found["training"] == pytest.approx(passes * (target.forward(7, 3) + target.forward(7, 6)) + 2 * 3 * networks)
    held_out = cost["target_forward"] - 5 - passes
    assert found["choosing the learning rate"] == pytest.approx(held_out * target.forward(7, 3))


def test_lora_has_the_rank_that_delta_needs(tmp_path):
    trainer = make(tmp_path)
    layer = dissect(trainer.model).layers[0]
    shapes = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in layer.named_modules()
        if hasattr(module, "lora_A")
    }
    assert shapes == {
        "mlp.up_proj": (4, 1.0), "mlp.down_proj": (4, 1.0), "self_attn.v_proj": (2, 1.0), "self_attn.o_proj": (2, 1.0),
    }  # fmt: skip


def test_bf16_runs(tmp_path, lively):
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert all(delta.dtype == torch.float32 and delta.isfinite().all() for delta in trainer.deltas.values())


def test_a_source_that_is_asked_online_stays(tmp_path, lively):
    trainer = make(tmp_path, signals="online")
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] != before


def test_without_an_extract_split_rows_are_held_out(tmp_path):
    assert make(tmp_path, extract=None)._draw == Draw.draw(24, 6, seed=3)


def test_an_interrupted_run_leaves_the_target_as_it_was(tmp_path, lively, monkeypatch):
    trainer = make(tmp_path)
    batch = batches_of(ROWS[:4], 4)
    before = answer_loss(trainer.model, batch)
    with monkeypatch.context() as broken:
        broken.setattr(laten, "penalty", lambda deltas: next(iter(deltas.values())).sum() * math.nan)
        with pytest.raises(FloatingPointError, match=r"LaTen's loss is not finite at step 1:.*Nothing was injected"):
            trainer.train()
    assert answer_loss(trainer.model, batch) == before
    trainer.train()
    assert answer_loss(trainer.model, batch) != before


# Refused


@table(
    "changes, message",
    [
        ("fp16", {"fp16": True}, "LaTen does not support fp16"),
        ("streaming", {"source_memory": "stream"}, "LaTen does not support source_memory='stream'"),
        ("few align rows", {"train": ROWS[:18]}, "The align split has 18 rows"),
        ("a stream", {"train": iter(ROWS[:30])}, "is a list_iterator: expected a Dataset or a list"),
        (
            "a shallow source",
            {"source": tiny_llama(2, 32, pad_token_id=0), "pairing": "proportional"},
            "The source has 2 layers and the target 3",
        ),
        (
            "a narrow target",
            {"target": tiny_llama(3, 8, pad_token_id=0)},
            "The target has 8 channels: LaTen transfers a tenth of them",
        ),
        (
            "a narrow source",
            {"target": tiny_llama(3, 24, pad_token_id=0, intermediate_size=700)},
            "The source has 32 attention and 64 FFN neurons per layer: LaTen needs 2 and 70",
        ),
        ("another family", {"source": build("GPT2", layers=5, vocab=97)}, "The neurons of GPT2LMHeadModel are unknown"),
        (
            "another norm",
            {"source": lifelike(build("Gemma", layers=5, vocab=97))},
            "Neurons of GemmaForCausalLM cannot be scored",
        ),
        ("no label", {"extract": [{"input_ids": [5, 6, 0], "labels": [IGNORED, IGNORED, 0]}]}, "has only special tokens"),
        ("other settings", {"frontier": "single"}, "LaTenTrainer requires"),
    ],
)
def test_what_cannot_work_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes).prepare()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SemAlignConfig, "world_size", property(lambda args: 2))
    with pytest.raises(ValueError, match="LaTen does not support several processes: run it in one process"):
        make(tmp_path)


def test_a_checkpoint_by_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LaTen has no checkpoints and cannot resume from"):
        make(tmp_path).train(resume_from_checkpoint="checkpoint-3")
