"""Anatomy: layers, head and LoRA modules of each family, and clear words where the method cannot be used."""

import pytest
import torch
from conftest import tiny_llama
from families import FAMILIES, build
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_semalign.models import lora
from hf_semalign.models.anatomy import base_model, check_head, dissect, embedding_rows, name_parts
from hf_semalign.models.lora import add_lora, lora_targets

LAYERS, VOCAB = 3, 50


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_and_head_make_the_models_own_logits(family):
    model = build(family)
    parts = dissect(model)
    ids = torch.tensor([[1, 7, 9, 30], [1, 4, 4, 49]])
    with torch.no_grad():
        hidden = parts.decoder(input_ids=ids, use_cache=False)[0]
        logits = model(input_ids=ids).logits
    head = parts.output_head()
    torch.testing.assert_close(head.logits(hidden), logits)
    assert parts.logit_scale == FAMILIES[family].scale and head.weight.shape == (VOCAB, 16)
    assert head.weight is not None and not head.weight.requires_grad and embedding_rows(model) == VOCAB
    check_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_decoder_layers_in_order(family):
    model = build(family)
    layers, called = dissect(model).layers, []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: called.append(index))
    model(input_ids=torch.tensor([[1, 7]]))
    assert called == list(range(LAYERS))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_modules_of_the_family_are_found_and_accepted_by_peft(family):
    model = build(family)
    targets = lora_targets(dissect(model).layers)
    assert targets == FAMILIES[family].lora
    adapted = add_lora(model, targets, rank=2, alpha=4)
    for layer in dissect(adapted).layers:
        assert any(name.endswith("lora_A.default.weight") for name, _ in layer.named_parameters())


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


def test_biased_and_capped_heads_are_known_and_cut_to_rows():
    phi, gemma = dissect(build("Phi")).output_head(), dissect(build("Gemma2")).output_head()
    assert phi.bias.shape == (VOCAB,) and phi.softcap is None and gemma.bias is None and gemma.softcap == 2.0
    ids = torch.tensor([1, 5, 40])
    hidden = torch.randn(2, 16)
    for head in (phi, gemma):
        torch.testing.assert_close(head.rows(ids).logits(hidden), head.logits(hidden)[:, ids])
        assert head.rows(torch.arange(VOCAB)) is head
        first = head.rows(torch.arange(VOCAB - 3))
        assert first.begins(head) and first.weight.shape[0] == VOCAB - 3  # a view: no copy of a padded head
        assert not head.rows(torch.arange(1, VOCAB)).begins(head)
    assert phi._replace(bias=torch.randn(VOCAB)).logits(hidden).sub(phi.logits(hidden)).abs().max() > 0.1


def test_a_logit_scale_scales_the_bias_too():
    model = build("Phi")
    torch.nn.init.normal_(model.lm_head.bias)
    model.config.logit_scale = 0.5
    head = dissect(model).output_head()
    torch.testing.assert_close(head.bias, 0.5 * model.lm_head.bias.detach())
    torch.testing.assert_close(head.weight, 0.5 * model.lm_head.weight.detach())


def test_logits_that_the_head_does_not_explain_are_refused():
    model = build("Granite")
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ValueError, match="logits of GraniteForCausalLM differ from its head applied"):
        check_head(model)


def test_a_head_is_looked_at_without_the_rounding_of_autocast():
    """Which may stand around whoever asks for the source first, and rounds before Gemma's cap what the head does not."""
    with torch.autocast("cpu", torch.bfloat16):
        check_head(build("Gemma2"))


def test_parts_can_be_named_by_hand_and_stay_named(tmp_path):
    model = tiny_llama(2, 16)
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="in source_parts or target_parts"):
        dissect(model)
    name_parts(model.config, {"layers": "model.layers", "decoder": "model", "head": "lm_head"})
    assert dissect(model).layers is model.model.layers
    model.config.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).semalign_parts == model.config.semalign_parts


def test_wrong_names_of_parts_are_refused_with_what_there_is():
    model = tiny_llama(2, 16)
    with pytest.raises(ValueError, match=r"Unknown parts \['blocks'\]"):
        name_parts(model.config, {"blocks": "model.layers"})
    name_parts(model.config, {"layers": "transformer.h"})
    with pytest.raises(ValueError, match=r"no module 'transformer.h', which was given as its layers. It has .*'model.layers'"):
        dissect(model)


def test_layers_wider_or_narrower_than_the_head_are_refused():
    with pytest.raises(ValueError, match="OPTForCausalLM"):
        dissect(build("OPT", width=32, hidden_size=16))


def test_wanted_lora_modules_are_used_as_given():
    assert lora_targets(tiny_llama(2, 16).model.layers, ["q_proj", "gate_proj"]) == ["q_proj", "gate_proj"]


@pytest.mark.parametrize("wanted", [["v_proj", "w_pack"], ["w_pack", "mlp"]])
def test_unknown_lora_modules_are_refused_with_the_candidates(wanted):
    missing = sorted(set(wanted) - {"v_proj"})
    with pytest.raises(ValueError) as error:
        lora_targets(tiny_llama(2, 16).model.layers, wanted)
    assert f"{missing} occur in no layer" in str(error.value)
    assert "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']" in str(error.value)


def test_every_layer_needs_a_module_but_not_every_module():
    layers = tiny_llama(2, 16).model.layers
    del layers[1].self_attn.v_proj
    assert lora_targets(layers) == ["up_proj", "down_proj", "v_proj", "o_proj"]
    with pytest.raises(ValueError, match=r"none of \['v_proj'\] in layers \[1\]"):
        lora_targets(layers, ["v_proj"])


def test_layers_without_known_modules_are_refused_with_the_candidates():
    layers = nn.ModuleList([nn.ModuleDict({"mixing": nn.Linear(4, 4)}) for _ in range(2)])
    with pytest.raises(ValueError, match=r"none of the known names in layers \[0, 1\]. Candidates: \['mixing'\]"):
        lora_targets(layers)
    assert lora_targets(layers, ["mixing"]) == ["mixing"]


def test_what_is_not_in_the_layers_gets_no_lora():
    """Also at the root, where a path is the end of many others."""
    model = tiny_llama(2, 16)
    model.tower = nn.ModuleDict({"v_proj": nn.Linear(16, 16)})
    model.o_proj = nn.Linear(16, 16)
    names = lora_targets(model.model.layers)
    adapted = add_lora(model, names, rank=2, alpha=4)
    carriers = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(carriers) == 8 and all("model.layers." in name for name in carriers)


def test_a_mixture_of_experts_gets_lora_on_its_attention_alone(caplog):
    """Its dense layers as well: peft would take the names of their FFNs for those of experts."""
    model = build("Qwen3Moe", mlp_only_layers=[0])
    layers = dissect(model).layers
    names = lora_targets(layers)
    assert names == ["v_proj", "o_proj"] and "mixture of experts" in caplog.text
    with pytest.raises(ValueError, match=r"\['down_proj'\] occur in no layer"):
        lora_targets(layers, ["down_proj", "o_proj"])
    adapted = add_lora(model, names, rank=2, alpha=4)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * LAYERS


def test_lora_that_peft_puts_elsewhere_is_refused(monkeypatch):
    model = tiny_llama(2, 16)
    monkeypatch.setattr(
        lora, "get_peft_model", lambda target, config: get_peft_model(target, LoraConfig(target_modules=["q_proj"]))
    )
    with pytest.raises(
        ValueError, match=r"\['model.layers.0.self_attn.q_proj', .* got it too, and \['model.layers.0.self_attn.v"
    ):
        add_lora(model, ["v_proj"], rank=2, alpha=4)


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconH1", "Bamba"])
def test_what_fused_kernels_of_a_state_space_mixer_read_gets_no_lora(family):
    with pytest.raises(ValueError, match="occur in no layer"):
        lora_targets(dissect(build(family)).layers, ["out_proj"])
