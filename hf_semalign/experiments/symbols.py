"""The embedded pair's task: four skills over sequences of symbols, small enough to learn and to evaluate in seconds.

A record is a prompt such as ``reverse k c x a =`` and the completion ``a x c k``. Skills: ``copy`` repeats the
sequence, ``reverse`` turns it around, ``sort`` orders it, ``shift`` replaces each symbol by its successor (cyclic).
The two models that ship with the package were trained on these records by ``recipes/quickstart/build_pair.py``.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_semalign.errors import InputError

# Caseless, because splits compare prompts without case.
SYMBOLS: tuple[str, ...] = tuple(string.digits + string.ascii_lowercase + "αβγδεζηθικλμνξοπ")
LENGTHS: tuple[int, ...] = (4, 5, 6)
SKILLS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": lambda sequence: sequence,
    "reverse": lambda sequence: sequence[::-1],
    "sort": sorted,
    "shift": lambda sequence: [(symbol + 1) % len(SYMBOLS) for symbol in sequence],
}
EMBEDDED = "embedded:"
PAIR_FOLDER = Path(__file__).parents[1] / "data" / "pair"
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def resolve_model(name: str) -> str:
    """Folder of an embedded model (``embedded:source``, ``embedded:target``); other names, Hub ids and folders, as given.

    Raises:
        ValueError: an embedded model that does not exist.
    """
    prefix, _, role = name.partition(EMBEDDED)
    if prefix or not role:
        return name
    if role not in ("source", "target"):
        raise InputError(f"No embedded model {name!r}: use embedded:source or embedded:target.")
    return str(PAIR_FOLDER / role)


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form ``owner/name`` or ``name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name_or_path: str) -> str:
    """A model's name for records and cards: never a local path, of a folder, here or elsewhere, only its own name."""
    if not name_or_path:
        return "unnamed"  # a model made in memory
    path = Path(name_or_path)
    if path.parent == PAIR_FOLDER:
        return EMBEDDED + path.name
    if path.exists():
        return path.resolve().name
    return name_or_path if is_hub_id(name_or_path) else re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the pair: special tokens, skill names, ``=`` and the symbols, split at spaces."""
    words = [*SPECIAL_TOKENS.values(), "=", *SKILLS, *SYMBOLS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def make_records(
    count: int, seed: int, exclude: set[str] | None = None, skills: Sequence[str] = tuple(SKILLS)
) -> list[dict[str, str]]:
    """Draw distinct records, the skills in turn.

    Args:
        count: number of records.
        seed: seed of the draw; the same seed gives the same records.
        exclude: prompts that must not be drawn (those of other splits).
        skills: some of ``SKILLS``.

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
