"""The embedded pair and its task."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_semalign import SemAlignConfig, SemAlignTrainer, load_transfer
from hf_semalign.cache.source import Source
from hf_semalign.errors import InputError
from hf_semalign.experiments.benchmarks.harness import evaluate_run
from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.symbols import SKILLS, SYMBOLS, build_tokenizer, make_records
from hf_semalign.models.loading import licence_of
from hf_semalign.models.names import PAIR_FOLDER, public_name, resolve_model


def test_skills_do_what_they_say():
    assert {skill: "".join(SYMBOLS[i] for i in apply([12, 10, 51, 11])) for skill, apply in SKILLS.items()} == {
        "copy": "caπb",
        "reverse": "bπac",
        "sort": "abcπ",
        "shift": "db0c",
    }


def test_records_are_distinct_repeatable_and_avoid_the_excluded():
    records = make_records(400, seed=3)
    prompts = {record["prompt"] for record in records}
    assert len(prompts) == 400
    assert records == make_records(400, seed=3)
    assert not prompts & {record["prompt"] for record in make_records(400, seed=3, exclude=prompts)}
    assert [record["skill"] for record in records[:5]] == ["copy", "reverse", "sort", "shift", "copy"]


def test_tokenizer_gives_one_token_a_word_and_decodes_back():
    tokenizer = build_tokenizer()
    ids = tokenizer("sort c a b =")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "sort", "c", "a", "b", "="]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sort c a b ="
    assert tokenizer.unk_token is None


@pytest.fixture(scope="module")
def pair():
    return {role: AutoModelForCausalLM.from_pretrained(resolve_model(f"embedded:{role}")) for role in ("source", "target")}


def test_pair_differs_in_depth_and_width_and_its_heads_have_full_rank(pair):
    shapes = {role: (model.config.num_hidden_layers, model.config.hidden_size) for role, model in pair.items()}
    assert shapes["source"][0] > shapes["target"][0]
    assert shapes["source"][1] > shapes["target"][1]
    for role, model in pair.items():
        assert model.lm_head.weight.shape[0] > shapes[role][1]
        assert model.lm_head.weight.detach().numpy().shape[0] == len(build_tokenizer())


def test_pair_is_small_and_its_tokenizer_is_the_tasks():
    assert sum(path.stat().st_size for path in PAIR_FOLDER.rglob("*")) < 5_000_000
    for role in ("source", "target"):
        assert AutoTokenizer.from_pretrained(PAIR_FOLDER / role).get_vocab() == build_tokenizer().get_vocab()


def test_source_masters_every_skill_and_the_target_is_visibly_worse(pair):
    records = make_records(400, seed=11)
    shares = {role: exact_match(model, build_tokenizer(), records) for role, model in pair.items()}
    assert min(shares["source"].values()) >= 0.99
    assert all(shares["target"][skill] <= 0.99 for skill in SKILLS)
    assert sum(shares["target"].values()) < 0.8 * sum(shares["source"].values())


def test_embedded_names_stand_wherever_a_model_is_named(tmp_path):
    rows = make_records(12, seed=1)
    args = SemAlignConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = SemAlignTrainer("embedded:target", "embedded:source", args, rows)
    trainer.train()
    trainer.save_model()
    assert (trainer.record()["source"], trainer.record()["target"]) == ("embedded:source", "embedded:target")
    assert load_transfer(tmp_path)[1]["target"] == "embedded:target"
    assert licence_of("embedded:target") == {"license": "apache-2.0"}
    assert Source("embedded:source").identity == Source(PAIR_FOLDER / "source").identity
    (tmp_path / "test.jsonl").write_text('{"question": "How many?", "answer": "#### 5"}')
    with pytest.raises(InputError, match="The model's context has 64 tokens"):  # so it was found, with its tokenizer
        evaluate_run("embedded:target", ["gsm8k"], files=tmp_path, output=tmp_path)


def test_names_for_records_hold_no_path(tmp_path):
    assert public_name(str(PAIR_FOLDER / "source")) == "embedded:source"
    assert public_name("org/model") == "org/model"
    (tmp_path / "model").mkdir()
    assert public_name(str(tmp_path / "model")) == "model"
    assert resolve_model("org/model") == "org/model"
    with pytest.raises(ValueError, match="No embedded model 'embedded:other'"):
        resolve_model("embedded:other")
