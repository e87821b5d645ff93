"""Tiny models, tokenizers and batches that the tests make for themselves; nothing is read from outside or downloaded."""

import json
import logging
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_semalign.cli import main
from hf_semalign.splits import Collator
from hf_semalign.tokenization import IGNORED

torch.set_num_threads(1)

LONGEST = ("test_faults.py", "test_engines.py", "test_architectures.py", "test_cli.py", "test_compare.py")
SPECIALS = ("<pad>", "<s>", "</s>")
# The paper's settings, where they are not the defaults: with stages and attribution most of the machinery is at work.
PAPER = {"frontier": "single", "pairing": "attribution", "relation_weight": 1.0}
WORDS = [f"w{i}" for i in range(94)]
TEXTS = [{"prompt": f"w{i} w{i + 1}", "completion": " w3 w4"} for i in range(40)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def tiny_llama(
    layers: int, width: int, vocab: int = 97, heads: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **config
) -> LlamaForCausalLM:
    """A Llama with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-12,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


def tiny_model(model_class: type[PreTrainedModel], config_class: type, seed: int = 0, **config) -> PreTrainedModel:
    """A model of any family with random weights, in evaluation mode; ``config`` in that family's names."""
    torch.manual_seed(seed)
    return model_class(config_class(**config)).eval()


def word_tokenizer(words: list[str], template: str | None = None, specials: tuple[str, ...] = SPECIALS, bos: bool = True):
    """A tokenizer that splits at white space: ids count the specials, then the words."""
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def random_rows(lengths: list[tuple[int, int]], vocab: int = 97, seed: int = 0) -> list[dict]:
    """Rows of token ids, of (prompt, answer) lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, (prompt, answer) in enumerate(lengths):
        ids = torch.randint(3, vocab, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:], "example_id": index})
    return rows


def batches_of(rows: list[dict], size: int) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of so many rows."""
    collate = Collator(pad_token_id=0)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def json_lines(rows: list[dict | str]) -> str:
    """Rows as a JSON-lines file has them; text stays as it is."""
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def table(names: str, rows: list[tuple]):
    """Parametrise over rows: what a case is about, then its values."""
    return pytest.mark.parametrize(names, [pytest.param(*values, id=about) for about, *values in rows])


@pytest.fixture
def no_weights(monkeypatch):
    """No model may be loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **settings: pytest.fail("weights were loaded"))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Two models, three files, a recipe, and what its run leaves: nothing of it is changed by a case."""
    folder = tmp_path_factory.mktemp("good")
    for name, model in (("target", tiny_llama(3, 16, pad_token_id=0)), ("source", tiny_llama(5, 24, pad_token_id=0))):
        model.save_pretrained(folder / name)
        word_tokenizer(WORDS).save_pretrained(folder / name)
    splits = {"align": TEXTS[:24], "eval": TEXTS[24:32], "extract": TEXTS[32:]}
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text(json_lines(rows))
    recipe = {
        "source": str(folder / "source"),
        "target": str(folder / "target"),
        "output_dir": str(folder / "run"),
        "data": {
            "task": "records",
            **{name: len(rows) for name, rows in splits.items()},
            "files": {name: str(folder / f"{name}.jsonl") for name in splits},
        },
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **PAPER,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(folder / "recipe.yaml"), "training.save_steps=1"]) == 0
    (folder / "run" / "_signals").rename(folder / "signals")
    return folder


@pytest.fixture
def refused(good, tmp_path, caplog, capfd):
    """Run a command on the good recipe with changes; it has to end with one error, as given."""

    def run(message, *changes, command="train", recipe=good / "recipe.yaml"):
        arguments = [command, "--config", str(recipe)] if command in ("train", "signals") else ["analyze", command, str(recipe)]
        assert main([*arguments, f"output_dir={tmp_path / 'run'}", *changes]) == 2
        errors = [text for logger, level, text in caplog.record_tuples if (logger, level) == ("hf_semalign", logging.ERROR)]
        assert len(errors) == 1
        assert re.match(f"error: .*{message}", errors[0])
        assert "Traceback" not in capfd.readouterr().err

    return run


@pytest.fixture
def chat_tokenizer():
    """A word-level tokenizer with a chat template that ends every turn with ``</s>``."""
    return word_tokenizer(
        ["<system>", "<user>", "<assistant>", "hello", "hi", "how", "are", "you", "fine", "bye"], CHAT_TEMPLATE
    )
