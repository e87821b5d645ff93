"""Scores of a source that is held one layer at a time: those of the whole source, and computed once."""

import pytest
import torch
from conftest import batches_of, random_rows, tiny_llama

from hf_semalign.cache.scores import attribute_streamed, layer_scores
from hf_semalign.cache.source import Source
from hf_semalign.method.attribution import attribute_layers
from hf_semalign.splits import Collator, encode

COLLATE = Collator(pad_token_id=0)


@pytest.fixture
def extract():
    return encode(random_rows([(3 + i % 3, 2 + i % 4) for i in range(6)]), None, split="extract")


@pytest.mark.parametrize("made", ["in memory", "folder"])
@pytest.mark.parametrize("depth", [2, 5])
def test_streamed_scores_equal_those_of_the_whole_source(extract, tmp_path, made, depth):
    model = tiny_llama(depth, 24, seed=3)
    model.save_pretrained(tmp_path / "source")
    source = Source(str(tmp_path / "source") if made == "folder" else model)
    streamed = attribute_streamed(source, extract, COLLATE, tmp_path, progress=False)
    whole = attribute_layers(model, batches_of(list(extract), 2))
    assert streamed.values == pytest.approx(whole.values, rel=1e-4, abs=1e-7)
    assert streamed.deviations == pytest.approx(whole.deviations, rel=1e-3, abs=1e-7)
    assert (streamed.num_examples, streamed.aggregate) == (6, "dot")
    assert not list(tmp_path.rglob("hidden-*"))
    assert source._model is (None if made == "folder" else model)


@pytest.mark.parametrize("stream", [False, True])
def test_scores_are_kept_and_a_damaged_record_is_made_again(extract, tmp_path, stream, caplog):
    tiny_llama(3, 24, seed=3).save_pretrained(tmp_path / "source")

    def scores():
        source = Source(str(tmp_path / "source"))
        return layer_scores(source, extract, COLLATE, tmp_path, stream=stream, progress=False), source

    first, _ = scores()
    (path,) = tmp_path.rglob("scores-*.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "_need_weights", lambda self: pytest.fail("the source was loaded"))
        assert scores()[0] == first
    path.write_text(path.read_text().replace("0.", "1.", 1))
    again, _ = scores()
    assert again.values == pytest.approx(first.values)
    assert f"{path.name} is damaged" in caplog.text


def test_scores_of_other_data_or_precision_are_others(extract, tmp_path):
    source = Source(tiny_llama(3, 24, seed=3))
    layer_scores(source, extract, COLLATE, tmp_path, progress=False)
    layer_scores(source, extract.select(range(3)), COLLATE, tmp_path, progress=False)
    layer_scores(source, extract, COLLATE, tmp_path, precision="bf16", progress=False)
    assert len(list(tmp_path.rglob("scores-*.json"))) == 3
    assert torch.is_grad_enabled()
