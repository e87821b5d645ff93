"""Anatomy: layers, head and LoRA modules of each family, and clear words where the method cannot be used."""

import pytest
import torch
import transformers
from conftest import tiny_llama, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_semalign.anatomy import base_model, dissect, lora_targets, num_layers

LAYERS, VOCAB = 3, 50
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {**COMMON, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GROUPED = {**MODERN, "num_key_value_heads": 2}
LLAMA_ROW = ["up_proj", "down_proj", "v_proj", "o_proj"]
OPT = {
    **COMMON,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
}

# Name of the family in transformers: settings, logit scale, LoRA modules.
FAMILIES = {
    "Llama": (GROUPED, 1.0, LLAMA_ROW),
    "Qwen2": (GROUPED, 1.0, LLAMA_ROW),
    "Mistral": ({**GROUPED, "head_dim": 4}, 1.0, LLAMA_ROW),
    "Gemma": ({**GROUPED, "head_dim": 4}, 1.0, LLAMA_ROW),
    "Cohere": ({**GROUPED, "logit_scale": 0.25}, 0.25, LLAMA_ROW),
    "Granite": ({**GROUPED, "logits_scaling": 8.0}, 0.125, LLAMA_ROW),
    "Phi3": (GROUPED, 1.0, ["gate_up_proj", "down_proj", "qkv_proj", "o_proj"]),
    "Starcoder2": (GROUPED, 1.0, ["c_fc", "c_proj", "v_proj", "o_proj"]),
    "GPTNeoX": (MODERN, 1.0, ["dense_h_to_4h", "dense_4h_to_h", "query_key_value", "dense"]),
    "OPT": (OPT, 1.0, ["fc1", "fc2", "v_proj", "out_proj"]),
    "GPT2": ({**COMMON, "n_embd": 16, "n_layer": LAYERS, "n_head": 4}, 1.0, ["c_fc", "c_proj", "c_attn"]),
}


def build(family, **changes):
    model_class = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    return tiny_model(
        model_class, getattr(transformers, f"{family}Config"), **{**FAMILIES.get(family, (GROUPED,))[0], **changes}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_and_head_make_the_models_own_logits(family):
    model = build(family)
    anatomy = dissect(model)
    ids = torch.tensor([[1, 7, 9, 30], [1, 4, 4, 49]])
    with torch.no_grad():
        hidden = anatomy.decoder(input_ids=ids, use_cache=False)[0]
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(hidden @ anatomy.head_weight().T, logits)
    assert anatomy.logit_scale == FAMILIES[family][1] and anatomy.head_weight().shape == (VOCAB, 16)
    assert not anatomy.head_weight().requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_decoder_layers_in_order(family):
    model = build(family)
    layers, called = dissect(model).layers, []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: called.append(index))
    model(input_ids=torch.tensor([[1, 7]]))
    assert called == list(range(LAYERS)) and num_layers(model.config) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_modules_of_the_family_are_found_and_accepted_by_peft(family):
    model = build(family)
    targets = lora_targets(dissect(model).layers)
    assert targets == FAMILIES[family][2]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "GPT2"))
    for layer in dissect(adapted).layers:
        assert len([name for name, _ in layer.named_parameters() if name.endswith("lora_A.default.weight")]) >= len(targets)


def test_a_peft_model_has_the_anatomy_of_its_base():
    model = tiny_llama(2, 16)
    bare = dissect(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"]))
    inside = dissect(adapted)
    assert inside.layers is bare.layers and inside.head is bare.head and inside.decoder is bare.decoder
    assert base_model(adapted) is model and base_model(model) is model


def test_head_weight_without_a_scale_is_the_heads_own_memory():
    model = tiny_llama(1, 16)
    assert dissect(model).head_weight().data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_a_head(tied):
    model = build("Llama", tie_word_embeddings=tied)
    assert (dissect(model).head.weight is model.get_input_embeddings().weight) is tied


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings: SemAlign needs a causal LM"):
        dissect(tiny_llama(1, 16).model)


def test_missing_layers_are_refused_with_what_was_found():
    model = tiny_llama(3, 16)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM not found: looked in LlamaModel.* of 3 layers.*\{'layers': 2\}"):
        dissect(model)


def test_two_lists_of_the_same_length_are_refused():
    model = tiny_llama(2, 16)
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"\{'layers': 2, 'others': 2\}"):
        dissect(model)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Gemma2", {"head_dim": 4, "final_logit_softcapping": 30.0}), ("Phi", {})],
    ids=["soft-capped logits", "a bias"],
)
def test_heads_that_are_no_plain_matrix_are_refused(family, changes):
    with pytest.raises(ValueError, match=f"The head of {family}ForCausalLM has a bias or soft-capped logits"):
        dissect(build(family, **changes))


def test_a_head_multiplier_is_folded_or_refused():
    settings = {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}
    model = build("FalconH1", **settings)
    ids = torch.tensor([[1, 7, 9, 30]])
    try:
        anatomy = dissect(model)
    except ValueError:
        return
    with torch.no_grad():
        hidden = anatomy.decoder(input_ids=ids, use_cache=False)[0]
        torch.testing.assert_close(hidden @ anatomy.head_weight().T, model(input_ids=ids).logits)


def test_layers_wider_or_narrower_than_the_head_are_refused():
    with pytest.raises(ValueError, match="OPTForCausalLM"):
        dissect(build("OPT", word_embed_proj_dim=8))


def test_wanted_lora_modules_are_used_as_given():
    assert lora_targets(tiny_llama(2, 16).model.layers, ["q_proj", "gate_proj"]) == ["q_proj", "gate_proj"]


@pytest.mark.parametrize("wanted", [["v_proj", "w_pack"], ["w_pack", "mlp"]])
def test_unknown_lora_modules_are_refused_with_the_candidates(wanted):
    missing = sorted(set(wanted) - {"v_proj"})
    with pytest.raises(ValueError) as error:
        lora_targets(tiny_llama(2, 16).model.layers, wanted)
    assert f"{missing} do not occur in every layer" in str(error.value)
    assert "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']" in str(error.value)


def test_a_module_must_be_in_every_layer():
    layers = tiny_llama(2, 16).model.layers
    del layers[1].self_attn.v_proj
    with pytest.raises(ValueError, match="no known set of names occurs in every layer") as error:
        lora_targets(layers)
    assert "'v_proj'" not in str(error.value) and "'o_proj'" in str(error.value)
