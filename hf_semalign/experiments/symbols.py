"""The task of the embedded models: four skills over sequences of symbols, learned and evaluated in seconds.

A record is a prompt such as ``reverse k c x a =`` and the completion ``a x c k``. Skills: ``copy`` repeats the
sequence, ``reverse`` turns it around, ``sort`` orders it, ``shift`` replaces each symbol by its successor (cyclic).
The two models that ship with the package were trained on these records by ``recipes/quickstart/build_pair.py``.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# No upper case, because splits compare prompts without case.
SYMBOLS: tuple[str, ...] = tuple(string.digits + string.ascii_lowercase + "αβγδεζηθικλμνξοπ")
LENGTHS: tuple[int, ...] = (4, 5, 6)
SKILLS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": lambda sequence: sequence,
    "reverse": lambda sequence: sequence[::-1],
    "sort": sorted,
    "shift": lambda sequence: [(symbol + 1) % len(SYMBOLS) for symbol in sequence],
}
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer. Its words are the special tokens, skill names, ``=`` and the symbols, split at spaces."""
    words = [*SPECIAL_TOKENS.values(), "=", *SKILLS, *SYMBOLS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def make_records(
    count: int, seed: int, exclude: set[str] | None = None, skills: Sequence[str] = tuple(SKILLS)
) -> list[dict[str, str]]:
    """Draw distinct records that cycle through the skills.

    Args:
        count: number of records.
        seed: random seed. The same seed gives the same records.
        exclude: prompts that must not be drawn, because other splits use them.
        skills: a subset of ``SKILLS``.

    Returns:
        Dicts with ``prompt``, ``completion`` and ``skill``.
    """
    rng = random.Random(seed)
    seen = set(exclude or ())
    records: list[dict[str, str]] = []
    while len(records) < count:
        skill = skills[len(records) % len(skills)]
        sequence = [rng.randrange(len(SYMBOLS)) for _ in range(rng.choice(LENGTHS))]
        prompt = f"{skill} {' '.join(SYMBOLS[i] for i in sequence)} ="
        if prompt not in seen:
            seen.add(prompt)
            answer = SKILLS[skill](sequence)
            records.append({"prompt": prompt, "completion": " " + " ".join(SYMBOLS[i] for i in answer), "skill": skill})
    return records
