"""The bytes that each token of a tokenizer spells. Two tokenizers are compared by these bytes alone.

The tokenizer's decoder determines how a token string becomes text. Byte-level tokenizers write each byte as a character of
GPT-2's alphabet. SentencePiece tokenizers write a space as ``▁``, and a byte that no token spells as ``<0xNN>``. Offsets are
not used, because they repeat inside a multi-byte character. Other tokenizers, such as WordPiece, lose white space and are
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_semalign.errors import InputError

SPACE = "▁"
BYTE = re.compile("<0x([0-9A-F]{2})>")
SAMPLE = "The 3 foxes' re-run: 12.50 km -> 1,024 tests?\n\tdef f_1(x):\n        return x**2"
ANSWER = "An answer."


def _alphabet() -> str:
    """GPT-2's character for each byte: printable bytes map to themselves, all others to characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(hidden)) for byte in range(256))


ALPHABET = _alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


@dataclass(frozen=True)
class TokenBytes:
    """Table of the bytes that a tokenizer's tokens spell.

    Attributes:
        spelled: bytes of each token id. ``None`` for special tokens, for ids without a token, and for byte tokens that the
            tokenizer never writes because a plain token spells the same byte.
        names: token string of each id, as in the vocabulary; ``None`` for ids without a token.
        ends: ids of the tokens that end an answer: EOS, and the token that the chat template writes after an assistant turn.
    """

    spelled: Sequence[bytes | None]
    names: Sequence[str | None]
    ends: frozenset[int]
    _backend: Tokenizer
    _is_byte_level: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """Build the table of a tokenizer.

        Added tokens that are not special count as text: Gemma and GPT-NeoX have runs of white space among them, Qwen has
        ``<tool_call>``.

        Raises:
            ValueError: the bytes of the tokens cannot be determined, as with WordPiece, or the tokenizer decodes a sample
                differently from the table.
        """
        backend, is_byte_level = _backend(tokenizer)
        vocabulary = tokenizer.get_vocab()
        names: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for name, token in vocabulary.items():
            names[token] = name
        spell = _spelled_by_alphabet if is_byte_level else _spelled_by_sentencepiece
        spelled = [None if name is None else spell(name) for name in names]
        for token, added in tokenizer.added_tokens_decoder.items():
            text = added.content if is_byte_level else added.content.replace(SPACE, " ")
            spelled[token] = None if added.special else text.encode()
        if not is_byte_level:
            _drop_spare_bytes(spelled, names)
        ends = _end_ids(tokenizer, spelled)
        for token in ends:
            spelled[token] = None
        table = cls([text or None for text in spelled], names, ends, backend, is_byte_level)
        table._check(tokenizer)
        return table

    def first(self, text: bytes) -> bytes | None:
        """Tokenize some bytes and return the bytes of the first token.

        Args:
            text: at least one byte; may begin or end inside a character.

        Returns:
            ``None`` if the tokenizer has no token for these bytes.
        """
        model, whole = self._backend.model, _whole_characters(text)
        if self._is_byte_level:
            cut = model.tokenize("".join(ALPHABET[byte] for byte in self._first_piece(whole).encode() or text))
        else:
            cut = model.tokenize(whole.replace(" ", SPACE))
        token = cut[0].id if cut else model.token_to_id(f"<0x{text[0]:02X}>")
        return None if token is None else self.spelled[token]

    def _first_piece(self, text: str) -> str:
        """First piece of the pre-tokenizer, such as a digit, a word or a run of white space."""
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(text) if self._backend.pre_tokenizer else []
        return text[: pieces[0][1][1]] if pieces else text

    def _check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the table with the tokenizer's own decoding, which may drop a space at the start of a text."""
        ids = [token for token in tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] if self.spelled[token]]
        ours = b"".join(self.spelled[token] or b"" for token in ids).decode(errors="replace")
        theirs = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if ours.removeprefix(" ") != theirs.removeprefix(" "):
            raise InputError(
                f"The tokenizer {tokenizer.name_or_path!r} decodes a sample as {theirs!r}, but the bytes of its tokens spell "
                f"{ours!r}: its decoder does something unknown. Choose a pair with one tokenizer."
            )


def _backend(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, bool]:
    """Backend of a tokenizer, and whether it is byte-level; otherwise it is SentencePiece. All others raise an error."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    kind = f"a {type(tokenizer).__name__} without a backend from the tokenizers library"
    if backend is not None:
        model: Any = backend.model
        steps = _steps(backend.decoder)
        kind = f"a {type(model).__name__} with the decoder {[step['type'] for step in steps] or None}"
        affixes = getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None)
        if type(model).__name__ in ("BPE", "Unigram") and not affixes:
            if any(step["type"] == "ByteLevel" for step in steps):
                return backend, True
            if any(SPACE in (step.get("replacement"), (step.get("pattern") or {}).get("String")) for step in steps):
                return backend, False
    raise InputError(
        f"The tokenizer {tokenizer.name_or_path!r} is {kind}: the bytes of its tokens cannot be determined. Two tokenizers are "
        "aligned by bytes, which needs byte-level BPE, or SentencePiece BPE or Unigram. Choose another model for this side."
    )


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """Steps of a decoder with their settings; a sequence is unpacked."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _spelled_by_alphabet(name: str) -> bytes | None:
    known = [BYTE_OF.get(character) for character in name]
    return None if None in known else bytes(byte for byte in known if byte is not None)


def _spelled_by_sentencepiece(name: str) -> bytes:
    byte = BYTE.fullmatch(name)
    return bytes.fromhex(byte[1]) if byte else name.replace(SPACE, " ").encode()


def _drop_spare_bytes(spelled: list[bytes | None], names: Sequence[str | None]) -> None:
    """Set byte tokens to ``None`` if a plain token spells the same byte: with a token ``A``, ``<0x41>`` is never written."""
    is_byte = [name is not None and BYTE.fullmatch(name) is not None for name in names]
    plain = {text for text, byte in zip(spelled, is_byte, strict=True) if not byte}
    for token, byte in enumerate(is_byte):
        if byte and spelled[token] in plain:
            spelled[token] = None


def _end_ids(tokenizer: PreTrainedTokenizerBase, spelled: Sequence[bytes | None]) -> frozenset[int]:
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": ANSWER}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, TypeError, ValueError):  # the template may need other turns; plain-text rows do not need it
            text = ""
        after = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"] if ANSWER in text else []
        ends.add(next((token for token in after if spelled[token] is None), None))
    return frozenset(ends - {None})


def _whole_characters(text: bytes) -> str:
    """Decode the longest valid prefix of some bytes."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start].decode()
