"""Semantic bases and maps: equal to pseudoinverses that are never built, cached safely, over the shared vocabulary."""

import json
import subprocess
import sys

import pytest
import reference
import torch
from conftest import batches_of, random_rows, tiny_llama, tiny_model, word_tokenizer
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast
from two_tokenizers import byte_level, sentencepiece_bpe, unigram, wordpiece

from hf_semalign.cache.signals import OnlineSignals, match_scales
from hf_semalign.method import semantic_map as semantics
from hf_semalign.method.pairing import pair_layers
from hf_semalign.method.semantic_map import KINDS, SemanticMap, semantic_bases
from hf_semalign.method.vocabularies import differing, rows_by_bytes, shared_token_ids
from hf_semalign.models.token_bytes import TokenBytes

VOCAB = 40


def head(width, condition=None, rank=None, seed=0, vocab=VOCAB):
    """A random head ``[V, D]``; with given condition number (singular values spaced evenly in logarithm) or rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    if condition is None and rank is None:
        return weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if condition is not None:
        values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), width, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    return left @ values.diag() @ right


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def states(width, seed=9):
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# The map from two heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(7, 4), (4, 7), (5, 5)], ids=str)
def test_map_equals_decomposition_and_recomposition_over_the_vocabulary(kind, widths):
    source, target = head(widths[0]), head(widths[1], seed=1)
    hidden = states(widths[0])
    mapped = SemanticMap.from_heads(source, target, kind=kind)(hidden)
    expected = torch.stack([reference.map_state(kind, source, target, h) for h in hidden.flatten(0, 1)]).view(2, 3, -1)
    torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, VOCAB])
def test_chunks_of_the_vocabulary_change_nothing(kind, chunk, monkeypatch):
    source, target = head(7), head(4, seed=1)
    whole = SemanticMap.from_heads(source, target, kind=kind).matrix
    monkeypatch.setattr(semantics, "CHUNK", chunk)
    monkeypatch.setattr(semantics, "BLOCK", 3)
    torch.testing.assert_close(SemanticMap.from_heads(source, target, kind=kind).matrix, whole, rtol=1e-10, atol=1e-13)


def test_readout_is_the_pseudoinverse_of_the_target_head_times_the_source_head():
    source, target = head(7), head(4, seed=1)
    matrix = SemanticMap.from_heads(source, target).matrix
    torch.testing.assert_close(matrix, torch.linalg.pinv(target) @ source, rtol=1e-10, atol=1e-13)


def test_readout_gives_the_target_state_whose_logits_are_closest():
    source, target = head(7), head(4, seed=1)
    hidden = states(7)
    residual = SemanticMap.from_heads(source, target)(hidden) @ target.T - hidden @ source.T
    torch.testing.assert_close(residual @ target, torch.zeros(2, 3, 4, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("condition", [None, 1e4])
def test_readout_is_the_identity_when_source_is_target(condition):
    weight = head(6, condition)
    torch.testing.assert_close(SemanticMap.from_heads(weight, weight).matrix, torch.eye(6).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_ill_conditioned_heads_in_float32_are_solved_in_float64(kind, caplog):
    source, target = head(7, 1e4).float(), head(4, 1e4, seed=1).float()
    hidden = states(7)
    mapped = SemanticMap.from_heads(source, target, kind=kind)(hidden)
    expected = torch.stack([reference.map_state(kind, source, target, h) for h in hidden.flatten(0, 1)]).view(2, 3, -1)
    torch.testing.assert_close(mapped, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert not warnings_in(caplog)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_heads_warn_and_use_the_pseudoinverse(kind, caplog):
    source, target = head(7, rank=5), head(4, rank=3, seed=1)
    hidden = states(7)
    mapped = SemanticMap.from_heads(source, target, kind=kind)(hidden)
    expected = torch.stack([reference.map_state(kind, source, target, h) for h in hidden.flatten(0, 1)]).view(2, 3, -1)
    torch.testing.assert_close(mapped, expected, rtol=1e-7, atol=1e-9)
    messages = warnings_in(caplog)
    assert "width 4 has rank 3" in messages[0]
    assert (len(messages) == 1) if kind == "readout" else ("width 7 has rank 5" in messages[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", [1.0, 1e2, 600.0, 1e4, 1e6])
def test_error_does_not_grow_with_the_condition_number_squared(kind, condition, monkeypatch):
    monkeypatch.setattr(semantics, "CHUNK", 7)
    monkeypatch.setattr(semantics, "BLOCK", 4)
    source, target = head(9, condition, vocab=61), head(6, condition, seed=1, vocab=61)
    expected = reference.exact_map(kind, (source, torch.eye(9)), (target, torch.eye(6)))
    assert relative_error(SemanticMap.from_heads(source, target, kind=kind).matrix, expected) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_precision_are_taken_as_they_are(kind, dtype):
    """Condition number 1e4, by columns of different length: what the rounding to 16 bits leaves alone."""
    heads = [(head(w, seed=w) * torch.logspace(2, -2, w, dtype=torch.float64)).to(dtype) for w in (9, 6)]
    expected = reference.exact_map(kind, *((weight, torch.eye(weight.shape[1])) for weight in heads))
    assert all(torch.linalg.cond(weight.double()) > 8e3 for weight in heads)
    assert relative_error(SemanticMap.from_heads(*heads, kind=kind).matrix, expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_heads_to_all_digits(kind):
    generator = torch.Generator().manual_seed(0)
    factors = [
        [torch.randint(-9, 10, shape, generator=generator) for shape in ((VOCAB, rank), (rank, width))]
        for rank, width in ((5, 7), (3, 4))
    ]
    heads = [(left @ right).double() for left, right in factors]
    assert relative_error(SemanticMap.from_heads(*heads, kind=kind).matrix, reference.exact_map(kind, *factors)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_wide_heads_equal_pseudoinverses(kind):
    source, target = head(96, 1e4, vocab=2500), head(64, 1e4, seed=1, vocab=2500)
    bases = torch.linalg.pinv(source).T
    decompose = {"readout": source, "projection": bases, "cosine": bases / bases.norm(dim=1, keepdim=True)}[kind]
    expected = torch.linalg.pinv(target) @ decompose
    assert relative_error(SemanticMap.from_heads(source, target, kind=kind).matrix, expected) < 1e-10


@pytest.mark.parametrize(("share", "taken"), [(0.99, 1), (1.01, 2)])
def test_a_second_gram_matrix_is_taken_from_the_tolerance_on(share, taken, monkeypatch):
    grams = []
    gram = semantics._gram
    monkeypatch.setattr(semantics, "_gram", lambda rows: grams.append(rows) or gram(rows))
    SemanticMap.from_heads(head(7), head(4, share * (semantics.TOLERANCE / semantics.EPSILON) ** 0.5))
    assert len(grams) == taken


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_square_matrices_and_chunks():
    """The greediest kind, of ill-conditioned heads in bfloat16, whose bases in float64 would take 143 MB."""
    code = """
import torch
from hf_semalign.method.semantic_map import SemanticMap
torch.set_num_threads(1)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
heads = [torch.empty(20_000, width, dtype=torch.bfloat16).normal_() for width in (512, 384)]
for head in heads:
    head[:, 0] *= 4096
SemanticMap.from_heads(*(head[:64, :8] for head in heads), kind="cosine")  # loads the libraries
before = peak()
assert SemanticMap.from_heads(*heads, kind="cosine").condition_number > 4000
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 100


@pytest.mark.parametrize(("condition", "tolerance"), [(1.0, 1e-6), (37.0, 1e-6), (1e4, 1e-6), (1e6, 1e-3)])
def test_condition_number_is_that_of_the_target_head(condition, tolerance):
    target = head(6, condition)
    found = SemanticMap.from_heads(head(3, seed=1), target).condition_number
    assert found == pytest.approx(torch.linalg.cond(target).item(), rel=tolerance)


def test_a_zero_row_is_a_token_without_semantics():
    source, target = head(5), head(4, seed=1)
    source[3] = 0
    rest = torch.arange(VOCAB) != 3
    for kind in KINDS:
        matrix = SemanticMap.from_heads(source, target, kind=kind).matrix
        assert matrix.isfinite().all()
    # The Gram matrix of the target still counts the row, and the cross-Gram gets nothing from it.
    expected = torch.linalg.pinv(target)[:, rest] @ source[rest]
    torch.testing.assert_close(SemanticMap.from_heads(source, target).matrix, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 7)], ids=str)
def test_map_keeps_leading_dimensions_and_dtype(shape, dtype):
    semantic_map = SemanticMap.from_heads(head(7), head(4, seed=1))
    mapped = semantic_map(torch.ones(shape, dtype=dtype))
    assert mapped.shape == (*shape[:-1], 4) and mapped.dtype == dtype


def test_map_computes_in_the_precision_of_its_matrix():
    semantic_map = SemanticMap.from_heads(head(7), head(4, seed=1))
    hidden = states(7).bfloat16()
    expected = (hidden.double() @ semantic_map.matrix.T).bfloat16()
    assert semantic_map.matrix.dtype == torch.float64 and torch.equal(semantic_map(hidden), expected)
    assert semantic_map.to(torch.float32).matrix.dtype == torch.float32


def test_cosine_ignores_the_length_of_a_state_and_readout_does_not():
    hidden = states(7)
    cosine, readout = (SemanticMap.from_heads(head(7), head(4, seed=1), kind=kind) for kind in ("cosine", "readout"))
    torch.testing.assert_close(cosine(5 * hidden), cosine(hidden))
    torch.testing.assert_close(readout(5 * hidden), 5 * readout(hidden))


@pytest.mark.parametrize(
    "kind",
    [
        "readout",
        "projection",
        "cosine",
    ],
)
def test_map_trains_nothing_even_when_the_heads_do(kind):
    semantic_map = SemanticMap.from_heads(nn.Parameter(head(7)), nn.Parameter(head(4, seed=1)), kind=kind)
    assert not list(semantic_map.parameters()) and list(semantic_map.state_dict()) == ["matrix"]
    assert not semantic_map.matrix.requires_grad


def test_gradients_pass_through_the_map():
    semantic_map = SemanticMap.from_heads(head(7), head(4, seed=1))
    hidden = states(7).requires_grad_()
    semantic_map(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad[0, 0], semantic_map.matrix.sum(0))


def test_unusable_heads_are_refused():
    with pytest.raises(ValueError, match=r"map_kind is 'linear'.*'readout'"):
        SemanticMap.from_heads(head(4), head(4), kind="linear")
    with pytest.raises(ValueError, match=r"39 and 40 rows.*from_models"):
        SemanticMap.from_heads(head(4)[:39], head(4))
    with pytest.raises(ValueError, match="7 and 8 rows"):
        SemanticMap.from_heads(head(4), head(4), rows=(torch.arange(7), torch.arange(8)))


# Bases


@pytest.mark.parametrize("options", [{}, {"condition": 1e4}, {"rank": 4}], ids=str)
def test_semantic_bases_are_the_transposed_pseudoinverse(options):
    weight = head(6, **options)
    bases = semantic_bases(weight)
    assert bases.shape == (VOCAB, 6) and bases.dtype == torch.float64
    torch.testing.assert_close(bases, reference.bases(weight), rtol=1e-6, atol=1e-6 * bases.abs().max().item())


# Models, files


@pytest.fixture
def models():
    return tiny_llama(2, 16, vocab=VOCAB, seed=1), tiny_llama(1, 8, vocab=VOCAB, seed=2)


@pytest.fixture
def builds(monkeypatch):
    """The maps that are built and not read, counted by the pseudoinverse that each takes of the target's head."""
    widths = []
    pseudoinverse = semantics._pseudoinverse

    def counted(rows):
        widths.append(rows.rank)
        return pseudoinverse(rows)

    monkeypatch.setattr(semantics, "_pseudoinverse", counted)
    return widths


@pytest.mark.parametrize("kind", KINDS)
def test_from_models_is_from_heads(models, kind):
    source, target = models
    built = SemanticMap.from_models(source, target, kind=kind)
    expected = SemanticMap.from_heads(source.lm_head.weight.detach(), target.lm_head.weight.detach(), kind=kind)
    assert torch.equal(built.matrix, expected.matrix) and built.matrix.shape == (8, 16)
    assert (built.kind, built.shared_tokens, built.fingerprint) == (kind, VOCAB, expected.fingerprint)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param((CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}), id="Cohere"),
        pytest.param((GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}), id="Granite"),
    ],
)
def test_logit_scales_fold_into_the_head(family):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    source = tiny_model(*family[:2], **settings, **family[2])
    target = tiny_llama(1, 8, vocab=VOCAB)
    built = SemanticMap.from_models(source, target)
    expected = torch.linalg.pinv(target.lm_head.weight.detach().double()) @ source.lm_head.weight.detach().double() / 4
    torch.testing.assert_close(built.matrix, expected, rtol=1e-9, atol=1e-12)


def test_from_models_uses_only_shared_rows():
    words = [f"w{index}" for index in range(VOCAB - 3)]
    tokenizer = word_tokenizer(words)
    source, target = tiny_llama(1, 16, vocab=VOCAB + 24, seed=1), tiny_llama(1, 8, vocab=VOCAB + 8, seed=2)
    built = SemanticMap.from_models(source, target, tokenizer, tokenizer)
    expected = SemanticMap.from_heads(source.lm_head.weight.detach()[:VOCAB], target.lm_head.weight.detach()[:VOCAB])
    assert built.shared_tokens == VOCAB
    torch.testing.assert_close(built.matrix, expected.matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(tmp_path, kind):
    saved = SemanticMap.from_heads(head(7), head(4, seed=1), kind=kind)
    saved.save(tmp_path / "new" / "map.safetensors")
    loaded = SemanticMap.load(tmp_path / "new" / "map.safetensors")
    assert torch.equal(loaded.matrix, saved.matrix)
    for name in ("kind", "shared_tokens", "condition_number", "fingerprint"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert torch.equal(loaded(states(7)), saved(states(7)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.safetensors"]


def test_a_cache_that_is_not_there_yet_is_no_damage(models, tmp_path, caplog):
    SemanticMap.from_models(*models, cache=tmp_path / "map.safetensors")
    assert not warnings_in(caplog)


def test_cache_is_used_while_the_heads_are_the_same(models, builds, tmp_path):
    first = SemanticMap.from_models(*models, cache=tmp_path / "map.safetensors")
    again = SemanticMap.from_models(*models, cache=tmp_path / "map.safetensors")
    assert len(builds) == 1 and torch.equal(again.matrix, first.matrix)


@pytest.mark.parametrize("changed", ["source", "target", "kind", "dtype", "rows"])
def test_cache_is_rebuilt_when_something_changes(models, builds, tmp_path, changed):
    source, target = models
    cache = tmp_path / "map.safetensors"
    stale = SemanticMap.from_models(source, target, cache=cache)
    options, tokenizers = {}, ()
    if changed == "source":
        source.lm_head.weight.data[5, 2] += 1e-3
    elif changed == "target":
        target.lm_head.weight.data[5, 2] += 1e-3
    elif changed == "kind":
        options["kind"] = "cosine"
    elif changed == "dtype":
        source.to(torch.bfloat16)
    else:
        tokenizers = (word_tokenizer([f"w{index}" for index in range(VOCAB - 4)]),) * 2
    rebuilt = SemanticMap.from_models(source, target, *tokenizers, cache=cache, **options)
    fresh = SemanticMap.from_models(source, target, *tokenizers, **options)
    assert len(builds) == (5 if changed == "kind" else 3)  # cosine takes the source's as well
    assert torch.equal(rebuilt.matrix, fresh.matrix) and not torch.equal(rebuilt.matrix, stale.matrix)
    assert SemanticMap.load(cache).fingerprint == fresh.fingerprint != stale.fingerprint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def strip_record(path):
    save_file({"matrix": torch.zeros(8, 16)}, path)


def foreign_record(path):
    save_file({"matrix": torch.zeros(8, 16)}, path, metadata={"semantic_map": json.dumps({"kind": "readout"})})


def other_record(path):
    save_file({"matrix": torch.zeros(8, 16)}, path, metadata={"format": "pt"})


def no_matrix(path):
    save_file({"other": torch.zeros(8, 16)}, path, metadata={"semantic_map": "{}"})


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        strip_record,
        foreign_record,
        other_record,
        no_matrix,
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"no safetensors " * 50), id="garbage"),
    ],
)
def test_a_damaged_cache_is_reported_and_rebuilt(models, builds, tmp_path, caplog, damage):
    cache = tmp_path / "map.safetensors"
    first = SemanticMap.from_models(*models, cache=cache)
    damage(cache)
    with pytest.raises(ValueError, match=r"map.safetensors is damaged or not a semantic map"):
        SemanticMap.load(cache)
    rebuilt = SemanticMap.from_models(*models, cache=cache)
    assert len(builds) == 2 and torch.equal(rebuilt.matrix, first.matrix)
    assert any("map.safetensors" in message and "will be rebuilt" in message for message in warnings_in(caplog))
    SemanticMap.from_models(*models, cache=cache)
    assert len(builds) == 2


# Shared vocabulary


def test_one_tokenizer_shares_all_its_tokens_and_no_padded_rows():
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    for rows in ((7, 7), (16, 8), (8, 16)):
        assert shared_token_ids(tokenizer, tokenizer, *rows).tolist() == list(range(7))


def test_without_tokenizers_the_heads_must_have_the_same_rows():
    tokenizer = word_tokenizer(["a", "b"])
    assert shared_token_ids(None, None, 5, 5).tolist() == list(range(5))
    for tokenizers in ((None, None), (tokenizer, None), (None, tokenizer)):
        with pytest.raises(ValueError, match=r"5 \(source\) and 6 \(target\) rows: pass both tokenizers"):
            shared_token_ids(*tokenizers, 5, 6)


@pytest.mark.parametrize("side", [0, 1])
def test_added_tokens_of_one_side_drop_out(side):
    words = [f"w{index}" for index in range(20)]
    tokenizers = [word_tokenizer(words), word_tokenizer(words)]
    tokenizers[side].add_tokens(["<extra>"])
    rows = [23, 23]
    rows[side] = 24
    assert shared_token_ids(*tokenizers, *rows).tolist() == list(range(23))


def test_tokens_beyond_the_rows_of_a_head_drop_out():
    tokenizer = word_tokenizer([f"w{index}" for index in range(20)])
    assert shared_token_ids(tokenizer, tokenizer, 23, 21).tolist() == list(range(21))


def test_unrelated_tokenizers_are_refused_with_the_numbers():
    source, target = word_tokenizer(["a", "b", "c", "d", "e"]), word_tokenizer(["x", "y", "z"])
    with pytest.raises(ValueError, match=r"share 3 tokens of 8 \(source\) and 6 \(target\), 0 of them under different ids"):
        shared_token_ids(source, target, 8, 6)


def test_one_vocabulary_that_cuts_text_differently_is_refused_with_the_place():
    """As of two releases of a tokenizer with other merges: the tokens are the same, the ids of a text are not."""
    letters = sorted(set("The 3 foxes'"))
    vocabulary = {token: index for index, token in enumerate(["<unk>", *letters, "Th", "he"])}
    made = []
    for merges in ([("T", "h"), ("h", "e")], [("h", "e"), ("T", "h")]):
        tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>"))
        made.append(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    rows = len(vocabulary)
    parting = r"differ at token 0 of \"The 3 foxes.* the source has \['Th', 'e', ' '\], the target \['T', 'he', ' '\]"
    with pytest.raises(ValueError, match=rf"share {rows} tokens of {rows} .* {parting}"):
        shared_token_ids(*made, rows, rows)
    assert len(shared_token_ids(made[0], made[0], rows, rows)) == rows


def test_the_same_tokens_under_other_ids_are_refused_with_their_number():
    words = [f"w{index}" for index in range(20)]
    with pytest.raises(ValueError, match=r"share 23 tokens of 23 \(source\) and 23 \(target\), 20 of them under different ids"):
        shared_token_ids(word_tokenizer(words), word_tokenizer(words[::-1]), 23, 23)


# Two tokenizers


def matched(source, target, width=4):
    tables = TokenBytes.of(source), TokenBytes.of(target)
    return rows_by_bytes(*tables, *(len(table.spelled) for table in tables), width=width), tables


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, unigram])
def test_rows_are_matched_by_the_bytes_of_their_tokens(make):
    source, target = make(seed=1), byte_level(size=300, seed=2)
    (ours, theirs), tables = matched(source, target)
    pairs = [[table.spelled[token] for token in ids.tolist()] for table, ids in zip(tables, (ours, theirs), strict=True)]
    expected = set(tables[0].spelled) & set(tables[1].spelled) - {None}
    assert pairs[0] == pairs[1] and set(pairs[0]) == expected and len(pairs[0]) == len(expected) > 40
    assert (theirs.diff() > 0).all()


def test_rows_of_one_tokenizer_are_all_but_its_special_tokens():
    tokenizer = byte_level()
    (ours, theirs), tables = matched(tokenizer, tokenizer)
    assert torch.equal(ours, theirs) and len(ours) == len(tokenizer) - 4 and None not in {tables[0].spelled[t] for t in ours}


def test_bytes_that_two_tokens_of_one_side_spell_are_left_out():
    """As of the runs of spaces that GPT-NeoX adds to those that it has."""
    source, target = byte_level(), byte_level()
    (ours, _), tables = matched(source, target)
    run = next(text for text in tables[0].spelled if text and text.startswith(b"  "))
    assert run in {tables[0].spelled[token] for token in ours}
    source.add_tokens([AddedToken(run.decode(), normalized=False)])
    (fewer, _), tables = matched(source, target)
    assert tables[0].spelled.count(run) == 2 and run not in {tables[0].spelled[token] for token in fewer}
    assert len(fewer) == len(ours) - 1


def test_rows_beyond_a_head_are_not_matched():
    tables = [TokenBytes.of(byte_level(seed=seed)) for seed in (1, 2)]
    ours, theirs = rows_by_bytes(*tables, 90, 350, width=1)
    assert ours.max() < 90 and 80 < theirs.max() < 350


def test_too_few_shared_tokens_for_the_targets_width_are_refused_with_the_number():
    with pytest.raises(ValueError, match=r"\d{3} tokens .*, of 400 \(source\) .* needs 2048, 4 for each of the target's 512"):
        matched(byte_level(), byte_level(size=300), width=512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_map_over_matched_rows_takes_their_mean_off_both_heads(kind, chunk, monkeypatch):
    monkeypatch.setattr(semantics, "CHUNK", chunk)
    source, target = head(7, vocab=61) + 3, head(4, seed=1, vocab=50) - torch.arange(4)
    rows = torch.randperm(61)[:40], torch.randperm(50)[:40]
    found = SemanticMap.from_heads(source, target, rows=rows, kind=kind)
    centred = [weight[ids] - weight[ids].mean(0) for weight, ids in zip((source, target), rows, strict=True)]
    expected = SemanticMap.from_heads(*centred, kind=kind)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-9, atol=1e-12)
    assert found.shared_tokens == 40 and found.condition_number == pytest.approx(expected.condition_number)
    shifted = SemanticMap.from_heads(source + torch.arange(7), target - 2, rows=rows, kind=kind)
    torch.testing.assert_close(shifted.matrix, found.matrix, rtol=1e-8, atol=1e-11)


def test_map_over_ill_conditioned_matched_rows_is_as_exact():
    source, target = head(7, 1e4, vocab=61), head(4, 1e6, seed=1, vocab=61)
    rows = torch.randperm(61), torch.randperm(61)
    centred = [weight[ids] - weight[ids].mean(0) for weight, ids in zip((source, target), rows, strict=True)]
    expected = torch.linalg.pinv(centred[1]) @ centred[0]
    assert relative_error(SemanticMap.from_heads(source, target, rows=rows).matrix, expected) < 1e-9


def test_map_of_two_tokenizers_is_of_their_matched_rows_whatever_the_ids(tmp_path, builds):
    found = []
    for seed in (None, 5):
        source_tokenizer, target_tokenizer = sentencepiece_bpe(seed=seed), byte_level(size=300, seed=seed and seed + 1)
        names = [sorted(tokenizer.get_vocab()) for tokenizer in (source_tokenizer, target_tokenizer)]
        source, target = tiny_llama(1, 16, vocab=len(names[0]) + 8), tiny_llama(1, 8, vocab=len(names[1]), seed=1)
        for model, known, tokenizer in zip((source, target), names, (source_tokenizer, target_tokenizer), strict=True):
            weights = torch.randn(len(known), model.config.hidden_size, generator=torch.Generator().manual_seed(len(known)))
            model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(known)] = weights
        cache = tmp_path / "map.safetensors"
        found.append(SemanticMap.from_models(source, target, source_tokenizer, target_tokenizer, cache=cache))
        again = SemanticMap.from_models(source, target, source_tokenizer, target_tokenizer, cache=cache)
        assert torch.equal(again.matrix, found[-1].matrix) and again.fingerprint == found[-1].fingerprint
    torch.testing.assert_close(found[0].matrix, found[1].matrix, rtol=1e-9, atol=1e-12)
    assert len(builds) == 2 and found[0].fingerprint != found[1].fingerprint and 200 < found[0].shared_tokens < 300


def test_models_of_two_tokenizers_that_cannot_be_matched_are_refused():
    source, target = tiny_llama(1, 16, vocab=600), tiny_llama(1, 256, vocab=600)
    with pytest.raises(ValueError, match="spell the same bytes"):
        SemanticMap.from_models(source, target, byte_level(), byte_level(size=300))
    with pytest.raises(ValueError, match="is a WordPiece"):
        SemanticMap.from_models(source, target, byte_level(), wordpiece())


def test_what_tells_two_tokenizers_apart_is_said():
    one, other = byte_level(), byte_level()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    assert differing(one, other) is None
    assert "of them under different ids" in differing(one, byte_level(seed=1))


# Scales


def layer_outputs(model, row):
    """Outputs of the decoder layers for one unpadded row at its valid positions, by plain hooks, ``[L, N, D]``."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1])) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"]]))
    for hook in hooks:
        hook.remove()
    valid = torch.tensor(row["labels"][1:]) != -100
    return torch.stack([output[0, :-1][valid] for output in outputs])


@pytest.mark.parametrize("strategy", ["last", [1, 1]], ids=["distinct layers", "a repeated layer"])
@pytest.mark.parametrize("size", [1, 3])
def test_matched_scales_give_the_target_layers_mean_norms(strategy, size):
    source, target = tiny_llama(3, 16, seed=1), tiny_llama(2, 8, seed=2, attention_dropout=0.5)
    pairing, rows = pair_layers(3, 2, strategy), random_rows([(4, 2), (2, 6), (7, 1)])
    semantic_map = SemanticMap.from_models(source, target)
    target.train()
    scales = match_scales(OnlineSignals(source, pairing, semantic_map), target, batches_of(rows, size))
    assert target.training and len(scales) == 2
    target.eval()
    theirs = torch.cat([layer_outputs(source, row) for row in rows], dim=1)
    ours = torch.cat([layer_outputs(target, row) for row in rows], dim=1)
    for k, layer in enumerate(pairing.source_layers):
        mapped = scales[k] * semantic_map(theirs[layer]).norm(dim=-1).mean()
        assert mapped.item() == pytest.approx(ours[k].norm(dim=-1).mean().item(), rel=1e-5)
        assert abs(scales[k] - 1) > 0.01
