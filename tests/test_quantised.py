"""Quantised bases (bitsandbytes): training, the same signals cached and online, and weights dequantised for the map.

On a GPU where there is one, to which transformers loads quantised weights by itself.
"""

import pytest
import torch
from conftest import random_rows, tiny_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_semalign.config import SemAlignConfig
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import check_head, dissect
from hf_semalign.models.loading import keep_layout, load_model
from hf_semalign.trainer import SemAlignTrainer

ROWS = random_rows([(3 + i % 3, 2 + i % 4) for i in range(40)])
BITS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},
}


def quantised(folder, layers, seed, **settings):
    """A Llama that was saved whole and loaded with fewer bits."""
    tiny_llama(layers, 64, seed=seed, pad_token_id=0).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    keep_layout(model)  # as every model that the library loads or is given
    return model


def train(folder, target, source, **settings):
    args = SemAlignConfig(
        output_dir=str(folder),
        max_steps=24,
        relation_weight=0.1,
        frontier="single",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **{"pairing": "attribution", **settings},
    )
    trainer = SemAlignTrainer(target, source, args, ROWS[:16], extract_dataset=ROWS[27:33])
    before = trainer.evaluate(trainer.train_dataset)["eval_kl"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_kl"] < before - 0.05
    return trainer


@pytest.mark.parametrize("bits", BITS)
def test_quantised_source_and_target(tmp_path, bits):
    source = quantised(tmp_path / "source", 5, 2, **BITS[bits])
    source.save_pretrained(tmp_path / "smaller")
    trainers = []
    for signals, given in (("cached", str(tmp_path / "smaller")), ("online", source)):
        target = quantised(tmp_path / "target", 3, 1, **BITS[bits])
        assert target.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
        trainers.append(train(tmp_path / signals, target, given, signals=signals))
    cached, online = (torch.cat([p.detach().flatten() for layer in t.lora_layers for p in layer]) for t in trainers)
    # 8 bits quantise activations as well, at every batch anew: only 4 bits can be the very same.
    assert (cached - online).norm() < (1e-4 if bits == "4 bits" else 0.1) * online.norm()

    trainers[0].save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(tmp_path / "target", 3, 1, **BITS[bits]), tmp_path / "adapter").eval()
    ids = torch.tensor([ROWS[0]["input_ids"]], device=again.device)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, trainers[0].model.eval()(input_ids=ids).logits)


def test_a_quantised_source_by_path_whose_layers_need_no_scores(tmp_path):
    """Nothing has loaded it when its head is wanted."""
    quantised(tmp_path / "whole", 5, 2, **BITS["4 bits"]).save_pretrained(tmp_path / "source")
    train(tmp_path / "run", tiny_llama(3, 64, seed=1, pad_token_id=0), str(tmp_path / "source"), pairing="last")


def test_other_quantisation_is_refused(tmp_path):
    model = tiny_llama(3, 64, pad_token_id=0)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="Weights quantised with fp8 are not supported: use bitsandbytes, or unquantised"):
        train(tmp_path, model, tiny_llama(5, 64))


def test_a_quantised_head_is_dequantised_for_the_map_and_the_kl(tmp_path):
    model = quantised(tmp_path / "source", 2, 1, **BITS["4 bits"], llm_int8_skip_modules=["none"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source").to(model.device)
    assert not model.lm_head.weight.is_floating_point()
    weight = dissect(model).head_weight()
    assert weight.shape == (97, 64) and 0 < (weight - plain.lm_head.weight).norm() < 0.2 * plain.lm_head.weight.norm()
    check_head(model)
    assert SemanticMap.from_models(model, plain).matrix.shape == (64, 64)


def test_packed_weights_are_not_packed_anew_in_evaluation(tmp_path):
    """As bitsandbytes would do on some CPUs, after which what reads the weights reads something else."""
    model = quantised(tmp_path / "source", 2, 1, **BITS["4 bits"]).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert load_model(model) is model
    with torch.no_grad():
        model(input_ids=torch.tensor([ROWS[0]["input_ids"]], device=model.device))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    flags = [getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules()]
    assert not any(flags)


def test_a_quantised_source_is_not_streamed(tmp_path):
    source = quantised(tmp_path / "source", 5, 2, **BITS["4 bits"])
    with pytest.raises(ValueError, match="is quantised, but source_memory 'stream' needs unquantised weights: use 'resident'"):
        train(tmp_path, tiny_llama(3, 64, pad_token_id=0), source, source_memory="stream")
