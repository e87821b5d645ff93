"""The model card: metadata key by key, numbers, escaping, no path, limits that follow the numbers, no empty section."""

import copy
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, SchedulerType

from hf_semalign.experiments import symbols
from hf_semalign.hub.card import benchmark_entries, render_card, restriction
from hf_semalign.models import names

TAGS = ["lora", "transformers", "hf-semalign", "knowledge-transfer"]
LOCAL = ["embedded:target", "target", "/home/zoe/models/target", "./target", "~/zoe/x/target/", r"C:\Users\zoe\target"]
HOSTILE = "a|b `c` <script>alert(1)</script> *d* _e_ [f](http://g) $h$ &amp; \\| ~~i~~\n\n# j"


@pytest.fixture
def record():
    return {
        "versions": {"hf_semalign": "0.1.0", "torch": "2.9.0"},
        "method": "semalign",
        "source": "embedded:source",
        "target": "embedded:target",
        "pairing": {
            "source_layers": [0, 2, 3, 5],
            "num_source_layers": 6,
            "strategy": "banded",
            "scores": [0.3, 0.1, 0.2, 0.4, 0.1, 0.5],
            "source_id": "embedded:source",
            "target_id": "embedded:target",
        },
        "map": {
            "kind": "readout",
            "shape": [32, 48],
            "shared_tokens": 60,
            "condition_number": 27.84,
            "fingerprint": "abc",
            "scales": [1.0, 1.0, 1.0, 1.0],
        },
        "stages": [0, 400, 800, 1200, 1600],
        "settings": {
            "pairing": "banded",
            "scale": "none",
            "relation_weight": 1.0,
            "kl_weight": 1.0,
            "layer_loss": "relation",
            "output_loss": "kl",
            "frontier": "single",
            "lora_targets": ["down_proj", "up_proj"],
            "learning_rate": 3e-4,
            "lr_scheduler_type": "cosine",
            "num_train_epochs": 5.0,
            "max_steps": -1,
            "seed": 42,
        },
        "data": {
            "extract": {"rows": 64, "fingerprint": "1" * 16},
            "align": {"rows": 2000, "fingerprint": "2" * 16},
            "eval": {"rows": 200, "fingerprint": "3" * 16},
        },
    }


@pytest.fixture
def results():
    return {
        "task": "symbols",
        "dataset": None,
        "steps": 1600,
        "metrics": {
            "target": {"kl": 0.39, "loss": 0.4, "exact_match": {"copy": 0.98, "sort": 0.35}},
            "source": {"kl": 0.0, "loss": 0.0013, "exact_match": {"copy": 1.0, "sort": 0.99}},
            "semalign": {"kl": 0.044, "loss": 0.05, "exact_match": {"copy": 1.0, "sort": 0.81}},
            "kd": {"kl": 0.061, "loss": 0.07, "exact_match": {"copy": 0.99, "sort": 0.8}},
        },
        "history": [{"step": 50, "stage": 1, "loss": 0.9, "relation": 0.2, "kl": 0.7, "learning_rate": 1e-3}],
        "seconds": {"data": 0.41, "training": 1234.5},
        "peak_memory_mb": 812.4,
        "machine": {"device": "cpu", "cpus": 2, "platform": "Linux-6.1"},
        "figures": ["layers.png", "losses.png", "comparison.png"],
    }


def metadata(text):
    return ModelCard(text).data.to_dict()


def section(text, heading):
    found = re.search(rf"^## {heading}\n\n(.*?)(?=\n\n## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found and found[1]


def rendered(text):
    """The card's HTML, as a CommonMark parser with tables makes it."""
    return MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)


def cells(text):
    """The first table of some Markdown: first column to the other cells."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_metadata_of_a_hub_target(record, results):
    record |= {"source": "org/big-7B", "target": "org/small_0.5B"}
    results["dataset"] = "openai/gsm8k"
    expected = {"copy": 1.0, "sort": 0.81, "mean exact match": 0.905, "KL(source ‖ target)": 0.044, "answer loss": 0.05}
    types = ["exact_match"] * 3 + ["kl_divergence", "cross_entropy"]
    card = render_card(record, results)
    front_matter = metadata(card)
    (entry,) = front_matter.pop("model-index")
    assert front_matter == {
        "library_name": "peft",
        "base_model": "org/small_0.5B",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "language": ["en"],
        "metrics": ["exact_match"],
        "tags": [*TAGS, "base_model:adapter:org/small_0.5B"],
    }
    assert entry["name"] == "SemAlign: org/big-7B to org/small_0.5B"
    (found,) = entry["results"]
    assert found["task"] == {"type": "text-generation"}
    assert found["dataset"] == {"type": "openai/gsm8k", "name": "symbols (200 held-out rows)"}
    assert {metric["name"]: metric["value"] for metric in found["metrics"]} == expected
    assert [metric["type"] for metric in found["metrics"]] == types
    assert "[org/small_0.5B](https://huggingface.co/org/small_0.5B)" in card
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in card


@pytest.mark.parametrize("target", LOCAL)
def test_local_targets_have_no_base_model_and_show_no_path(record, results, target):
    record |= {"source": target.replace("target", "source"), "target": target}
    results |= {"dataset": "/home/zoe/rows.jsonl"}
    card = render_card(record, results)
    assert "base_model" not in card
    assert "datasets" not in metadata(card)
    assert metadata(card)["tags"] == TAGS
    assert metadata(card)["model-index"][0]["results"][0]["dataset"]["type"] == "symbols"
    for private in ("zoe", "/home", "Users", "~", "./target"):
        assert private not in card
    prefix = "embedded:" if target.startswith("embedded:") else ""
    assert f"# SemAlign: {prefix}source → {prefix}target\n" in card


def test_table_has_the_numbers_in_order(record, results):
    table = cells(section(render_card(record, results), "Results"))
    assert list(table) == ["Method", "---", "Target before", "Distillation (KL only)", "SemAlign", "Source"]
    assert table["Method"] == ["copy (%)", "sort (%)", "mean exact match (%)", "KL(source ‖ target)", "answer loss"]
    assert table["Target before"] == ["98.0", "35.0", "66.5", "0.390", "0.400"]
    assert table["Distillation (KL only)"] == ["99.0", "80.0", "89.5", "0.061", "0.070"]
    assert table["SemAlign"] == ["**100.0**", "**81.0**", "**90.5**", "**0.044**", "**0.050**"]
    assert table["Source"] == ["100.0", "99.0", "99.5", "0.000", "1.3e-03"]


def test_summary_and_protocol_state_the_numbers(record, results):
    card = render_card(record, results)
    assert "mean exact match from 66.5 % to 90.5 % (source: 99.5 %) and its KL(source ‖ target) from 0.390 to 0.044." in card
    protocol = section(card, "Results")
    assert "200 held-out rows" in protocol
    assert "greedily decoded" in protocol
    assert "equal steps: 1,600 optimizer steps on the same rows" in protocol


def test_one_skill_needs_no_mean_and_missing_scores_are_dashes(record, results):
    for method in ("target", "semalign"):
        results["metrics"][method]["exact_match"] = {"gsm8k": 0.25}
    for method in ("source", "kd"):
        del results["metrics"][method]["exact_match"]
    table = cells(section(render_card(record, results), "Results"))
    assert table["Method"] == ["mean exact match (%)", "KL(source ‖ target)", "answer loss"]
    assert [row[0] for row in table.values()][2:] == ["**25.0**", "-", "**25.0**", "-"]


def test_unknown_baselines_keep_their_name_and_place(record, results):
    results["metrics"] |= {"laten": results["metrics"]["kd"], "new|one": results["metrics"]["kd"]}
    table = cells(section(render_card(record, results), "Results"))
    assert list(table)[2:] == ["Target before", "Distillation (KL only)", "LaTen", r"new\|one", "SemAlign", "Source"]


def test_hostile_text_is_shown_to_the_letter(record, results):
    record["source"] = record["target"] = HOSTILE.replace("/", "")
    record["versions"][HOSTILE] = HOSTILE
    record["settings"][HOSTILE] = HOSTILE
    results["task"] = HOSTILE.replace("/", "")
    results["machine"]["platform"] = HOSTILE
    results["seconds"][HOSTILE] = 1.0
    for numbers in results["metrics"].values():
        numbers["exact_match"] = {HOSTILE: 0.5, "---": 0.25}
    results["metrics"][HOSTILE] = copy.deepcopy(results["metrics"]["kd"])
    card = render_card(record, results)
    page = rendered(card)
    assert "<script" not in page
    assert "<del" not in page
    assert '<a href="http://g"' not in page
    shown = "a|b `c` &lt;script&gt;alert(1)&lt;/script&gt; *d* _e_ [f](http://g) $h$ &amp;amp; \\| ~~i~~ # j"
    assert f"<td>{shown}</td>" in page
    assert f'<th style="text-align:right">{shown} (%)</th>' in page
    assert f"The run used this machine: cpu, {shown}, 2 CPU cores." in page
    headings = re.findall(r"<h[1-6]>(.*?)</h[1-6]>", page)
    assert headings[1:] == [
        "Use", "Results", "Figures", "Data", "Settings", "Cost", "Versions", "Limits", "Citation",
    ]  # fmt: skip
    code = re.search(r"<pre><code class=\"language-python\">(.*?)</code>", page, re.DOTALL)[1]
    assert code.rstrip().endswith("&quot;.&quot;)")
    assert metadata(card)["model-index"][0]["results"][0]["metrics"][0]["name"] == " ".join(HOSTILE.split())
    assert len({line.count(" | ") for line in section(card, "Results").splitlines() if line.startswith("|")}) == 1


def test_data_is_never_a_template(record, results):
    tags = "{{ 1234 + 1 }} {% for x in y %} {# z"
    record["source"] = record["target"] = results["task"] = tags
    record["versions"][tags] = tags
    record["settings"][tags] = tags
    card = render_card(record, results)
    assert f"# SemAlign: {tags} → {tags}\n" in card
    assert section(card, "Versions").endswith(f", {tags} {tags}")
    assert f"| {tags} | {tags} |" in section(card, "Settings")
    assert "1235" not in card


def test_limits_name_where_others_are_better(record, results):
    results["metrics"]["semalign"] |= {"kl": 0.07, "exact_match": {"copy": 0.9, "sort": 0.81}}
    limits = section(render_card(record, results), "Limits")
    assert "Compared with Target before, SemAlign is worse in copy (90.0 % against 98.0 %)." in limits
    assert (
        "Compared with Distillation (KL only), SemAlign is worse in copy (90.0 % against 99.0 %), mean exact match (85.5 % "
        "against 89.5 %), KL(source ‖ target) (0.070 against 0.061)." in limits
    )
    assert "No other method" not in limits


def test_limits_say_so_when_nothing_is_better(record, results):
    limits = section(render_card(record, results), "Limits")
    assert "Compared with Target before, SemAlign is worse in none of the numbers above." in limits
    assert "Compared with Distillation (KL only), SemAlign is worse in none of the numbers above." in limits


def test_limits_on_ties_noise_seed_baselines_and_vocabulary(record, results):
    del results["metrics"]["kd"]
    results["metrics"]["semalign"]["kl"] = results["metrics"]["target"]["kl"] + 1e-9
    record["map"]["shared_tokens"] = 40
    limits = section(render_card(record, results), "Limits")
    assert "Compared with Target before, SemAlign is worse in none" in limits  # what reads the same is the same
    assert "No other method was run" in limits
    assert "about 100 rows per skill, the standard error of an exact match is up to 5.0 points" in limits
    assert "seed 42" in limits
    assert "40 shared tokens, fewer than the 48 dimensions" in limits
    record["map"]["shared_tokens"] = 48
    assert "shared tokens" not in section(render_card(record, results), "Limits")


def test_a_diverged_run_is_worse_and_stays_out_of_the_metadata(record, results):
    results["metrics"]["semalign"] |= {"kl": float("nan"), "loss": float("inf")}
    card = render_card(record, results)
    assert "KL(source ‖ target) (nan against 0.390)" in section(card, "Limits")
    assert "answer loss (inf against 0.400)" in section(card, "Limits")
    assert cells(section(card, "Results"))["Distillation (KL only)"][3:] == ["**0.061**", "**0.070**"]
    assert {metric["type"] for metric in metadata(card)["model-index"][0]["results"][0]["metrics"]} == {"exact_match"}
    results["metrics"]["semalign"] |= {"kl": 0.05, "loss": 0.05}
    results["metrics"]["kd"] |= {"kl": float("nan")}
    assert "Compared with Distillation (KL only), SemAlign is worse in none" in section(render_card(record, results), "Limits")


def test_sections_without_data_vanish(record, results):
    record |= {"data": {}, "versions": {}}
    results |= {"metrics": {}, "history": [], "seconds": {}, "peak_memory_mb": None, "machine": {}, "figures": []}
    card = render_card(record, results)
    assert re.findall(r"^## (.*)", card, re.MULTILINE) == ["Use", "Settings", "Limits", "Citation"]
    assert {"model-index", "model_name", "metrics", "datasets"}.isdisjoint(metadata(card))
    assert "On held-out rows" not in card
    assert "None" not in card
    assert not re.search(r"\n{3,}", card)


def test_without_exact_match_nothing_is_said_of_decoding(record, results):
    for numbers in results["metrics"].values():
        del numbers["exact_match"]
    card = render_card(record, results)
    assert "greedily" not in card
    assert "exact" not in card.lower()
    assert "metrics" not in metadata(card)
    assert cells(section(card, "Results"))["SemAlign"] == ["**0.044**", "**0.050**"]


def test_only_drawn_figures_are_shown(record, results):
    results["figures"] = ["comparison.png", "../secret.png", "losses.png"]
    record["pairing"]["scores"] = None
    assert re.findall(r"\]\((.*?)\)", section(render_card(record, results), "Figures")) == [
        "figures/losses.png",
        "figures/comparison.png",
    ]
    results |= {"figures": ["layers.png", "losses.png"], "history": []}
    figures = section(render_card(record, results), "Figures")
    assert "losses.png" not in figures
    assert "ttribution" not in figures


def test_settings_show_what_counted(record, results):
    record["settings"]["lr_scheduler_type"] = SchedulerType.COSINE  # as in a record that was not read from JSON
    settings = section(render_card(record, results), "Settings")
    table = cells(settings)
    assert table["lr_scheduler_type"] == ["cosine"]
    assert table["learning_rate"] == ["0.0003"]
    assert table["lora_targets"] == ["down_proj, up_proj"]
    assert table["num_train_epochs"] == ["5"]
    assert "max_steps" not in table
    assert "0 → 0, 2 → 1, 3 → 2, 5 → 3." in settings
    assert "48 → 32 dimensions, from 60 shared tokens, condition number 27.8." in settings
    assert "Factors" not in settings
    record["settings"] |= {"max_steps": 1600, "scale": "match"}
    record["map"]["scales"] = [0.5, 1.25, 2.0, 3.0]
    settings = section(render_card(record, results), "Settings")
    assert cells(settings)["max_steps"] == ["1600"]
    assert "num_train_epochs" not in settings
    assert "by pair: 0.5, 1.25, 2, 3." in settings


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, ["target layers were trained one at a time", "relation loss", "plus KL"], ["steering"]),
        ({"frontier": "joint", "relation_weight": 0.0}, ["All target layers", "at once", "is the KL"], ["relation loss"]),
        ({"layer_loss": "steering", "kl_weight": 0.0}, ["steering loss"], ["relation loss", "plus KL"]),
        ({"output_loss": "cosine"}, ["plus cosine loss of the final state"], ["plus KL"]),
    ],
)
def test_summary_follows_the_settings(record, results, settings, said, unsaid):
    record["settings"] |= settings
    summary = render_card(record, results).split("## Use")[0]
    assert all(text in summary for text in said)
    assert not any(text in summary for text in unsaid)


@pytest.mark.parametrize(
    ("method", "said", "unsaid"),
    [
        ("semalign", "SemAlign copies no weights.", "baseline"),
        ("kd", "ordinary distillation, a baseline for SemAlign", "copies"),
        ("sft", "It learns from the answers alone", "transfers what"),  # the source has no part in it
        ("seeking", "LoRA starts from windows of the source's weights", "copies"),
        ("laten", "Nothing is trained after that.", "The loss is"),
    ],
)
def test_summary_says_what_the_method_is(record, results, method, said, unsaid):
    record["method"] = method
    summary = render_card(record, results).split("## Use")[0]
    assert said in summary and unsaid not in summary


def test_cost_and_versions(record, results):
    results |= {"cost": {"signals": 50.0, "training": 1500.4}}
    results["seconds"] |= {"source signals": 2.25, "total": 1240.0}
    card = render_card(record, results)
    cost = section(card, "Cost")
    assert cells(cost) == {
        "Phase": ["Seconds", "Target forwards"],
        "---": ["--:", "--:"],
        "data": ["0.4"],
        "training": ["1,234.5", "1,500"],
        "source signals": ["2.2", "50"],
        "total": ["1,240.0", "1,550"],
    }
    machine = "The run used this machine: cpu, Linux-6.1, 2 CPU cores."
    assert cost.endswith(f" {machine} Peak memory was 812 MB, of the whole process.")
    assert section(card, "Versions") == "hf_semalign 0.1.0, torch 2.9.0"
    assert "2510.24208" in section(card, "Citation")


def test_settings_that_are_not_set_are_not_shown(record, results):
    record["settings"] |= {"source_parts": None}
    assert "source_parts" not in render_card(record, results)


LLAMA2 = {"license": "llama2"}


def test_the_adapter_goes_by_the_licence_of_the_target(record, results):
    other = {"license": "other", "license_name": "mine", "license_link": "https://x.example/LICENSE"}
    card = render_card({**record, "licences": {"source": LLAMA2, "target": other}}, results)
    assert {name: metadata(card)[name] for name in other} == other
    assert "The adapter follows the licence of the target, other" in section(card, "Licence")


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (
            "llama2",
            "apache-2.0",
            "forbids using the source's outputs or results to improve any large language model other than Llama 2",
        ),
        ("llama2", "llama2", None),
        ("llama3", "llama2", "than Llama 3 and its derivatives"),
        ("llama3.2", "llama3.2", "its name begins with “Llama”"),
        ("gemma", "gemma", "as a Model Derivative"),
        ("cc-by-nc-4.0", "mit", "allows no commercial use"),
        ("apache-2.0", "mit", None),
        (None, "mit", None),
    ],
)
def test_a_source_whose_licence_binds_what_learns_from_it(record, results, source, target, said):
    record["licences"] = {role: name and {"license": name} for role, name in (("source", source), ("target", target))}
    licence = section(render_card(record, results), "Licence")
    warning = restriction(record)
    assert (warning is None) == (said is None) == ("**" not in licence)
    assert said is None or (said in warning and f"**{warning}**" in licence)


def test_unknown_licences_are_said_to_be_unknown(record, results):
    card = render_card({**record, "licences": {"source": None, "target": None}}, results)
    assert "license" not in metadata(card)
    assert "the licence of the target, which is not known here" in section(card, "Licence")
    assert section(render_card(record, results), "Licence") is None  # records of before


SCORE = {
    "task": "gsm8k",
    "metric": "exact_match,flexible",
    "value": 0.12345,
    "rows": 1319,
    "harness": "0.4",
    "chat_template": False,
}


def test_results_on_a_whole_test_set_are_entries_of_the_hub(results):
    results |= {"date": "2026-11-26"}
    results["metrics"]["semalign"]["benchmark"] = SCORE
    files = benchmark_entries(results, "semalign")
    assert list(files) == ["gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(files["gsm8k.yaml"])
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("openai/gsm8k", "gsm8k", 12.35, "2026-11-26")
    assert entry.notes == "zero-shot, greedy, lm-eval 0.4, without chat template"


@pytest.mark.parametrize("changes", [{"rows": 100}, {"task": "mbpp"}])
def test_parts_of_a_test_set_and_other_benchmarks_are_no_entries(results, changes):
    results["metrics"]["semalign"]["benchmark"] = SCORE | changes
    assert benchmark_entries(results | {"date": "2026-11-26"}, "semalign") == {}
    assert benchmark_entries(results, "kd") == {}


@pytest.mark.parametrize("method", ["kd", "sft"])
def test_a_card_of_a_baseline_says_nothing_of_attribution(record, results, method):
    record["method"] = method
    results["metrics"][method] = results["metrics"].pop("semalign")
    results["figures"].remove("layers.png")  # which is of pairs
    card = render_card(record, results)
    assert "held-out rows, which training did not use. " in card and "| extract | not used with these settings |" in card
    assert "attribution" not in card


def test_a_card_without_a_layer_loss_names_no_pairs(record, results):
    """They had no effect: the layer loss had no weight."""
    assert "Layer pairs" in render_card(record, results)
    record["settings"]["relation_weight"] = 0.0
    results["figures"].remove("layers.png")
    card = render_card(record, results)
    assert "Layer pairs" not in card and "| pairing |" not in card and "| layer_loss |" not in card
    assert "| extract | not used with these settings |" in card


def test_a_card_of_two_tokenizers_says_what_its_kl_compares(record, results):
    one = render_card(record, results)
    two = render_card(record | {"tokenizers": {"classes": 39238, "aligned": {"align": 0.7887}}}, results)
    assert "nats per token of the reference answers" in one and "aligned" not in one
    assert "KL(source ‖ target) compares 39,238 classes of tokens, in nats per aligned position." in two
    assert "78.9 % of the target's answer tokens in the align split are used: they are aligned with the source's, and" in two
    assert "nats per token of the reference answers" not in two


def test_a_card_says_where_the_source_read_prompts_of_its_own(record, results):
    record["data"]["align"] |= {"source_fingerprint": "4" * 16, "source_prompts": 1500, "aligned": 1.0}
    card = render_card(record, results)
    assert "In 1,500 rows of the align split, the source reads a prompt of its own in place of the target's." in card
    assert "aligned" not in card
    record["data"]["align"]["aligned"] = 0.989
    card = render_card(record, results)
    assert "KL(source ‖ target) is in nats per aligned position, answer loss in nats per token" in card
    assert "98.9 % of the target's answer tokens in the align split are used: they are aligned with the source's." in card


def test_rendering_is_pure(record, results):
    before = copy.deepcopy((record, results))
    card = render_card(record, results)
    assert (record, results) == before
    assert render_card(json.loads(json.dumps(record)), json.loads(json.dumps(results))) == card


@pytest.mark.parametrize("target", [*LOCAL, "org/small", 'a"b```c'])
def test_the_python_example_is_python(record, results, target):
    record["target"] = target
    code = re.search(r"```python\n(.*?)\n```\n", render_card(record, results), re.DOTALL)[1]
    compile(code, "card", "exec")


def test_the_python_example_loads_the_adapter(record, results, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "PAIR_FOLDER", tmp_path / "pair")
    monkeypatch.chdir(tmp_path)
    tokenizer = symbols.build_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    target.save_pretrained(tmp_path / "pair" / "target")
    tokenizer.save_pretrained(tmp_path / "pair" / "target")
    get_peft_model(target, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)\n```\n", render_card(record, results), re.DOTALL)[1]
    loaded = {}
    exec(code, loaded)
    assert loaded["model"].peft_config["default"].r == 2
    assert loaded["model"](**loaded["tokenizer"]("copy a b =", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_the_cards_of_the_repository_are_what_the_code_makes(path):
    record, results = (json.loads((path.parent / name).read_text()) for name in ("semalign.json", "results.json"))
    card = path.read_text(encoding="utf-8")
    assert card == render_card(record, results)
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", card)
    assert pictures and all((path.parent / picture).is_file() for picture in pictures)


def test_there_are_cards_of_the_method_and_of_a_baseline():
    assert {json.loads((path.parent / "semalign.json").read_text())["method"] for path in CARDS} >= {"semalign", "seeking"}
