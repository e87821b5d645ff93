"""Every model family through a whole run: signals, all stages, prefix, saving, and plain loading by peft."""

import copy

import pytest
import torch
from conftest import PAPER, random_rows
from families import COMMON, FAMILIES, build
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, TrainerCallback

from hf_semalign.cache.signals import OnlineSignals
from hf_semalign.config import SemAlignConfig
from hf_semalign.splits import valid_positions
from hf_semalign.trainer import SemAlignTrainer

LAYERS, VOCAB = 3, 50
ROWS = random_rows([(2 + i % 3, 3 + i % 4) for i in range(26)], vocab=VOCAB)


class Moved(TrainerCallback):
    """Layers whose LoRA moved, by step, and whether the target prefix was in use."""

    def __init__(self):
        self.trainer, self.layers, self.with_prefix, self.before = None, [], False, None

    def _state(self):
        return [torch.cat([p.detach().flatten() for p in layer]) for layer in self.trainer.lora_layers]

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self._state()
        self.with_prefix |= self.trainer._prefix is not None

    def on_step_end(self, args, state, control, **kwargs):
        pairs = zip(self.before, self._state(), strict=True)
        self.layers.append({k for k, (old, new) in enumerate(pairs) if not torch.equal(old, new)})


def train(folder, source, target, **settings):
    moved = Moved()
    settings = {
        "max_steps": 6 * LAYERS,
        "use_cpu": True,
        **PAPER,
        **settings,
    }  # more than two epochs, so that there is a prefix
    args = SemAlignConfig(
        output_dir=str(folder),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = SemAlignTrainer(target, source, args, ROWS[:20], extract_dataset=ROWS[20:], callbacks=[moved])
    moved.trainer = trainer
    trainer.train()
    return trainer, moved


def adapter(trainer):
    return torch.cat([p.detach().flatten() for layer in trainer.lora_layers for p in layer])


def seeing(layers, width):
    """A Gemma 3 with a vision tower."""
    text = {**COMMON, **FAMILIES["Gemma3"].settings, "vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": layers}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "num_attention_heads": 4},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_id=VOCAB - 1,
    )
    torch.manual_seed(layers)
    return AutoModelForCausalLM.from_config(config)


def assert_same_signals(trainer, source):
    """The trainer's signals of some rows are those that the source gives when it runs on them."""
    batch = trainer.data_collator(trainer.train_dataset.select(range(4)))
    valid = valid_positions(batch["labels"])
    kept = trainer.signals(batch, range(LAYERS))
    made = OnlineSignals(source, trainer.pairing, trainer.semantic_map)(batch, range(LAYERS))
    assert tuple(kept.final.shape) == (int(valid.sum()), 32)
    assert [tuple(states.shape) for states in kept.supervision] == [(*valid.shape, 16)] * LAYERS
    torch.testing.assert_close(kept.final, made.final, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(kept.supervision, made.supervision, strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_teaches_and_learns(tmp_path, family):
    source = build(family, layers=LAYERS + 1, width=32, vocab=VOCAB, seed=1)
    target = build(family, layers=LAYERS, width=16, vocab=VOCAB, seed=2)
    fresh = copy.deepcopy(target)
    trainer, moved = train(tmp_path / "cached", source, target)

    assert moved.layers == [{stage} for stage in range(LAYERS) for _ in range(6)]
    assert moved.with_prefix
    for layer in trainer.lora_layers:
        assert len(layer) >= 2 and any(p.any() for p in layer[1::2])

    assert_same_signals(trainer, source)

    batch = trainer.data_collator(trainer.train_dataset.select(range(4)))
    valid = valid_positions(batch["labels"])
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        theirs = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with again.disable_adapter():
            before = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=1e-5)
    assert (theirs - before)[valid].abs().max() > 1e-3


QUICK = ("Llama", "Gemma3", "GPT2", "Bloom", "Mixtral", "FalconH1")  # one of each kind


@pytest.mark.parametrize("family", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in FAMILIES])
def test_cached_training_with_a_prefix_is_online_training(tmp_path, family):
    source = build(family, layers=LAYERS + 1, width=32, vocab=VOCAB, seed=1)
    target = build(family, layers=LAYERS, width=16, vocab=VOCAB, seed=2)
    runs = [
        train(tmp_path / signals, copy.deepcopy(source), copy.deepcopy(target), signals=signals)[0]
        for signals in ("cached", "online")
    ]
    cached, online = (adapter(run) for run in runs)
    assert (cached - online).norm() < 1e-4 * online.norm()


@pytest.mark.parametrize(
    ("source", "target"), [("Llama", "GPT2"), ("GPTNeoX", "Qwen3"), ("Gemma2", "Mamba"), ("Phi", "Mixtral")]
)
def test_two_families_over_one_vocabulary(tmp_path, source, target):
    trainer, moved = train(
        tmp_path, build(source, layers=LAYERS + 1, width=32, vocab=VOCAB), build(target, layers=LAYERS, width=16, vocab=VOCAB)
    )
    assert moved.layers == [{stage} for stage in range(LAYERS) for _ in range(6)]
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[-1] < kl[0]


def test_the_language_model_of_one_that_also_sees(tmp_path):
    """Gemma 3 from 4B on: its vision tower bears names of LoRA modules and gets none."""
    trainer, moved = train(tmp_path, seeing(LAYERS + 1, 32), seeing(LAYERS, 16))
    assert moved.layers == [{stage} for stage in range(LAYERS) for _ in range(6)]
    carriers = [name for name, _ in trainer.model.named_parameters() if "lora_A" in name]
    assert len(carriers) == 4 * LAYERS and all("language_model.layers" in name for name in carriers)


def test_a_model_whose_parts_are_not_found_trains_when_they_are_named(tmp_path):
    """Two lists of as many modules: which of them holds the layers is said by hand, of source and target."""
    models = {}
    for role, layers, width in (("source", LAYERS + 1, 32), ("target", LAYERS, 16)):
        models[role] = build("Llama", layers=layers, width=width, vocab=VOCAB)
        models[role].model.gates = nn.ModuleList(nn.Identity() for _ in range(layers))
    parts = {"layers": "model.layers"}
    with pytest.raises(ValueError, match=r"found \{'layers': 4, 'gates': 4\}.*in source_parts or target_parts"):
        train(tmp_path / "unnamed", models["source"], models["target"])
    trainer, moved = train(tmp_path / "named", models["source"], models["target"], source_parts=parts, target_parts=parts)
    assert moved.layers == [{stage} for stage in range(LAYERS) for _ in range(6)]
    assert trainer.source.num_layers == LAYERS + 1
