"""Layer attribution: equal to gradients taken by hand, whatever the batches, and without a trace on the model."""

import pytest
import reference
import torch
from conftest import batches_of, random_rows, tiny_llama, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from hf_semalign.method.attribution import AGGREGATES, LayerScores, attribute_layers

UNEVEN = [(3, 2), (2, 9), (6, 1), (1, 4), (5, 5)]
SMALL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": lambda: tiny_llama(3, 16),
    "GPT-2": lambda: tiny_model(GPT2LMHeadModel, GPT2Config, **SMALL, n_embd=16, n_layer=3, n_head=4, n_positions=64),
    "Granite": lambda: tiny_model(
        GraniteForCausalLM, GraniteConfig, **SMALL, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5,
    ),
}  # fmt: skip


@pytest.fixture
def source():
    return tiny_llama(3, 16)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_scores_equal_gradients_taken_by_hand_in_any_batches(source, aggregate, size):
    rows = random_rows(UNEVEN)
    expected = reference.gradient_times_activation(source, source.model.layers, rows, aggregate)
    scores = attribute_layers(source, batches_of(rows, size), aggregate=aggregate)
    torch.testing.assert_close(torch.tensor(scores.values).double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-2 and (scores.num_examples, scores.aggregate) == (5, aggregate)


def test_padding_on_the_left_changes_nothing(source):
    rows = random_rows(UNEVEN[:3])
    right = batches_of(rows, 3)[0]
    left = {key: right[key].clone() for key in ("input_ids", "attention_mask", "labels")}
    for index, row in enumerate(rows):
        for tensor in left.values():
            tensor[index] = tensor[index].roll(tensor.shape[1] - len(row["input_ids"]))
    expected = attribute_layers(source, [right], aggregate="l2").values
    assert attribute_layers(source, [left], aggregate="l2").values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_gradients_taken_by_hand_in_other_families(family):
    model, rows = FAMILIES[family](), random_rows(UNEVEN[:3])
    layers = model.transformer.h if family == "GPT-2" else model.model.layers
    expected = reference.gradient_times_activation(model, layers, rows, "l2")
    scores = attribute_layers(model, batches_of(rows, 3), aggregate="l2")
    torch.testing.assert_close(torch.tensor(scores.values).double(), expected, rtol=1e-4, atol=1e-7)


def test_a_source_of_one_layer_has_one_score():
    source, rows = tiny_llama(1, 16), random_rows(UNEVEN)
    expected = reference.gradient_times_activation(source, source.model.layers, rows, "l1")
    scores = attribute_layers(source, batches_of(rows, 2), aggregate="l1")
    assert scores.values == pytest.approx(expected.tolist(), rel=1e-4)


def test_examples_weigh_alike_whatever_the_length_of_their_answers(source):
    rows = random_rows(UNEVEN)
    alone = torch.tensor([attribute_layers(source, batches_of([row], 1)).values for row in rows], dtype=torch.float64)
    scores = attribute_layers(source, batches_of(rows, 5))
    assert scores.values == pytest.approx(alone.mean(0).tolist(), rel=1e-4, abs=1e-7)
    assert scores.deviations == pytest.approx(alone.std(0, unbiased=False).tolist(), rel=1e-3, abs=1e-7)


def test_dot_scores_nothing_at_the_last_layer_whose_length_the_final_norm_removes(source):
    *others, last = attribute_layers(source, batches_of(random_rows(UNEVEN), 5)).values
    assert min(others) > 1e-2 and last < 1e-5


def test_dot_is_the_default_and_aggregates_are_ordered_as_their_norms(source):
    batches = batches_of(random_rows(UNEVEN), 5)
    scores = {name: attribute_layers(source, batches, aggregate=name).values for name in AGGREGATES}
    assert attribute_layers(source, batches).values == scores["dot"]
    for signed, dot, l2, l1 in zip(*(scores[name] for name in ("signed", "dot", "l2", "l1")), strict=True):
        assert abs(signed) <= dot + 1e-7 and dot < l1 and l2 < l1


def test_bf16_scores_come_near_those_of_float32():
    batches = batches_of(random_rows(UNEVEN), 5)
    exact = attribute_layers(tiny_llama(3, 16), batches, aggregate="l2").values
    assert attribute_layers(tiny_llama(3, 16, dtype=torch.bfloat16), batches, aggregate="l2").values == pytest.approx(
        exact, rel=0.1
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_source_is_left_as_it_was(source, training, fails):
    source.train(training)
    source.lm_head.weight.requires_grad_(False)
    needed = [parameter.requires_grad for parameter in source.parameters()]
    batches = batches_of(random_rows(UNEVEN), 2)
    if fails:
        batches[1]["labels"][1] = -100
        with pytest.raises(ValueError, match="No valid positions"):
            attribute_layers(source, batches)
    else:
        attribute_layers(source, batches)
    assert source.training is training
    assert [parameter.requires_grad for parameter in source.parameters()] == needed
    assert all(parameter.grad is None for parameter in source.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.modules())


def test_source_weights_need_no_gradient_while_scored(source):
    needed = []
    source.model.norm.register_forward_pre_hook(lambda *call: needed.extend(p.requires_grad for p in source.parameters()))
    attribute_layers(source, batches_of(random_rows(UNEVEN[:1]), 1))
    assert needed and not any(needed)


def test_dropout_is_off():
    rows = batches_of(random_rows(UNEVEN), 2)
    source = tiny_llama(2, 16, attention_dropout=0.5)
    assert attribute_layers(source.train(), rows).values == attribute_layers(source.eval(), rows).values


def test_json_round_trip(tmp_path):
    scores = LayerScores(values=(0.1, 1 / 3, 2e-9), deviations=(0.5, 0.25, 1e-12), num_examples=7, aggregate="l2")
    scores.to_json(tmp_path / "scores.json")
    assert LayerScores.from_json(tmp_path / "scores.json") == scores


@pytest.mark.parametrize(
    ("values", "deviations", "flat"),
    [((1.0, 1.2, 1.4), (0.5, 0.5, 0.5), True), ((1.0, 1.2, 2.4), (0.5, 0.5, 0.5), False), ((1.0, 1.2), (0.0, 0.0), False)],
)
def test_scores_are_flat_when_layers_differ_less_than_examples(values, deviations, flat):
    assert LayerScores(values, deviations, 4, "dot").flat is flat


def test_flat_scores_are_reported_and_others_are_not(source, caplog):
    # One example deviates from no other; the states of examples with other prompts do, under weights that know nothing.
    rows = random_rows([(12, 1)] * 6)
    attribute_layers(source, batches_of(rows[:1], 1))
    assert not caplog.records
    scores = attribute_layers(tiny_llama(2, 16, initializer_range=0.02), batches_of(rows, 6), aggregate="signed")
    assert scores.flat and "flat" in caplog.text and "banded" in caplog.text


def test_unusable_input_is_refused(source):
    batches = batches_of(random_rows(UNEVEN), 2)
    with pytest.raises(ValueError, match=r"aggregate is 'mean': expected one of \['dot', 'l1', 'l2', 'signed'\]"):
        attribute_layers(source, batches, aggregate="mean")
    with pytest.raises(ValueError, match="no batches"):
        attribute_layers(source, [])


def test_activations_are_held_for_one_layer_at_a_time(source):
    """Of what the backward pass needs, only the outputs of the layers and the output loss are kept from the forward pass."""
    layers, width, rows = len(source.model.layers), 16, random_rows([(30, 30)] * 4)
    held, runs = [], []
    for layer in source.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
        attribute_layers(source, batches_of(rows, 4))
    assert len(runs) == 2 * layers - 1  # once forward, and all but the first once more on the way back
    inside = 4 * 60 * 2 * width  # one of the FFN's tensors; each layer makes some ten of this size
    assert sum(size >= inside for size in held) <= 4
