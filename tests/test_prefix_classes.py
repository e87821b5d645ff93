"""Classes of tokens: a partition by what tokens spell, single tokens for one tokenizer, the same for whatever ids."""

from itertools import product

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from two_tokenizers import KINDS, byte_level, fast, sentencepiece_bpe, unigram

from hf_semalign.method.prefix_classes import PrefixClasses, prefix_classes
from hf_semalign.models.token_bytes import TokenBytes

ALL = 10**6  # rows of a head that is longer than the vocabulary


def classes_of(source, target, source_rows=ALL, target_rows=ALL):
    return prefix_classes(TokenBytes.of(source), TokenBytes.of(target), source_rows, target_rows)


def members(classes, source, target):
    """Names of the tokens in each class, of the source and of the target."""
    found = [(set(), set()) for _ in range(classes.count + 1)]
    for side, (tokenizer, numbers) in enumerate(((source, classes.source), (target, classes.target))):
        for token, number in enumerate(numbers.tolist()):
            found[number][side].add(tokenizer.convert_ids_to_tokens(token))
    return found


def plain(words, merges=None):
    """A byte-level vocabulary of the letters and of some words; each is merged from left to right, if not by other merges."""
    merges = merges or [(word[:-1], word[-1]) for word in words if len(word) > 1]
    names = dict.fromkeys(["<unk>", *"".join(words), *words])
    made = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    made.decoder = decoders.ByteLevel()
    return fast(made, ["<unk>"] * 4)


@pytest.mark.parametrize("pair", list(product(KINDS, repeat=2)), ids=str)
def test_classes_are_a_partition_and_each_spells_a_prefix_that_both_hold(pair):
    source, target = (KINDS[kind](seed=seed) for kind, seed in zip(pair, (1, 2), strict=True))
    ours, theirs = TokenBytes.of(source), TokenBytes.of(target)
    classes = prefix_classes(ours, theirs, ALL, ALL)
    assert classes.source.dtype == classes.target.dtype == torch.int64
    assert (len(classes.source), len(classes.target)) == (len(ours.spelled), len(theirs.spelled))
    assert set(classes.target.tolist()) == set(range(classes.count))
    assert set(classes.source.tolist()) - {classes.count} <= set(range(classes.count))
    held = set(ours.spelled) & set(theirs.spelled) - {None}
    for side, numbers in ((ours, classes.source), (theirs, classes.target)):
        for text, number in zip(side.spelled, numbers.tolist(), strict=True):
            if text in held:
                assert number == classes.target[theirs.spelled.index(text)] == classes.source[ours.spelled.index(text)]
            elif text:
                (shared,) = {theirs.spelled[t] for t in (classes.target == number).nonzero().flatten()} & held
                assert text.startswith(shared) and shared != text


@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenizer_gives_single_tokens(kind):
    tokenizer = KINDS[kind](seed=4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|done|>"]})
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|done|>{% endfor %}"
    assert len(TokenBytes.of(tokenizer).ends) == 2
    classes = classes_of(tokenizer, tokenizer)
    assert classes.count == len(tokenizer)
    assert torch.equal(classes.source, torch.arange(len(tokenizer))) and torch.equal(classes.target, classes.source)


@pytest.mark.parametrize("pair", [("byte-level", "byte-level, small"), ("Unigram", "byte-level"), ("byte-level", "Unigram")])
def test_other_ids_give_the_same_classes(pair):
    found = []
    for seeds in ((None, None), (5, 6)):
        source, target = (KINDS[kind](seed=seed) for kind, seed in zip(pair, seeds, strict=True))
        found.append(sorted(map(str, ((sorted(a), sorted(b)) for a, b in members(classes_of(source, target), source, target)))))
    assert found[0] == found[1]


def test_a_number_counts_as_its_first_digit_for_a_tokenizer_that_cuts_digits():
    source, target = plain(["2", "20", "201", "a", "b", "ab"]), plain(["2", "0", "1", "a", "b", "ba"])
    found = members(classes_of(source, target), source, target)
    assert ({"2", "20", "201"}, {"2"}) in found and ({"b"}, {"b", "ba"}) in found and ({"a", "ab"}, {"a"}) in found
    assert ({"0"}, {"0"}) in found


def test_a_cut_goes_on_until_both_hold_it():
    """The target cuts "abcd" to "abc", which the source cuts to "ab", which both hold."""
    source = plain(["ab", "cd", "abcd"], [("a", "b"), ("c", "d"), ("ab", "cd")])
    target = plain(["ab", "abc", "d"])
    found = members(classes_of(source, target), source, target)
    assert ({"ab", "abcd"}, {"ab", "abc"}) in found


def test_what_ends_an_answer_is_one_class_where_it_has_other_names():
    source, target = byte_level(specials=("<unk>", "<pad>", "<s>", "<eot>")), byte_level()
    source.add_special_tokens({"additional_special_tokens": ["<|done|>", "</s>"]})
    source.chat_template = "{% for m in messages %}{{ m.content }}<|done|>{% endfor %}"
    found = members(classes_of(source, target), source, target)
    assert ({"<eot>", "<|done|>"}, {"</s>"}) in found
    assert ({"<s>"}, {"<s>"}) in found


def test_special_tokens_without_a_counterpart_are_the_last_class():
    source, target = byte_level(), byte_level(specials=("<UNK>", "<PAD>", "<s>", "</s>"))
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    classes = classes_of(source, target)
    assert members(classes, source, target)[-2:] == [({"<unk>", "<pad>", "<|turn|>"}, {"<UNK>", "<PAD>"}), (set(), set())]


@pytest.mark.parametrize("side", [0, 1])
def test_tokens_of_the_source_that_the_target_has_nothing_for_are_left_out(side):
    pair = [byte_level(), byte_level()]
    pair[side].add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    classes = classes_of(*pair)
    assert classes.count == len(pair[side]) - (side == 0)
    assert (classes.source[-1] == classes.count) == (side == 0) and classes.target[-1] == classes.count - 1


def test_markup_that_one_tokenizer_holds_whole_counts_as_its_beginning():
    source, target = byte_level(), byte_level(size=290)
    source.add_tokens([AddedToken("<tool_call>", normalized=False)])
    found = members(classes_of(source, target), source, target)
    assert any({"<", "<tool_call>"} <= ours and "<" in theirs for ours, theirs in found)


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
def test_whole_characters_count_as_their_first_byte_where_the_other_side_has_but_bytes(make):
    source, target = make(), byte_level(size=280)
    found = members(classes_of(source, target), source, target)
    assert any("東" in ours and "æ" in theirs for ours, theirs in found)


def test_padded_rows_have_no_class_and_tokens_beyond_a_head_are_left_out():
    tokenizer = byte_level()
    size = len(tokenizer)
    classes = classes_of(tokenizer, tokenizer, size + 64, size - 3)
    assert torch.equal(classes.source, torch.arange(size).clamp(max=size - 3))
    assert torch.equal(classes.target, torch.arange(size - 3)) and classes.count == size - 3
    moved = classes.to("cpu")
    assert isinstance(moved, PrefixClasses) and torch.equal(moved.source, classes.source)
