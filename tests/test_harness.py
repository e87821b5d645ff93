"""Benchmarks: prompts to the letter, right answers all and wrong ones none, BOS once, and what cannot be done refused first."""

import ast
import csv
import gzip
import json
import random
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import json_lines, table, tiny_llama
from huggingface_hub import ModelCard
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_semalign.cli import main
from hf_semalign.errors import InputError
from hf_semalign.experiments.benchmarks import harness
from hf_semalign.experiments.benchmarks import models as wrapped
from hf_semalign.experiments.benchmarks.harness import BENCHMARK_METRICS, check_benchmark, evaluate_run, run_benchmark
from hf_semalign.experiments.benchmarks.problems import build_task, humaneval_chat_program, mbpp_program
from hf_semalign.experiments.benchmarks.sandbox import OPT_IN
from hf_semalign.experiments.generation import continue_prompts
from hf_semalign.files import file_digest

SUBJECTS = [
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
]  # fmt: skip
GSM8K = [
    {"question": "Ann has 2 eggs, Bob 3. How many?", "answer": "Both have 2+3=<<2+3=5>>5 eggs.\n#### 5"},
    {"question": "A car costs $1,000 and a bike half. Both?", "answer": "500 + 1000 = $1,500\n#### 1,500"},
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add{number}(x):\n    """ Add {number}. """\n',
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }
    for number in (3, 4)
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_list": [f"assert add({k}) == {k + number}" for k in (0, 1)] + ["assert add(z) > 0"],
        "test_setup_code": "z = add(1)",
        "challenge_test_list": [],
    }
    for number in (10, 11, 12, 600, 601)
]
SIZES = {"mmlu": 2 * 57, "gsm8k": 2, "humaneval": 2, "mbpp": 2}
TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(template=None, bos=True, eos=False):
    """One token a byte, so that any text is what its ids say."""
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos or eos:
        single = " ".join([*["<s>"] * bos, "$A", *["</s>"] * eos])
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def byte_model(**config):
    return tiny_llama(2, 16, vocab=259, **{"max_position_embeddings": 2048, **config})


class Answers(LM):
    """Answers each row by a function of it, cut at the stop words; keeps the prompts."""

    tokenizer_name = "none"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.prompts = answer, []

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        assert all(request.args[1]["do_sample"] is False for request in requests)
        return [postprocess_generated_text(self.answer(request.doc), request.args[1]["until"], None) for request in requests]

    def loglikelihood(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [(-float(request.args[1].strip() != self.answer(request.doc)), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def apply_chat_template(self, history, add_generation_prompt=True):
        turns = [f"[{turn['role']}]{turn['content']}" for turn in history]
        return "\n".join([*turns, *["[assistant]"] * add_generation_prompt])


RIGHT = {
    "mmlu": lambda row: "ABCD"[row["answer"]],
    "gsm8k": lambda row: f" {row['answer']}",
    "humaneval": lambda row: row["canonical_solution"],
    "mbpp": lambda row: f"{row['code']}\n```\nIt adds.",
}
WRONG = {
    "mmlu": lambda row: "ABCD"[row["answer"] - 1],
    "gsm8k": lambda row: f" {row['answer']}1",
    "humaneval": lambda row: "    return None\n",
    "mbpp": lambda row: "def add(x):\n  return None\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The four test sets, each in its authors' format."""
    folder = tmp_path_factory.mktemp("files")
    for task in ("gsm8k", "mbpp", "mmlu/test"):
        (folder / task).mkdir(parents=True)
    (folder / "gsm8k" / "test.jsonl").write_text(json_lines(GSM8K))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json_lines(HUMANEVAL).encode()))
    (folder / "mbpp" / "mbpp.jsonl").write_text(json_lines(MBPP))
    for subject in SUBJECTS:
        with (folder / "mmlu" / "test" / f"{subject}_test.csv").open("w", newline="") as file:
            rows = [[f"What, in {subject}?", "1", '"two", or 2', "None", "4", "B"], ["\nNow?", "NA", "b", "c", "d", "D"]]
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(autouse=True)
def opted_in(monkeypatch):
    monkeypatch.setenv(OPT_IN, "1")


linux = pytest.mark.skipif(sys.platform != "linux", reason="generated programs run on Linux only")
each_task = pytest.mark.parametrize(
    "task", ["mmlu", "gsm8k", pytest.param("humaneval", marks=linux), pytest.param("mbpp", marks=linux)]
)


# Prompts and scores


HEAD = "The following are multiple choice questions (with answers) about abstract algebra."
CHOICES = 'What, in abstract_algebra?\nA. 1\nB. "two", or 2\nC. None\nD. 4\nAnswer:'
QUESTION = "Question: Ann has 2 eggs, Bob 3. How many?\nAnswer:"
TASK_OF_MBPP = (
    "You are an expert Python programmer, and here is your task:\nWrite a function to add 11.\nYour code should pass these "
    "tests:\nassert add(0) == 11\nassert add(1) == 12\nassert add(z) > 0"
)
CODE = 'def add3(x):\n    """ Add 3. """\n'
PROMPTS = {
    ("mmlu", False): f"{HEAD}\n\n{CHOICES}",
    ("mmlu", True): f"[system]{HEAD}\n\n\n[user]{CHOICES}\n[assistant]",
    ("gsm8k", False): QUESTION,
    ("gsm8k", True): f"[user]{QUESTION}\n[assistant]",
    ("humaneval", False): CODE,
    ("humaneval", True): (
        "[user]Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
        f"{CODE}\n```\n\n[assistant]Here is the completed function:\n```python\n{CODE}\n"
    ),
    ("mbpp", False): f"{TASK_OF_MBPP}\n```python\n",
    ("mbpp", True): f"[user]{TASK_OF_MBPP}\n[assistant]\n```python\n",
}


@each_task
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_prompts_to_the_letter_and_right_answers_all(task, chat, files):
    lm = Answers(RIGHT[task])
    entry = run_benchmark(lm, None, task, files=files, chat_template=chat)
    assert lm.prompts[0] == PROMPTS[task, chat]
    assert (entry["value"], entry["stderr"], entry["rows"]) == (1.0, 0.0, SIZES[task])
    assert (entry["task"], entry["metric"], entry["num_fewshot"], entry["chat_template"]) == (
        task,
        BENCHMARK_METRICS[task],
        0,
        chat,
    )
    assert json.loads(json.dumps(entry)) == entry and str(files) not in json.dumps(entry)
    assert ("subjects" in entry) == (task == "mmlu")


@each_task
def test_wrong_answers_none(task, files):
    entry = run_benchmark(Answers(WRONG[task]), None, task, files=files)
    assert (entry["value"], entry["rows"]) == (0.0, SIZES[task])


def test_share_error_and_subjects(files):
    entry = run_benchmark(Answers(lambda row: "B"), None, "mmlu", files=files / "mmlu" / "test")
    assert (entry["value"], entry["data"]) == (0.5, "test/")
    assert entry["subjects"] == dict.fromkeys(SUBJECTS, 0.5)
    entry = run_benchmark(Answers(lambda row: "so 5. Or 5."), None, "gsm8k", files=files / "gsm8k" / "test.jsonl")
    assert (entry["value"], entry["stderr"], entry["data"]) == (0.5, 0.5, "test.jsonl")  # s / sqrt(n), s = 1 / sqrt(2)


@pytest.mark.parametrize(("task", "rows"), [("gsm8k", 1), ("mmlu", 57)])
def test_limit(task, rows, files):
    entry = run_benchmark(Answers(RIGHT[task]), None, task, files=files, limit=1)
    assert (entry["rows"], entry["limit"], entry["value"]) == (rows, 1, 1.0)
    assert entry["stderr"] is None


def test_programs_of_answers():
    row = {"test_list": ["assert f() == 1", "assert z"], "test_setup_code": "z = f()"}
    tests = "\nz = f()\nassert f() == 1\nassert z"
    code = "\ndef f():\n  return 1"
    for answer in (code, f"{code}\n```\nText.", f"```python{code}\n```", f" ```{code}", f"{code}```"):
        assert mbpp_program(row, answer).replace("\n\n", "\n").strip() == code.strip() + tests
    row = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    check = "\ndef check(f): pass\ncheck(f)"
    for rest in ("\n```\nText.", "\ndef g(): 1 / 0", "\nprint(f())\n```", "\n# A test\nassert 0", "\nif 1:\n  0\nclass A: 0"):
        assert humaneval_chat_program(row, f"  return 1{rest}").replace("\n\n", "\n") == f"def f():\n  return 1{check}"
    again = "import os\ndef g(): return 1\n# Call it.\ndef f():\n  return g()"
    for answer in (
        f"```python\n{again}\n```\nText.",
        f"```\n{again}",
    ):  # a fence of its own, in which the function stands again
        assert humaneval_chat_program(row, answer).replace("\n\n", "\n") == f"def f():\n{again}{check}"


@linux
def test_an_answer_that_leaves_early_or_hangs_does_not_pass(files, monkeypatch):
    monkeypatch.setattr(
        "hf_semalign.experiments.benchmarks.sandbox.run_program.__kwdefaults__", {"timeout": 1.0, "memory_mb": 512}
    )
    endings = {"HumanEval/3": "    return 4\nimport os\nos._exit(0)\n", "HumanEval/4": "    while True: pass\n"}
    entry = run_benchmark(Answers(lambda row: endings[row["task_id"]]), None, "humaneval", files=files)
    assert entry["value"] == 0.0


HUB = {"gsm8k": ("openai/gsm8k", GSM8K), "humaneval": ("openai/openai_humaneval", HUMANEVAL)}


@pytest.mark.parametrize("task", ["gsm8k", pytest.param("humaneval", marks=linux)])
def test_rows_of_the_hub(task, monkeypatch):
    name, rows = HUB[task]

    def load_dataset(path, name, **settings):
        assert (path, name, settings) == (HUB[task][0], "main" if task == "gsm8k" else None, {})
        return dict.fromkeys(("test", "train"), datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = run_benchmark(Answers(RIGHT[task]), None, task)
    assert (entry["value"], entry["data"]) == (1.0, name)


def test_subjects_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name):
        asked.append((path, name))
        row = {"question": "Q?", "choices": ["1", "2", "3", "4"], "answer": 2}
        return dict.fromkeys(("test", "dev"), datasets.Dataset.from_list([row]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = run_benchmark(Answers(RIGHT["mmlu"]), None, "mmlu")
    assert asked == [("cais/mmlu", subject) for subject in SUBJECTS]
    assert (entry["value"], entry["rows"], entry["data"]) == (1.0, 57, "cais/mmlu")


# What reaches a model


@pytest.fixture
def seen(monkeypatch):
    """Ids that a model is first called with, without padding, and what it generates."""
    prompts, answers = [], []

    def watch(model):
        def note(module, arguments, settings):
            ids = settings["input_ids"] if "input_ids" in settings else arguments[0]
            if ids.shape[1] > 1:
                prompts.extend([[token for token in row if token != 0] for row in ids.tolist()])

        model.register_forward_pre_hook(note, with_kwargs=True)
        generate = model.generate

        def keep(**settings):
            output = generate(**settings)
            answers.append(output.sequences)
            return output

        monkeypatch.setattr(model, "generate", keep)
        return SimpleNamespace(prompts=prompts, answers=answers)

    return watch


BOS_TEMPLATE = "{{ bos_token }}" + TEMPLATE


@pytest.mark.parametrize("task", ["gsm8k", "mmlu"])
@table(
    "template, bos",
    [
        ("plain", None, True),
        ("plain, of a tokenizer that puts none", None, False),
        ("chat", TEMPLATE, True),
        ("chat, of a tokenizer that puts none", TEMPLATE, False),
        ("chat with BOS of its own", BOS_TEMPLATE, True),
        ("chat with BOS of its own, of a tokenizer that puts none", BOS_TEMPLATE, False),
    ],
)
def test_bos_once(task, template, bos, files, seen):
    model, tokenizer = byte_model(), byte_tokenizer(template, bos)
    watched = seen(model)
    entry = run_benchmark(
        model, tokenizer, task, files=files, limit=1 if task == "mmlu" else None, chat_template=bool(template)
    )
    prompts = watched.prompts
    assert len(prompts) == entry["rows"] and all(ids.count(1) == 1 and ids[0] == 1 for ids in prompts)
    expected = PROMPTS[task, bool(template)]
    texts = {tokenizer.decode(ids[1:]) for ids in prompts}
    assert expected in texts or f"{expected} " in texts  # of MMLU the choice's blank is a byte of its own
    assert (entry["bos_token"], entry["add_bos_token"], entry["truncated"]) == ("<s>", True, 0)


def test_answers_are_greedy_those_of_the_adapter_and_leave_no_trace(files, seen):
    base, tokenizer = byte_model(), byte_tokenizer()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj", "up_proj"], init_lora_weights=False))
    settings = base.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature = 9.0, True, 3.0
    model.train()
    watched = seen(model)
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    run_benchmark(model, tokenizer, "gsm8k", files=files, limit=1)
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == states
    assert model.training and base.generation_config is settings and tokenizer.padding_side == "right"
    prompt = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    answer = watched.answers[-1]  # a segment goes on from the one before
    ids = prompt
    with torch.no_grad():
        model.eval()
        for _ in range(40):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        with model.disable_adapter():
            bare = base(input_ids=prompt).logits[:, -1].argmax()
    assert answer[:, : ids.shape[1]].tolist() == ids.tolist()
    assert bare != ids[0, prompt.shape[1]], "or the adapter shows nothing"


def test_choices_are_compared_in_small_batches_after_a_task_with_answers(files, tmp_path, monkeypatch):
    """Their logits of all tokens would not fit into memory in the batches that answers are generated in."""
    model, sizes, call = byte_model(), [], HFLM._model_call
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(HFLM, "_model_call", lambda self, ids, **given: sizes.append(len(ids)) or call(self, ids, **given))
    evaluate_run(str(tmp_path / "model"), ["gsm8k", "mmlu"], files=files, output=tmp_path / "out")
    assert sizes and max(sizes) <= wrapped.CHOICE_ROWS < len(SUBJECTS)


def test_prompts_that_do_not_fit_are_counted(files, caplog):
    entry = run_benchmark(byte_model(max_position_embeddings=310), byte_tokenizer(), "gsm8k", files=files)
    assert entry["truncated"] == 1
    assert "gsm8k: 1 of 2 prompts lost their beginning, because they are longer than the 54 tokens" in caplog.text


@linux
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_a_model_writes_programs(task, files):
    entry = run_benchmark(byte_model(), byte_tokenizer(), task, files=files, limit=1)
    assert (entry["value"], entry["rows"], entry["backend"]) == (0.0, 1, "hf")


# What is refused


@pytest.fixture
def unused():
    """A model that must not be called."""
    model = byte_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    return model


@table(
    "task, change, message",
    [
        ("task", "gsm", {}, "Unknown task 'gsm': expected one of mmlu, gsm8k, humaneval, mbpp"),
        ("backend", "gsm8k", {"backend": "tgi"}, "Unknown backend 'tgi': expected one of hf, vllm"),
        ("limit", "gsm8k", {"limit": 0}, "limit is 0: expected 1 or more"),
        ("batch", "gsm8k", {"batch_size": -1}, "batch_size is -1: expected 1 or more"),
        ("vllm", "gsm8k", {"backend": "vllm"}, "vLLM is not installed: run pip install vllm"),
        ("no template", "gsm8k", {"chat_template": True}, "has no chat template: set one, or leave"),
    ],
)
def test_wrong_settings(task, change, message, unused, files):
    with pytest.raises(ValueError, match=message):
        run_benchmark(unused, byte_tokenizer(), task, files=files, **change)


def test_no_harness(unused, files, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf_semalign\[eval\]'"):
        run_benchmark(unused, byte_tokenizer(), "gsm8k", files=files)


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_no_opt_in(task, unused, files, monkeypatch):
    monkeypatch.delenv(OPT_IN)
    with pytest.raises(ValueError, match=f"set {OPT_IN}=1"):
        run_benchmark(unused, byte_tokenizer(), task, files=files)
    assert check_benchmark("gsm8k", files=files).name == "test.jsonl", "where nothing runs, none is wanted"


def test_files_that_are_missing_or_not_the_benchmarks(files, tmp_path, unused):
    def refused(error, message, task, given):
        with pytest.raises(error, match=message):
            run_benchmark(unused, byte_tokenizer(), task, files=given)

    refused(FileNotFoundError, r"No test rows of gsm8k at .*: pass the file, or a folder with test.jsonl", "gsm8k", tmp_path)
    refused(FileNotFoundError, "No test rows of mmlu", "mmlu", files / "gsm8k" / "test.jsonl")
    refused(ValueError, r"lacks the columns \['question', 'answer'\]", "gsm8k", files / "mbpp" / "mbpp.jsonl")
    (tmp_path / "test.jsonl").write_text("")
    refused(ValueError, "has no test rows of gsm8k", "gsm8k", tmp_path)
    (tmp_path / "mbpp.jsonl").write_text(json_lines(MBPP[3:]))
    refused(ValueError, "has no test rows of mbpp", "mbpp", tmp_path)
    for subject in SUBJECTS[1:]:
        (tmp_path / f"{subject}_test.csv").write_text("q,1,2,3,4,A\n")
    refused(ValueError, r"57 subjects.* lacks \['abstract_algebra'\]", "mmlu", tmp_path)
    for name in ("abstract_algebra_test", "cooking_test"):
        (tmp_path / f"{name}.csv").write_text("q,1,2,3,4,A\n")
    refused(ValueError, r"57 subjects.* also has \['cooking'\]", "mmlu", tmp_path)


def test_models_and_tokenizers_that_cannot_be_measured(unused, files):
    def refused(message, model, tokenizer, task="gsm8k"):
        with pytest.raises(ValueError, match=message):
            run_benchmark(model, tokenizer, task, files=files)

    refused("The model is a dict: expected a causal LM", {}, byte_tokenizer())
    refused("No tokenizer was given", unused, None)
    refused("appends EOS to prompts", unused, byte_tokenizer(eos=True))
    endless = byte_tokenizer()
    endless.eos_token = None
    refused("has no EOS token", unused, endless)
    unused.config.max_position_embeddings = 256
    refused("The model's context has 256 tokens, but gsm8k needs 256 for an answer", unused, byte_tokenizer())
    twice = byte_tokenizer("{{ bos_token }}{{ bos_token }}" + TEMPLATE)
    with pytest.raises(ValueError, match="begin with 2 BOS tokens"):
        run_benchmark(byte_model(), twice, "gsm8k", files=files, chat_template=True)


def test_a_tokenizer_without_bos_gets_none(files):
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.bos_token = None
    assert run_benchmark(byte_model(), tokenizer, "gsm8k", files=files, limit=1)["bos_token"] is None


def test_a_pad_token_without_an_embedding_is_not_used(files):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<none>"})
    assert tokenizer.pad_token_id == 259
    assert run_benchmark(byte_model(), tokenizer, "gsm8k", files=files)["rows"] == 2
    assert tokenizer.pad_token_id == 259


# By name

RECORD = {
    "method": "semalign", "source": "org/source", "target": "folder name", "versions": {"hf_semalign": "0.1.0"}, "data": {},
    "pairing": {"source_layers": [0, 1], "num_source_layers": 2, "strategy": "last"},
    "map": {"shape": [16, 16], "shared_tokens": 259, "condition_number": 1.0, "scales": [1.0, 1.0]},
    "settings": {
        "layer_loss": "relation", "output_loss": "kl", "relation_weight": 0.1, "kl_weight": 1.0, "frontier": "joint",
        "scale": "none", "max_steps": 1, "seed": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A target, and a run folder with an adapter for it."""
    folder = tmp_path_factory.mktemp("runs")
    model = byte_model()
    model.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    config = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, rank_pattern={"0.self_attn.v_proj": 12})
    get_peft_model(model, config).save_pretrained(folder / "run")
    checksum = file_digest(folder / "run" / "adapter_model.safetensors")
    (folder / "run" / "semalign.json").write_text(json.dumps({**RECORD, "adapter_checksum": checksum}))
    return folder


def test_command(run_folder, files, capsys, caplog):
    run, target = str(run_folder / "run"), str(run_folder / "target")
    settings = ["--files", str(files), "--limit", "1", "--batch-size", "64", "--target", target]
    assert main(["evaluate", run, "--task", "gsm8k", "--task", "mmlu", *settings]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k" in shown and "mmlu" in shown and "benchmarks.json" in shown
    content = json.loads((run_folder / "run" / "benchmarks.json").read_text())
    assert [(entry["task"], entry["rows"]) for entry in content["benchmarks"]] == [("gsm8k", 1), ("mmlu", 57)]
    assert (content["model"], content["target"]) == ("run", "target") and str(run_folder) not in json.dumps(content)
    again = evaluate_run(run, ["gsm8k"], files=files, target=target)
    assert [(entry["task"], entry["limit"]) for entry in again["benchmarks"]] == [("gsm8k", 1), ("mmlu", 1), ("gsm8k", None)]
    assert len(evaluate_run(run, ["gsm8k"], files=files, target=target)["benchmarks"]) == 3
    place = run_folder / "run" / "benchmarks.json"
    place.write_text(json.dumps({**again, "adapter_checksum": "of other weights"}))
    assert len(evaluate_run(run, ["gsm8k"], files=files, target=target)["benchmarks"]) == 1
    place.write_text(json.dumps({**again, "benchmarks": [{}]}))
    with pytest.raises(ValueError, match=r"benchmarks\[0\] of .* lacks \['task', "):
        evaluate_run(run, ["gsm8k"], files=files, target=target)
    place.unlink()
    assert main(["evaluate", run, "--task", "gsm8k", *settings[:-2]]) == 2
    assert "The target 'folder name' of the record is not a Hub id" in caplog.text


def test_a_model_by_name(run_folder, files, tmp_path):
    target = str(run_folder / "target")
    with pytest.raises(ValueError, match=r"is not a run folder: pass output"):
        evaluate_run(target, ["gsm8k"], files=files)
    content = evaluate_run(target, ["gsm8k"], files=files, limit=1, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "benchmarks.json").read_text()) == content
    assert (content["model"], content["target"], content["adapter_checksum"]) == ("target", None, None)
    with pytest.raises(FileNotFoundError, match="was not found on the Hub"):
        run_benchmark("runs/typing-error", None, "gsm8k", files=files)


def test_vllm(run_folder, files, monkeypatch):
    given = []

    class Engine(Answers):
        max_length, max_gen_toks = 2048, 256

        def __init__(self, **settings):
            super().__init__(RIGHT["gsm8k"])
            given.append(settings)
            self.tokenizer = byte_tokenizer()

        def tok_encode(self, text):
            return self.tokenizer(text)["input_ids"]

    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=Engine))
    run, target = str(run_folder / "run"), str(run_folder / "target")
    entry = run_benchmark(run, None, "gsm8k", files=files, backend="vllm", target=target)
    assert (entry["value"], entry["backend"], entry["bos_token"], entry["truncated"]) == (1.0, "vllm", "<s>", 0)
    run_benchmark(target, None, "gsm8k", files=files, backend="vllm")
    common = {"tokenizer": target, "add_bos_token": True, "batch_size": "auto"}
    assert given == [
        {"pretrained": target, "lora_local_path": run, "max_lora_rank": 16, **common},  # which holds 12
        {"pretrained": target, **common},
    ]
    real = ast.parse(Path(find_spec("lm_eval.models").origin).with_name("vllm_causallms.py").read_text())  # it imports vLLM
    (engine,) = (node for node in real.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    init = next(node for node in engine.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert set().union(*given) <= {argument.arg for argument in init.args.args}
    with pytest.raises(ValueError, match="vLLM loads model and tokenizer itself"):
        run_benchmark(byte_model(), byte_tokenizer(), "gsm8k", files=files, backend="vllm")


def test_tasks():
    assert tuple(BENCHMARK_METRICS) == ("mmlu", "gsm8k", "humaneval", "mbpp")


@linux
def test_a_recipe_with_benchmarks_scores_target_source_and_result(files, tmp_path, monkeypatch):
    """By the harness, on the test rows, with what that says in results and card; and each once."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    for name, model in (("target", byte_model()), ("source", tiny_llama(3, 24, vocab=259, max_position_embeddings=2048))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer(template).save_pretrained(tmp_path / name)
    rows = [{"question": f"How many are {i} and {i}?", "answer": f"They are {2 * i}.\n#### {2 * i}"} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "source": str(tmp_path / "source"),
        "target": str(tmp_path / "target"),
        "output_dir": str(tmp_path / "run"),
        "data": {
            "task": "gsm8k", "extract": 2, "align": 8, "eval": 4,
            "files": {"train": str(tmp_path / "train.jsonl"), "test": str(files / "gsm8k" / "test.jsonl")},
        },
        "benchmark": {"tasks": ["gsm8k", "humaneval"], "files": str(files), "limit": 2, "batch_size": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for role in ("target", "source", "semalign"):
        for task, scored in zip(("gsm8k", "humaneval"), results["metrics"][role]["benchmarks"], strict=True):
            assert (scored["task"], scored["rows"], scored["num_fewshot"], scored["limit"]) == (task, 2, 0, 2)
            assert len(scored["outcomes"]) == 2 and scored["value"] == scored["outcomes"].count("1") / 2
    assert results["overlap"]["rows"] == 14
    card = (tmp_path / "run" / "README.md").read_text()
    assert "gsm8k is scored by lm-eval" in card and "(zero-shot, greedy, without chat template) on 2 test rows" in card
    assert "No row asks the same question as one of the benchmark's" in card
    assert "exact_match" in ModelCard(card).data.eval_results[0].metric_type
    monkeypatch.setattr("hf_semalign.experiments.run.run_benchmark", lambda *args, **settings: pytest.fail("scored again"))
    (tmp_path / "run" / "results.json").unlink()
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    recipe["benchmark"] = {"files": str(tmp_path / "nowhere")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'b'}"]) == 2
    assert not list((tmp_path / "b").glob("*.safetensors"))  # before anything is trained


def test_without_the_hub_local_files_are_asked_for(monkeypatch):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask", unreachable)
    with pytest.raises(InputError, match=r"gsm8k cannot be read .*Couldn't reach.*: pass local files with --files"):
        build_task("gsm8k", None, False)


def test_an_interrupted_benchmark_goes_on_with_the_answers_that_are_missing(files, tmp_path, monkeypatch):
    model, tokenizer, calls = byte_model(), byte_tokenizer(), []
    whole = run_benchmark(model, tokenizer, "gsm8k", files=files, batch_size=1)

    def interrupted(*args, stop, **settings):
        calls.append(stop)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return continue_prompts(*args, **settings)

    settings = {"files": files, "batch_size": 1, "answers": tmp_path / "gsm8k.answers"}
    monkeypatch.setattr(wrapped, "continue_prompts", partial(interrupted, stop=2))
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(model, tokenizer, "gsm8k", **settings)
    (kept,) = [json.loads(line) for line in settings["answers"].read_text().splitlines()]  # plain text, no pickle
    assert kept.keys() == {"asked", "answer"}
    with settings["answers"].open("a") as file:
        file.write('{"asked": "cut')  # where a process was killed
    monkeypatch.setattr(wrapped, "continue_prompts", partial(interrupted, stop=0))
    assert run_benchmark(model, tokenizer, "gsm8k", **settings) == whole
    assert calls == [2, 2, 0]  # one of two rows was there


def test_an_interrupted_evaluation_keeps_its_answers_beside_the_results(run_folder, files, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return continue_prompts(*args, **settings)

    monkeypatch.setattr(wrapped, "continue_prompts", interrupted)
    evaluate = partial(evaluate_run, run_folder / "run", ["gsm8k"], files=files, batch_size=1, target=run_folder / "target")
    with pytest.raises(KeyboardInterrupt):
        evaluate(output=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("benchmark-gsm8k-") and len(kept.read_text().splitlines()) == 1
    content = evaluate(output=tmp_path)
    assert len(calls) == 3 and [path.name for path in tmp_path.iterdir()] == ["benchmarks.json"]
    assert evaluate(output=tmp_path / "whole") == content
