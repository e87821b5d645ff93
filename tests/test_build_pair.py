"""The script that made the embedded pair still makes it."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.recipe import load_recipe
from hf_semalign.experiments.symbols import build_tokenizer
from hf_semalign.models.names import PAIR_FOLDER

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"


@pytest.mark.slow
def test_target_is_built_again_as_it_was_shipped(tmp_path, monkeypatch):
    """Bit by bit on one machine; on another, rounding moves the skills a little."""
    monkeypatch.syspath_prepend(QUICKSTART)
    monkeypatch.delitem(sys.modules, "build_pair", raising=False)
    import build_pair

    shares = build_pair.build("target", tmp_path)
    shipped = AutoModelForCausalLM.from_pretrained(PAIR_FOLDER / "target")
    expected = exact_match(shipped, build_tokenizer(), load_recipe(QUICKSTART / "semalign.yaml").data.load().eval)
    assert shares == pytest.approx(expected, abs=0.15)
    built = load_file(tmp_path / "target" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in built.items()} == {
        name: tensor.shape for name, tensor in load_file(PAIR_FOLDER / "target" / "model.safetensors").items()
    }
