"""Analyses: recomposition against plain loops, CKA against Gram matrices over all positions, and the command."""

import json
import logging
import shutil
import weakref

import pytest
import torch
from conftest import batches_of, random_rows, tiny_llama
from reference import bases as reference_bases
from test_recipe import QUICKSTART, ROOT

from hf_semalign import SemanticMap
from hf_semalign.cli import main
from hf_semalign.experiments import analysis
from hf_semalign.experiments.analysis import (
    LinearCKA,
    layer_cka,
    layer_states,
    recomposition,
    recomposition_cosines,
    vocabulary_bases,
)
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.experiments.run import run_recipe
from hf_semalign.splits import valid_positions

ROWS = random_rows([(3, 5), (6, 2), (2, 7), (1, 1), (5, 4)])
KINDS = ("readout", "projection", "cosine")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states_by_row(model):
    """Outputs of all layers, one unpadded row at a time; the last layer's by a hook of its own."""
    parts = []
    for batch in batches_of(ROWS, 1):
        last = []
        handle = model.model.layers[-1].register_forward_hook(lambda module, args, output, last=last: last.append(output))
        with torch.no_grad():
            hidden = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
        handle.remove()
        outputs = torch.stack([*hidden[1:-1], last[0]])
        parts.append(outputs[:, valid_positions(batch["labels"])].double())
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_states_are_those_of_single_rows(size):
    model = tiny_llama(3, 16)
    found = torch.cat([layer_states(model, batch) for batch in batches_of(ROWS, size)], dim=1)
    torch.testing.assert_close(found, states_by_row(model), rtol=1e-5, atol=1e-5)
    assert found.shape == (3, 19, 16)
    batch = batches_of(ROWS, 5)[0]
    assert torch.equal(layer_states(model, batch, slice(1, 3)), layer_states(model, batch)[1:])


# Figure 2


def recomposed(kind, vectors, state):
    """One state over bases, a token at a time (equations 2 and 3 in one model)."""
    duals = reference_bases(vectors)
    total = torch.zeros_like(state)
    for vector, dual in zip(vectors, duals, strict=True):
        if kind == "readout":
            coefficient = dual.dot(state)
        elif kind == "projection":
            coefficient = vector.dot(state)
        else:
            coefficient = vector.dot(state) / (vector.norm() * state.norm())
        total = total + coefficient * vector
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_recomposition_is_the_sum_over_tokens(kind):
    vectors, states = randn(20, 6) * torch.linspace(0.1, 3, 6), randn(4, 6, seed=1)
    found = states @ recomposition(vectors, kind).T
    if kind == "cosine":
        found = found / states.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, torch.stack([recomposed(kind, vectors, state) for state in states]))


@pytest.mark.parametrize("kind", KINDS)
def test_output_side_recomposition_is_the_map_of_a_model_to_itself(kind):
    head = randn(20, 6) * torch.linspace(0.1, 3, 6)
    found = recomposition(reference_bases(head), kind)
    torch.testing.assert_close(found, SemanticMap.from_heads(head, head, kind=kind).matrix)


def test_readout_is_the_identity_of_any_bases_and_a_projector_without_full_rank():
    torch.testing.assert_close(recomposition(randn(20, 6), "readout"), torch.eye(6, dtype=torch.float64))
    flat = randn(20, 2) @ randn(2, 6, seed=1)
    projector = recomposition(flat, "readout")
    torch.testing.assert_close(projector @ projector, projector)
    assert projector.trace() == pytest.approx(2)


def test_tokens_without_a_vector_add_nothing():
    vectors = randn(20, 6)
    padded = torch.cat([vectors, torch.zeros(4, 6)])
    for kind in KINDS:
        torch.testing.assert_close(recomposition(padded, kind), recomposition(vectors, kind))


@pytest.mark.parametrize("tied", [False, True])
def test_cosines_are_the_means_over_valid_positions(tied):
    model = tiny_llama(2, 16, tie_word_embeddings=tied)
    found = recomposition_cosines(model, batches_of(ROWS, 2))
    assert (found["tied"], found["positions"]) == (tied, 19)
    bases = {
        "output": reference_bases(model.lm_head.weight.detach()),
        "input": model.model.embed_tokens.weight.detach().double(),
    }
    states = states_by_row(model)
    for kind in KINDS:
        for name, vectors in bases.items():
            for layer in range(2):
                pairs = [(state, recomposed(kind, vectors, state)) for state in states[layer]]
                cosines = [float(h.dot(again) / (h.norm() * again.norm())) for h, again in pairs]
                assert found["cosines"][kind][name]["layers"][layer] == pytest.approx(sum(cosines) / 19, abs=1e-5)
    assert (found["cosines"]["cosine"]["head"] == found["cosines"]["cosine"]["input"]) is tied
    for name in ("output", "head", "input", "random"):
        assert found["cosines"]["readout"][name]["layers"] == pytest.approx([1, 1])
        assert found["cosines"]["readout"][name]["random_states"] == pytest.approx(1)
    again, random = recomposition_cosines(model, batches_of(ROWS, 5)), found["cosines"]["cosine"]["random"]
    assert again["cosines"]["cosine"]["random"]["layers"] == pytest.approx(random["layers"], abs=1e-6)


def test_random_bases_have_the_lengths_of_the_output_side():
    bases = dict(vocabulary_bases(tiny_llama(2, 16)))
    torch.testing.assert_close(bases["random"].norm(dim=-1), bases["output"].norm(dim=-1))


def test_bases_are_made_one_at_a_time():
    """Each of them is gigabytes for a vocabulary of 150,000."""
    seen = []
    for _, bases in vocabulary_bases(tiny_llama(2, 16)):
        seen.append(weakref.ref(bases))
        del bases
        assert sum(one() is not None for one in seen) == 1
    assert len(seen) == 4


def test_random_bases_are_nearly_a_tight_frame(monkeypatch):
    """Under bases of one length any state gets ``1 / sqrt(1 + D / V)``, so long as it is none of them."""
    monkeypatch.setattr(analysis, "RANDOM_STATES", 97)
    model = tiny_llama(2, 16, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.linalg.qr(randn(97, 16))[0])
    found = recomposition_cosines(model, batches_of(ROWS, 5))["cosines"]["cosine"]["random"]
    assert [*found["layers"], found["random_states"]] == pytest.approx([(1 + 16 / 97) ** -0.5] * 3, abs=0.015)


def test_orthonormal_head_rebuilds_every_state():
    """Then its bases are its rows, and their sum of outer products is the identity."""
    model = tiny_llama(2, 16, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.linalg.qr(randn(97, 16))[0])
    cosines = recomposition_cosines(model, batches_of(ROWS, 5))["cosines"]["projection"]
    for name in ("output", "head", "input"):
        assert [*cosines[name]["layers"], cosines[name]["random_states"]] == pytest.approx([1, 1, 1])


# Figure 4


def naive_hsic(left, right):
    """Song et al. 2012, equation 5, with Gram matrices ``[N, N]``."""
    n, ones = len(left), torch.ones(len(left), dtype=torch.float64)
    k, m = left @ left.T, right @ right.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    sums = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + sums - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def naive_cka(left, right):
    return float(naive_hsic(left, right) / (naive_hsic(left, left) * naive_hsic(right, right)).sqrt())


def biased_cka(left, right):
    """Centred features, diagonal and all (Kornblith et al. 2019)."""
    x, y = left - left.mean(0), right - right.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def cka_of(left, right, size=None):
    found = LinearCKA()
    size = size or left.shape[1]
    for start in range(0, left.shape[1], size):
        found.update(left[:, start : start + size], right[:, start : start + size])
    return found.values()


@pytest.mark.parametrize("size", [1, 7, 40])
def test_streamed_cka_is_that_of_gram_matrices(size):
    """Also of features with a large mean and channels of very different sizes."""
    left = randn(3, 40, 6) * torch.logspace(-1, 2, 6) + 30
    right = torch.stack([left[0, :, :4] @ randn(4, 5, seed=1), randn(40, 5, seed=2)])
    found = cka_of(left, right, size)
    for a in range(3):
        for b in range(2):
            assert found[a, b].item() == pytest.approx(naive_cka(left[a], right[b]), abs=1e-6)


def test_independent_features_get_zero_where_the_biased_estimate_does_not():
    left, right = randn(30, 60, 40), randn(30, 60, 40, seed=1)
    values = cka_of(left, right)
    assert values.mean().abs() < 0.01
    assert biased_cka(left[0], right[0]) > 0.3


def test_what_cka_cannot_see_and_what_it_can():
    x, y = randn(1, 50, 6), randn(1, 50, 4, seed=1) + randn(1, 50, 6)[..., :4]
    rotation = torch.linalg.qr(randn(6, 6, seed=2))[0]
    assert cka_of(x, x).item() == pytest.approx(1)
    assert cka_of(7 * x @ rotation + 5, y).item() == pytest.approx(cka_of(x, y).item())
    assert abs(cka_of(x * torch.tensor([9.0, 1, 1, 1, 1, 1]), y).item() - cka_of(x, y).item()) > 0.1


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_positions(count):
    found = LinearCKA()
    if count:
        found.update(randn(1, count, 6), randn(1, count, 6))
    with pytest.raises(ValueError, match="at least four valid positions"):
        found.values()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "bytes_at_a_time"), [(2, 4e9), (5, 1)])
def test_layer_cka_of_a_pair(kind, size, bytes_at_a_time, monkeypatch):
    """Whatever the batches, and in groups of source layers where the moments of all would be too large."""
    monkeypatch.setattr(analysis, "MOMENTS", bytes_at_a_time)
    source, target = tiny_llama(3, 24), tiny_llama(2, 16, seed=1)
    semantic_map = SemanticMap.from_models(source, target, kind=kind)
    found = layer_cka(source, target, batches_of(ROWS, size), semantic_map)
    left, right = states_by_row(source), states_by_row(target)
    mapped = left @ semantic_map.matrix.T
    if kind == "cosine":
        mapped = mapped / left.norm(dim=-1, keepdim=True)
    assert found["positions"] == 19
    control = left @ randn(16, 24).T
    for name, features in (("unaligned", left), ("aligned", mapped), ("random_map", control)):
        expected = [[naive_cka(x, y) for y in right] for x in features]
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_model_is_like_itself_and_its_map_changes_nothing():
    model = tiny_llama(3, 16)
    found = layer_cka(model, model, batches_of(ROWS, 5), SemanticMap.from_models(model, model))
    assert [found["unaligned"][k][k] for k in range(3)] == pytest.approx([1, 1, 1])
    torch.testing.assert_close(torch.tensor(found["aligned"]), torch.tensor(found["unaligned"]))


# The command

SMALL = ["data.extract=4", "data.align=16", "data.eval=8", "baselines=[]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose source is a folder, which its record does not name."""
    folder = tmp_path_factory.mktemp("analysis")
    shutil.copytree(ROOT / "hf_semalign" / "data" / "pair" / "source", folder / "big")
    settings = [*SMALL, "training.max_steps=2", f"source={folder / 'big'}", f"output_dir={folder / 'run'}"]
    run_recipe(load_recipe(QUICKSTART, settings))
    return folder


def written(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["vectors", "cka", "pairing"])
def test_analysis_of_a_recipe(tmp_path, name, capsys):
    assert main(["analyze", name, str(QUICKSTART), *SMALL, f"output_dir={tmp_path}"]) == 0
    folder = tmp_path / "analysis"
    assert str(folder / f"{name}.png") in capsys.readouterr().out
    assert written(folder) == {f"{name}.{end}" for end in ("png", "svg", "json")}
    record = json.loads((folder / f"{name}.json").read_text())
    if name == "vectors":
        assert [len(record[role]["cosines"]["cosine"]["output"]["layers"]) for role in ("source", "target")] == [6, 4]
    elif name == "cka":
        assert [(len(record[key]), len(record[key][0])) for key in ("unaligned", "aligned")] == [(6, 4), (6, 4)]
        assert record["models"] == {"source": "embedded:source", "target": "embedded:target"}
    else:
        assert record["pairing"]["scores"] == record["attribution"]["values"]
        assert len(record["pairing"]["source_layers"]) == 4
        assert record["attribution"]["num_examples"] == 4


def test_pairing_of_a_run_is_its_record(run, tmp_path):
    assert main(["analyze", "pairing", str(run / "run"), "--output", str(tmp_path)]) == 0
    recorded = json.loads((run / "run" / "semalign.json").read_text())["pairing"]
    assert json.loads((tmp_path / "pairing.json").read_text()) == {"pairing": recorded}
    assert written(tmp_path) == {"pairing.png", "pairing.svg", "pairing.json"}


def test_pairing_of_a_run_cannot_be_changed(run, caplog):
    assert main(["analyze", "pairing", str(run / "run"), "training.pairing=last"]) == 2
    assert "['training.pairing=last'] cannot change" in caplog.text


def test_a_run_is_analysed_with_its_adapter(run, tmp_path, caplog):
    named = [f"source={run / 'big'}", "--output", str(tmp_path)]
    assert main(["analyze", "cka", str(run / "run"), *named]) == 0
    assert main(["analyze", "cka", str(QUICKSTART), *SMALL, "--output", str(tmp_path / "before")]) == 0
    assert "The eval split differs from the run's" not in caplog.text
    after, before = (json.loads((folder / "cka.json").read_text()) for folder in (tmp_path, tmp_path / "before"))
    assert (after["trained"], before["trained"]) == (True, False)
    assert after["eval"] == before["eval"]
    assert after["unaligned"] != before["unaligned"]
    assert str(run) not in (tmp_path / "cka.json").read_text()


def test_other_data_than_the_run_saw_are_noticed(run, tmp_path, caplog):
    named = [f"source={run / 'big'}", "data.seed=7", "--output", str(tmp_path)]
    assert main(["analyze", "vectors", str(run / "run"), *named]) == 0
    assert "The eval split differs from the run's" in caplog.text


def test_a_model_that_the_record_cannot_name(run, caplog):
    assert main(["analyze", "cka", str(run / "run")]) == 2
    assert "The source 'big' was not found: set source=" in caplog.text


@pytest.mark.parametrize("name", ["cka", "pairing"])
def test_a_model_that_is_not_there(tmp_path, name, caplog):
    assert main(["analyze", name, str(QUICKSTART), f"target={tmp_path / 'gone'}"]) == 2
    assert "gone' was not found: set target=" in caplog.text


def test_a_run_without_results_needs_its_recipe(run, tmp_path, caplog):
    shutil.copy(run / "run" / "semalign.json", tmp_path)
    assert main(["analyze", "vectors", str(tmp_path)]) == 2
    assert "has no results.json, so its task is unknown: pass the recipe" in caplog.text


@pytest.mark.parametrize(
    ("origin", "message"),
    [("nowhere.yaml", "No recipe 'nowhere.yaml'"), (".", r"has no semalign.json: it is not a run folder")],
)
def test_origins_that_are_neither(tmp_path, monkeypatch, caplog, origin, message):
    caplog.set_level(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "pairing", origin]) == 2
    assert message in caplog.text
