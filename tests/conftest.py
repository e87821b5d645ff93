"""Tiny models, tokenizers and batches that the tests make for themselves; nothing is read from outside or downloaded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_semalign.splits import IGNORED, Collator

torch.set_num_threads(1)

SPECIALS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


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


@pytest.fixture
def chat_tokenizer():
    """A word-level tokenizer with a chat template that ends every turn with ``</s>``."""
    return word_tokenizer(
        ["<system>", "<user>", "<assistant>", "hello", "hi", "how", "are", "you", "fine", "bye"], CHAT_TEMPLATE
    )
