"""What rows share with test rows, by hand and against a count of all pairs; packed files."""

import gzip
import random

import pytest

from hf_semalign.experiments.rows import GSM8K, HUMANEVAL, MBPP, MMLU, Item, overlap, read_json_lines, same_questions

WORDS = [f"word{number}" for number in range(40)]


def text(*numbers):
    return " ".join(WORDS[number] for number in numbers)


def item(name, words, question=None):
    return Item(name, question or f"question {name}", words)


def test_thirteen_words_in_a_row_by_hand():
    test = item("t", text(*range(20)))
    twelve = item("a", text(*range(12), 30))
    thirteen = item("b", f"{text(30, 31)}, {text(*range(13)).upper()}!")  # 3 of its 13-grams, of which one is in the test row
    whole = item("c", text(*range(20)))
    short = item("d", text(*range(12)))
    found = overlap([twelve, thirteen, whole, short], [item("other", text(*range(20, 40))), test])
    assert found.share == 2 / 4
    assert found.worst == [("c", "t", 1.0), ("b", "t", 1 / 3)]
    assert (found.rows, found.test_rows, found.exact) == (4, 2, [])


def test_the_same_question_whatever_its_spelling():
    items = [item(1, "", "Is  IT\nso?"), item(2, "", "Is it?"), item(3, "", "\uff29s it so?")]
    tests = [item("a", "", "is it so?"), item("b", "", "is it so?")]
    assert same_questions(items, tests) == {1: "a", 3: "a"}
    assert overlap(items, tests).exact == [(1, "a"), (3, "a")]


def test_shares_are_those_of_comparing_all_pairs():
    draw = random.Random(0)
    texts = [[draw.randrange(2) for _ in range(draw.randrange(5, 60))] for _ in range(60)]
    items = [item(number, text(*words)) for number, words in enumerate(texts)]
    rows, tests = items[:40], items[40:]

    def grams(words):
        return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}

    in_tests = set().union(*(grams(words) for words in texts[40:]))
    shares = {
        number: len(grams(words) & in_tests) / len(grams(words)) for number, words in enumerate(texts[:40]) if grams(words)
    }
    found = overlap(rows, tests)
    assert found.share == sum(share > 0 for share in shares.values()) / 40
    assert [share for *_, share in found.worst] == sorted((share for share in shares.values() if share), reverse=True)[:5]
    for row, test, share in found.worst:
        assert share == shares[row] and grams(texts[row]) & grams(texts[test])


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="Got 1 rows and 0 test rows"):
        overlap([item(1, "a")], [])


def test_what_a_row_asks():
    assert GSM8K.item({"task_id": 3, "question": "Q?", "answer": "A #### 1"}) == Item(3, "Q?", "Q?\nA #### 1")
    assert MMLU.item({"task_id": 4, "question": "Q?", "choices": ["a", "b", "c", "d"]}).question == "Q?\na\nb\nc\nd"
    assert MBPP.item({"task_id": 5, "text": "T", "code": "C", "test_list": []}) == Item(5, "T", "T\nC")
    row = {"task_id": "HumanEval/1", "prompt": "P", "canonical_solution": "S"}
    assert HUMANEVAL.item(row) == Item("HumanEval/1", "P", "P\nS")


def test_packed_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    for content in (b"", b'{"a": 1}\n', gzip.compress(b'{"a": 1}\n' * 999)[:-9], gzip.compress(b"\xff\xfe")):
        path.write_bytes(content)
        if content:
            with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
                read_json_lines(path)
