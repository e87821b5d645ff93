"""Token bytes: those of a text's tokens are the text's, for every kind of tokenizer that tells them; others are refused."""

from types import SimpleNamespace

import pytest
from conftest import CHAT_TEMPLATE, table, word_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from two_tokenizers import BYTES, KINDS, SPECIALS, byte_level, fast, sentencepiece_bpe, texts, unigram, wordpiece

from hf_semalign.models.token_bytes import ALPHABET, TokenBytes

each_kind = pytest.mark.parametrize("kind", KINDS)


def spelled(table, tokenizer, text):
    return [table.spelled[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@each_kind
@pytest.mark.parametrize("seed", [None, 3])
def test_the_bytes_of_the_tokens_are_those_of_the_text(kind, seed):
    tokenizer = KINDS[kind](seed=seed)
    table = TokenBytes.of(tokenizer)
    for text in texts(300):
        found = b"".join(spelled(table, tokenizer, text))
        # SentencePiece puts a space before a text that has none.
        assert found == text.encode() or (found == b" " + text.encode() and not kind.startswith("byte-level")), text


def test_the_alphabet_is_that_of_the_tokenizers_library():
    """Each character of two bytes is written as two characters."""
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for point in (*range(0x20), *range(0x21, 0x800)):
        ((written, _),) = step.pre_tokenize_str(chr(point))
        assert written == "".join(ALPHABET[byte] for byte in chr(point).encode())
    assert len(set(ALPHABET)) == 256 and set(ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())


@each_kind
def test_special_tokens_and_ids_without_a_token_spell_nothing(kind):
    tokenizer = KINDS[kind]()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    table = TokenBytes.of(tokenizer)
    assert len(table.spelled) == len(table.names) == size + 1
    for name in (*SPECIALS, "<|turn|>"):
        token = tokenizer.convert_tokens_to_ids(name)
        assert table.spelled[token] is None and table.names[token] == name
    holes = Tokenizer(models.BPE({"a": 0, "b": 7, "<unk>": 9}, []))
    holes.decoder = decoders.ByteLevel()
    table = TokenBytes.of(fast(holes, ("<unk>",) * 4))
    assert table.spelled == [b"a", *[None] * 6, b"b", None, None] and table.names[1:7] == [None] * 6


@each_kind
def test_added_tokens_that_are_not_special_are_text(kind):
    """Runs of spaces of GPT-NeoX and line ends of Gemma, which are a text's own; markup of Qwen."""
    tokenizer = KINDS[kind]()
    added = ["<tool_call>", "é\n\n", "        "]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    table = TokenBytes.of(tokenizer)
    assert [table.spelled[tokenizer.convert_tokens_to_ids(text)] for text in added] == [text.encode() for text in added]
    text = "The<tool_call> is é\n\n        x"
    assert b"".join(spelled(table, tokenizer, text)).removeprefix(b" ") == text.encode()


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_byte_tokens_beside_a_token_of_the_same_byte_spell_nothing(make):
    tokenizer = make()
    table = TokenBytes.of(tokenizer)
    for byte, name in enumerate(BYTES):
        beside = table.spelled.count(bytes([byte])) - (table.spelled[tokenizer.convert_tokens_to_ids(name)] is not None)
        assert (table.spelled[tokenizer.convert_tokens_to_ids(name)] is None) == (beside == 1)
    assert len([text for text in table.spelled if text]) == len({text for text in table.spelled if text})


@each_kind
def test_ends_are_eos_and_what_a_template_writes_after_an_answer(kind):
    tokenizer = KINDS[kind]()
    (eos,) = TokenBytes.of(tokenizer).ends
    assert eos == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|done|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "\n<|done|>\n")
    assert TokenBytes.of(tokenizer).ends == {eos, tokenizer.convert_tokens_to_ids("<|done|>")}
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    assert TokenBytes.of(tokenizer).ends == {eos}


def test_an_end_that_is_no_special_token_spells_nothing_all_the_same():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.eos_token = "<|end|>"
    table = TokenBytes.of(tokenizer)
    assert table.ends == {tokenizer.eos_token_id} and table.spelled[tokenizer.eos_token_id] is None


# The first token of some bytes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("byte-level")])
@pytest.mark.parametrize("prefix_space", [False, True])
def test_the_first_token_of_a_text_is_that_of_its_cut(kind, prefix_space):
    tokenizer = KINDS[kind](prefix_space=prefix_space)
    table = TokenBytes.of(tokenizer)
    for text in texts(300, seed=1):
        expected = spelled(table, tokenizer, text)[0]
        if prefix_space and text[0] != " ":
            continue  # the tokenizer adds a space, which is none of the text's
        assert table.first(text.encode()) == expected


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_the_first_token_is_without_the_space_that_sentencepiece_adds(make):
    tokenizer = make()
    table = TokenBytes.of(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    for text in texts(300, seed=1):
        assert table.first(text.encode()) == spelled(table, tokenizer, text)[0]


@each_kind
def test_the_first_token_of_any_bytes_begins_them(kind):
    table = TokenBytes.of(KINDS[kind]())
    whole = "".join(texts(60, seed=2)).encode()
    for start in range(0, len(whole) - 9, 2):
        for length in (1, 2, 3, 8):
            text = whole[start : start + length]
            first = table.first(text)
            assert first and text.startswith(first)


def test_bytes_that_no_token_spells_have_no_first_token():
    """An alphabet with holes, and SentencePiece without tokens for bytes."""
    small = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    small.decoder = decoders.ByteLevel()
    table = TokenBytes.of(fast(small, ("</s>",) * 4))
    assert table.first(b"b") == b"b" and table.first(b"?") is None
    made = Tokenizer(models.BPE({"▁": 0, "a": 1, "<unk>": 2}, [], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    table = TokenBytes.of(fast(made, ("<unk>",) * 4))
    assert table.first(b" a") == b" " and table.first("é".encode()) is None and table.first(b"\xa9") is None


# Refused


def without_decoder():
    made = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, []))
    return fast(made, ("<unk>",) * 4)


def with_suffix():
    made = Tokenizer(models.BPE({"a": 0, "a</w>": 1, "<unk>": 2}, [], end_of_word_suffix="</w>"))
    made.decoder = decoders.BPEDecoder()
    return fast(made, ("<unk>",) * 4)


@table(
    "tokenizer, message",
    [
        ("WordPiece", wordpiece, r"is a WordPiece with the decoder \['WordPiece'\]: the bytes"),
        ("whole words", lambda: word_tokenizer(["a", "b"]), r"is a WordLevel with the decoder None: the bytes"),
        ("no decoder", without_decoder, r"is a BPE with the decoder None: the bytes"),
        ("suffixes", with_suffix, r"is a BPE with the decoder \['BPEDecoder'\]: the bytes"),
        (
            "a slow one",
            lambda: SimpleNamespace(name_or_path="made"),
            r"is a SimpleNamespace without a backend from the tokenizers library: the bytes",
        ),
    ],
)
def test_tokenizers_that_do_not_tell_their_bytes_are_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        TokenBytes.of(tokenizer())


def test_a_decoder_that_does_more_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("fox", "dog")])
    with pytest.raises(ValueError, match=r"decodes a sample as .The 3 doges.* spell .The 3 foxes"):
        TokenBytes.of(tokenizer)
