"""Tasks: prompts to the letter, splits that share nothing, errors that say what to do, and the Hub that is asked."""

import csv
import inspect
import json
import math
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from hf_semalign.experiments import symbols
from hf_semalign.experiments.tasks import TASKS, TaskData, load_held_out, load_task
from hf_semalign.splits import check_disjoint
from hf_semalign.tokenization import prompt_of

COUNTS = {"extract": 2, "align": 3, "eval": 2}
RECIPES = Path(__file__).parents[1] / "recipes"

ADD_CODE = "import math\r\nfrom os import path\r\ndef one(x):\r\n  return x\r\ndef add(a,b = 1): \r\n  return a + b "


def gsm8k_row(number):
    answer = f"Half of {number} is <<{number}/2=7>>7 eggs\nSo 7 are left.\n#### 7"
    return {"question": f"How many are half of {number} eggs?", "answer": answer}


def mmlu_row(number):
    choices = ["a, b", "c", "d", "e"]
    return {
        "question": f"What is {number}?",
        "subject": "high_school_physics",
        "choices": choices,
        "answer": number % 4,
    }


def mbpp_row(number):
    tests = [f"assert add({number}, 2) == 3", "assert one(1) == 1"]
    return {"task_id": number, "text": f"Write a function to add {number}.", "code": ADD_CODE, "test_list": tests}


def pair_row(number):
    return {"instruction": f"Print {number}.", "input": "", "output": f"print({number})\n"}


def problem_row(number):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def f{number}(x):\n    """Add {number}."""\n',
        "entry_point": f"f{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    return str(path)


def mmlu_folder(path, tables):
    path.mkdir()
    for name, rows in tables.items():
        with (path / name).open("w", newline="") as file:
            csv.writer(file).writerows([row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Local files of every benchmark, by task."""
    mbpp = json_lines(tmp_path / "mbpp.jsonl", map(mbpp_row, [*range(505, 520), *range(598, 612)]))
    mmlu = {
        "train": mmlu_folder(tmp_path / "dev", {"high_school_physics_dev.csv": list(map(mmlu_row, range(10)))}),
        "test": mmlu_folder(tmp_path / "test", {"high_school_physics_test.csv": list(map(mmlu_row, range(20, 30)))}),
    }
    gsm8k = {
        "train": json_lines(tmp_path / "train.jsonl", map(gsm8k_row, range(10))),
        "test": json_lines(tmp_path / "test.jsonl", map(gsm8k_row, range(20, 30))),
    }
    pairs = json_lines(tmp_path / "pairs.jsonl", map(pair_row, range(12)))
    problems = json_lines(tmp_path / "problems.jsonl", map(problem_row, range(3)))
    humaneval = {"train": pairs, "test": problems}
    return {"gsm8k": gsm8k, "mmlu": mmlu, "mbpp": {"train": mbpp}, "humaneval": humaneval}


def splits_of(data):
    return {"extract": data.extract, "align": data.align, "eval": data.eval}


def turns(record):
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
    return tuple(turn["content"] for turn in record["messages"])


def test_gsm8k_text(tmp_path):
    rows = [
        gsm8k_row(14),
        {"question": "Q?", "answer": "It grows <<1+1=2>>2\nand is 1,002\n#### 1,002"},
        {"question": "R?", "answer": "It is <<1=1>>1.\n#### 1"},
    ]
    path = json_lines(tmp_path / "rows.jsonl", rows)
    data = load_task("gsm8k", extract=1, align=1, eval=1, files={"train": path})
    assert {turns(record) for record in data.extract + data.align + data.eval} == {
        (
            "Answer the following question.\n\nQuestion: How many are half of 14 eggs?",
            "Answer: Half of 14 is 7 eggs So 7 are left. So the answer is 7.",
        ),
        ("Answer the following question.\n\nQuestion: Q?", "Answer: It grows 2 and is 1,002. So the answer is 1,002."),
        ("Answer the following question.\n\nQuestion: R?", "Answer: It is 1. So the answer is 1."),
    }


def test_mmlu_text(files):
    data = load_task("mmlu", extract=1, align=8, eval=1, files=files["mmlu"])
    assert (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What is 7?\nA. a, b\nB. c\nC. d\nD. e\nAnswer:",
        "The answer is: D",
    ) in map(turns, data.extract + data.align + data.eval)


def test_mbpp_text(files):
    data = load_task("mbpp", extract=1, align=10, eval=1, files=files["mbpp"])
    assert (
        "Complete the following python function.\n\n\nWrite a function to add 601.\n"
        "import math\nfrom os import path\ndef add(a, b=1)",
        "Here is the completed function:\n\n```python\nimport math\nfrom os import path\ndef one(x):\n"
        "  return x\ndef add(a,b = 1): \n  return a + b\n```",
    ) in map(turns, data.extract + data.align)


def test_humaneval_text(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "print(1 + 2)\n"},
        {"instruction": "Explain.", "output": "Like this:\n```python\nx = 1\n```\nDone."},
        pair_row(5),
    ]
    data = load_task("humaneval", extract=1, align=1, eval=1, files={"train": json_lines(tmp_path / "p.jsonl", rows)})
    assert {turns(record) for record in data.extract + data.align + data.eval} == {
        ("Add.\n1, 2", "```python\nprint(1 + 2)\n```"),
        ("Explain.", "Like this:\n```python\nx = 1\n```\nDone."),
        ("Print 5.", "```python\nprint(5)\n```"),
    }


def test_symbols_text():
    data = load_task("symbols", **COUNTS)
    assert [record["skill"] for record in data.align] == ["copy", "reverse", "sort"]
    for record in data.extract + data.align + data.eval:
        skill, *sequence, equals = record["prompt"].split()
        assert equals == "=" and skill == record["skill"]
        if skill == "reverse":
            assert record["completion"] == " " + " ".join(reversed(sequence))


@pytest.mark.parametrize("task", ["symbols", "gsm8k", "mmlu", "humaneval", "mbpp"])
def test_splits_are_sized_disjoint_and_deterministic(task, files):
    data = load_task(task, **COUNTS, files=files.get(task))
    assert {split: len(records) for split, records in splits_of(data).items()} == COUNTS
    check_disjoint(splits_of(data))
    assert data == load_task(task, **COUNTS, files=files.get(task))
    assert data.align != load_task(task, **COUNTS, files=files.get(task), seed=43).align


def test_repeated_prompts_stand_in_one_split_only(tmp_path):
    spellings = ["ONE  egg?", "one egg?", "\uff4fne\tegg?"]
    train = [{"question": text, "answer": "#### 1"} for text in spellings] + [gsm8k_row(n) for n in range(3)]
    test = [{"question": "How many are  HALF of 2 eggs?", "answer": "#### 1"}]
    paths = {"train": json_lines(tmp_path / "t.jsonl", train), "test": json_lines(tmp_path / "e.jsonl", test)}
    data = load_task("gsm8k", extract=1, align=1, eval=1, files=paths)
    prompts = {prompt_of(record).rpartition("question: ")[2] for record in data.extract + data.align + data.eval}
    assert prompts == {"one egg?", "how many are half of 0 eggs?", "how many are half of 1 eggs?"}
    with pytest.raises(ValueError, match="'gsm8k' has 3 rows for extract, align and eval, but 4 were requested"):
        load_task("gsm8k", extract=1, align=2, eval=1, files=paths)


LEAKS = {  # rows that ask what a test row asks, by what may differ
    "gsm8k": ({**gsm8k_row(20), "answer": "#### 1"}, "10 = 0"),
    "mmlu": ({**mmlu_row(29), "answer": 0}, "10 = 9"),
    "mbpp": ({**mbpp_row(505), "task_id": 700, "code": "def add(x, y):\n  return x + y"}, "700 = 505"),
    "humaneval": ({"instruction": problem_row(2)["prompt"].upper(), "output": "?"}, "12 = HumanEval/2"),
}


@pytest.mark.parametrize("task", LEAKS)
def test_rows_that_ask_what_a_test_row_asks_are_left_out(task, files, caplog):
    row, name = LEAKS[task]
    path = Path(files[task]["train"])
    if path.is_dir():
        with (path / "high_school_physics_dev.csv").open("a", newline="") as file:
            csv.writer(file).writerow([row["question"], *row["choices"], "A"])
    else:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    usable = {"gsm8k": 10, "mmlu": 10, "mbpp": 11, "humaneval": 12}[task] - (0 if task == "mbpp" else 1)
    data = load_task(task, extract=1, align=usable - 1, eval=1, files=files[task])
    with pytest.raises(ValueError, match=f"has {usable + (task != 'mbpp')} rows"):
        load_task(task, extract=1, align=usable, eval=1, files=files[task])
    split = "dev+validation" if task == "mmlu" else "train"
    assert f"Task '{task}': left out 1 rows of {split} that ask the same as a test row: {name}." in caplog.text
    assert data.overlap.exact == [] and data.overlap.rows == usable + 1
    assert data.overlap.test_rows == {"gsm8k": 10, "mmlu": 10, "mbpp": 6, "humaneval": 3}[task]


@pytest.mark.parametrize("task", ["gsm8k", "mmlu", "humaneval", "mbpp"])
def test_without_test_rows_it_is_said_that_nothing_was_compared(task, files, tmp_path, caplog):
    given = {"train": files[task]["train"]}
    if task == "mbpp":
        given = {"train": json_lines(tmp_path / "no_test.jsonl", map(mbpp_row, [*range(511, 520), *range(598, 612)]))}
    assert load_task(task, **COUNTS, files=given).overlap is None
    assert f"Task '{task}' is not compared with the benchmark's test rows: set data.files.test" in caplog.text


def test_symbols_that_differ_by_case_alone_are_kept_apart(monkeypatch):
    monkeypatch.setattr(symbols, "LENGTHS", (2,))
    counts = {"extract": 200, "align": 300, "eval": 200}
    drawn = symbols.make_records(300, 3 * 42 + 1)
    data = load_task("symbols", **counts)
    assert data.align != drawn, "the plain draw must clash, or the test shows nothing"
    check_disjoint(splits_of(data))
    assert {split: len(records) for split, records in splits_of(data).items()} == counts


def test_mbpp_takes_its_rows_by_id(files):
    data = load_task("mbpp", extract=1, align=10, eval=9, files=files["mbpp"])

    def ids(records):
        return {int(prompt_of(record).partition(" to add ")[2].split(".")[0]) for record in records}

    assert ids(data.extract + data.align) == set(range(601, 612))
    assert ids(data.eval) < {*range(511, 520), *range(598, 601)}
    with pytest.raises(ValueError, match="has 11 rows for extract and align"):
        load_task("mbpp", extract=1, align=99, eval=1, files=files["mbpp"])
    with pytest.raises(ValueError, match="has 12 rows for eval"):
        load_task("mbpp", extract=1, align=1, eval=99, files=files["mbpp"])


HUB = {
    "gsm8k": [
        ("openai/gsm8k", "main", "test", gsm8k_row, range(20, 29)),
        ("openai/gsm8k", "main", "train", gsm8k_row, range(9)),
    ],
    "mmlu": [
        ("cais/mmlu", "all", "test", mmlu_row, range(20, 29)),
        ("cais/mmlu", "all", "dev+validation", mmlu_row, range(9)),
    ],
    "mbpp": [
        ("google-research-datasets/mbpp", "full", split, mbpp_row, numbers)
        for split, numbers in (("test", range(11, 20)), ("validation", range(511, 520)), ("train", range(601, 610)))
    ],
    "humaneval": [
        ("openai/openai_humaneval", None, "test", problem_row, range(3)),
        ("iamtarun/python_code_instructions_18k_alpaca", None, "train", pair_row, range(9)),
    ],
}


@pytest.mark.parametrize("task", HUB)
def test_hub(task, monkeypatch):
    asked = []

    def load_dataset(*arguments, split):
        *named, row, numbers = HUB[task][len(asked)]
        asked.append([*arguments, split])
        assert asked[-1] == named
        return datasets.Dataset.from_list([row(number) for number in numbers])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task(task, **COUNTS)
    assert len(asked) == len(HUB[task])
    assert {split: len(records) for split, records in splits_of(data).items()} == COUNTS
    check_disjoint(splits_of(data))
    assert data.overlap.rows == sum(COUNTS.values())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_records_pass_unchanged(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files, rows = {}, {}
    for split in COUNTS:
        rows[split] = [{"prompt": f"{split} {n} =", "completion": f" {n}!", "level": n} for n in range(4)]
        path = tmp_path / f"{split}{suffix}"
        table = datasets.Dataset.from_list(rows[split])
        if suffix == ".csv":
            table.to_csv(path)
            rows[split] = [{**row, "level": str(row["level"])} for row in rows[split]]
        elif suffix == ".parquet":
            table.to_parquet(path)
        elif suffix == ".json":
            path.write_text(json.dumps(rows[split]))
        else:
            json_lines(path, rows[split])
        files[split] = str(path)
    data = load_task("records", extract=2, align=100, eval=4, files=files)
    assert data == TaskData(extract=rows["extract"][:2], align=rows["align"], eval=rows["eval"])


def test_records_with_messages(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    files = {split: json_lines(tmp_path / f"{split}.jsonl", rows) for split in COUNTS}
    assert load_task("records", **COUNTS, files=files) == TaskData(extract=rows, align=rows, eval=rows)


def test_unknown_task():
    assert TASKS == ("symbols", "gsm8k", "mmlu", "humaneval", "mbpp", "records")
    with pytest.raises(ValueError, match=r"Unknown task 'gsm8': expected one of symbols, .* Did you mean 'gsm8k'\?"):
        load_task("gsm8", **COUNTS)
    with pytest.raises(ValueError, match=r"records.$"):
        load_task("zzz", **COUNTS)


@pytest.mark.parametrize("split", COUNTS)
def test_counts_below_one(split):
    with pytest.raises(ValueError, match=f"at least one row, got .*'{split}': 0.*raise"):
        load_task("symbols", **{**COUNTS, split: 0})


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        (
            "gsm8k",
            {"test": "x"},
            r"got files for \['test'\]: expected exactly train, and optionally test",
        ),
        ("humaneval", {"train": "x", "eval": "x"}, r"\['eval', 'train'\]: expected exactly train, and optionally test\."),
        (
            "records",
            None,
            r"got files for nothing: expected exactly extract, align, eval, or train alone \(data.files.train=FILE\)",
        ),
        ("symbols", {"train": "x"}, "none, so leave files out"),
    ],
)
def test_roles_of_files(task, files, message):
    with pytest.raises(ValueError, match=message):
        load_task(task, **COUNTS, files=files)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Task 'humaneval': .*nowhere.jsonl does not exist. Correct .*files\.train"):
        load_task("humaneval", **COUNTS, files={"train": str(tmp_path / "nowhere.jsonl")})


def test_too_few_rows(files):
    with pytest.raises(ValueError, match=r"has 10 rows for extract, align and eval, but 11 were requested.*lower the counts"):
        load_task("gsm8k", extract=1, align=9, eval=1, files=files["gsm8k"])
    with pytest.raises(ValueError, match="has 12 rows for extract, align and eval, but 13 were requested"):
        load_task("humaneval", extract=1, align=2, eval=10, files=files["humaneval"])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "Q"}, r"Row 0 of .* lacks the columns \['answer'\]: it has \['question'\]. Rename"),
        ("gsm8k", {"question": "Q", "answer": "7"}, "ends with a line '#### N', got '7'"),
        ("mbpp", {**mbpp_row(601), "code": "def add(:"}, "Expected Python code and tests"),
        ("mbpp", {**mbpp_row(601), "code": "def sub(a):\n  return a"}, r"functions \['sub'\], but they call \['add'"),
    ],
)
def test_malformed_rows(task, row, message, tmp_path):
    path = json_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load_task(task, **COUNTS, files={"train": path})


@pytest.mark.parametrize("line", ["{'a': 1}", "5", "[1, 2]"])
def test_malformed_json_lines(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"instruction": "a", "output": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: expected one JSON object per line, got"):
        load_task("humaneval", **COUNTS, files={"train": str(tmp_path / "rows.jsonl")})


def test_malformed_mmlu_folders(tmp_path, files):
    (tmp_path / "bad").mkdir()
    bad = {**files["mmlu"], "train": str(tmp_path / "bad")}
    with pytest.raises(ValueError, match=r"No rows in .*expected a folder of <subject>_<split>.csv files"):
        load_task("mmlu", **COUNTS, files=bad)
    for cells in ("q,a,b,c,d", "q,a,b,c,d,E", "q,a,b,c,d,"):
        (tmp_path / "bad" / "law_dev.csv").write_text(cells + "\n")
        with pytest.raises(ValueError, match=r"law_dev.csv, row 1 is .*: expected question, A, B, C, D, answer letter"):
            load_task("mmlu", **COUNTS, files=bad)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a", "label": 1}', r"Row 0 of .* has columns \['label', 'text'\]: expected prompt and"),
        ("rows.jsonl", "", "has no rows"),
        ("rows.txt", "a", r"ends in '.txt': expected .jsonl, .json, .csv or .parquet"),
    ],
)
def test_malformed_records(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task("records", **COUNTS, files=dict.fromkeys(COUNTS, str(tmp_path / name)))


TASK_RECIPES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate" and path.stem != "compare")
PAPER = ("llama2-13b-to-7b", "codellama-13b-to-llama2-7b", "wizardcoder-13b-to-llama2-7b")
TARGET_LAYERS = {**dict.fromkeys(PAPER, 32), "smollm2-360m-to-135m": 30, "qwen2.5-7b-to-0.5b": 24}


@pytest.mark.parametrize("path", TASK_RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes(path):
    recipe = yaml.safe_load(path.read_text())
    data, training = recipe["data"], recipe["training"]
    assert data["task"] in TASKS
    given = {key: value for key, value in data.items() if key != "max_length"}
    inspect.signature(load_task).bind(given.pop("task"), **given)
    assert isinstance(training["learning_rate"], float)
    if path.parent.name in TARGET_LAYERS:
        assert recipe["output_dir"] == f"runs/{path.parent.name}/{path.stem}" and path.stem == data["task"]
        batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
        steps = math.ceil(data["align"] / batch) * training["num_train_epochs"]
        assert batch == 16 and steps >= TARGET_LAYERS[path.parent.name]


def test_every_pair_has_its_recipes():
    assert {path.parent.name for path in TASK_RECIPES} >= TARGET_LAYERS.keys()
    tasks = {path.stem for path in TASK_RECIPES if path.parent.name == "llama2-13b-to-7b"}
    assert tasks == {"mmlu", "gsm8k", "humaneval", "mbpp"}


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("ddp", 2)])
def test_accelerate_configurations(name, processes):
    config = ClusterConfig.from_yaml_file(RECIPES / "accelerate" / f"{name}.yaml")
    assert config.num_processes == processes


def test_some_skills_of_the_symbols():
    data = load_task("symbols", extract=2, align=5, eval=4, skills=["sort", "copy"])
    assert [record["skill"] for record in data.align] == ["sort", "copy", "sort", "copy", "sort"]
    assert {record["skill"] for record in load_held_out("symbols", eval=6, skills=["shift"])} == {"shift"}


@pytest.mark.parametrize("skills", ["sort", [], ["sort", "sing"]])
def test_skills_that_do_not_exist(skills):
    with pytest.raises(ValueError, match="only symbols has skills, and expects a list"):
        load_task("symbols", extract=1, align=1, eval=1, skills=skills)


def test_a_held_out_task_reads_its_eval_split_alone(tmp_path):
    rows = [{"prompt": f"w{i}", "completion": " x"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_held_out("records", eval=3, files={"eval": str(tmp_path / "rows.jsonl")}) == rows[:3]
    with pytest.raises(ValueError, match="expected exactly eval"):
        load_held_out("records", eval=3)


def test_a_held_out_benchmark_has_no_test_rows(tmp_path):
    train, test = (json_lines(tmp_path / name, map(gsm8k_row, rows)) for name, rows in (("a", range(10)), ("b", range(4))))
    rows = load_held_out("gsm8k", eval=6, files={"train": train, "test": test})
    assert {turns(record)[0].rpartition("half of ")[2] for record in rows} == {f"{number} eggs?" for number in range(4, 10)}
    with pytest.raises(ValueError, match="has 6 rows for eval, but 7 were requested"):
        load_held_out("gsm8k", eval=7, files={"train": train, "test": test})
    mbpp = json_lines(tmp_path / "mbpp.jsonl", map(mbpp_row, (10, 11, 511, 601)))
    assert prompt_of(load_held_out("mbpp", eval=1, files={"train": mbpp})[0]).count("to add 511.")
