"""Bad recipes, data and folders to write to: one line, the exit code 2 and no traceback, before weights are loaded.

One row a case. Models, adapters and caches on the disk: tests/test_bad_folders.py. The library: tests/test_bad_input.py.
"""

import subprocess
import sys

import pytest
from conftest import TEXTS, json_lines, table

from hf_semalign import SemanticMap
from hf_semalign.cli import main
from hf_semalign.experiments.tasks import load_task

RECIPES = [
    ("a count of words", "data.align=many", "data.align of the recipe .* is 'many': expected a whole number"),
    ("a count with a fraction", "data.eval=2.5", "data.eval of the recipe .* is 2.5: expected a whole number"),
    ("a count below one", "data.extract=0", "Every split needs at least one row"),
    ("no seed", "data.seed=null", "data.seed of the recipe .* is None: expected a whole number"),
    (
        "files of no role",
        "data.files=[align.jsonl]",
        r"data.files of the recipe .* is \['align.jsonl'\]: expected names and values",
    ),
    ("a path that is a number", "data.files.align=5", "data.files.align of the recipe .* is 5: expected text"),
    ("an unknown task", "data.task=gsm9k", "did you mean 'gsm8k'"),
    (
        "a hub out of reach",
        "{task: gsm8k, extract: 2, align: 8, eval: 2}",
        "Couldn't reach .*: set data.files to local files",
    ),
    ("a source that is a number", "source=5", "source of the recipe .* is 5: expected text"),
    ("an empty output_dir", "output_dir=' '", "output_dir of the recipe .* is ' ': expected a name or path"),
    ("no output_dir", "output_dir=", r"the recipe .* lacks \['output_dir'\]"),
    ("an embedded model that is none", "source=embedded:other", "use embedded:source or embedded:target"),
    ("a pad token that is none", "pad_token=<fill>", "pad_token '<fill>' is not in the tokenizer"),
    ("a baseline that is no list", "baselines=kd", "baselines of the recipe .* is 'kd': expected a list"),
    ("a learning rate of words", "training.learning_rate=fast", "training section .*learning_rate is 'fast': expected a num"),
    ("an unknown schedule", "training.lr_scheduler_type=linearr", "linearr is not a valid SchedulerType, please select one"),
    ("a file that is not there", "training.accelerator_config=nope.json", "training section .*nope.json"),
    ("a key of no config", "training.accelerator_config={foo: 1}", "training section .*foo"),
    ("best of no metric", "training.save_strategy=best", "metric_for_best_model"),
    ("an unknown setting", "training.align=many", "Unknown key 'align' in the training section .*: see its documentation"),
    ("an override that is no YAML", "training.seed=[", r"The override 'training.seed=\[' is not valid YAML"),
    ("parts that are no keys", "training.source_parts=abc", "The parts 'abc' are not a mapping: expected module paths"),
    ("layers that are a norm", "training.target_parts={layers: model.norm}", "are a LlamaRMSNorm: expected a ModuleList in"),
    ("layers that are one", "training.source_parts={layers: model.layers.0}", "are a LlamaDecoderLayer: expected a ModuleLis"),
    (
        "a head that is a norm",
        "training.target_parts={head: model.norm}",
        "The head of .* is a LlamaRMSNorm: expected a linear",
    ),
    (
        "a decoder without its layers",
        "training.target_parts={decoder: model.embed_tokens, layers: model.layers}",
        "are a ModuleList: expected a ModuleList inside its Embedding",
    ),
    ("a part without a name", "training.target_parts={layers: null}", "The parts .* are not a mapping: expected module paths"),
    ("parts in a list", "training.target_parts=[ab]", r"target_parts is \['ab'\]: expected names and values or text"),
    (
        "a checkpoint that is a number",
        "training.resume_from_checkpoint=3",
        "resume_from_checkpoint is 3: expected text or true",
    ),
    (
        "kwargs of no schedule",
        "training.lr_scheduler_kwargs={foo: 1}",
        "lr_scheduler_type 'linear' does not accept lr_sched.*foo",
    ),
    ("a schedule without its kwargs", "training.lr_scheduler_type=cosine_with_min_lr", "'cosine_with_min_lr' does not accept"),
    ("a pad token in a list", "pad_token=[a]", r"pad_token of the recipe .* is \['a'\]: expected text"),
    (
        "test rows that are a number",
        "benchmark={tasks: [gsm8k], files: 3}",
        "benchmark.files of the recipe .* is 3: expected text",
    ),
    ("callbacks", "training.callbacks=[a]", "Unknown key 'callbacks' in the training section"),
    ("skills that are numbers", "data.skills=[3]", r"data.skills\[0\] of the recipe .* is 3: expected text"),
    ("a report to a number", "training.report_to=3", "report_to is 3: expected text or a list"),
    ("an optimizer's settings", "training.optim_args=foo", "optim 'adamw_torch_fused' with optim_args 'foo' cannot be used"),
    ("a momentum above 1", "training.adam_beta1=2", "adam_beta1 or adam_beta2 is 2: expected a number below 1"),
    ("warmup of words", "training.warmup_steps=some", "warmup_steps is 'some': expected a number"),
    ("checkpointing's kwargs", "training.gradient_checkpointing_kwargs={foo: 1}", r"checkpointing_kwargs has \['foo'\]"),
    ("a part that is not there", "training.target_parts={layers: a.b}", "has no module 'a.b', which was given as its layers"),
]


@table("change, message", RECIPES)
def test_recipes(refused, no_weights, change, message):
    refused(message, f"data={change}" if change.startswith("{") else change)


@table(
    "content, message",
    [
        ("no YAML", "source: [", "recipe.yaml is not valid YAML: while parsing a flow node"),
        ("no text", b"\xff\x00\x80", "recipe.yaml is not valid YAML"),
        ("nothing", "", "recipe.yaml is a NoneType: expected keys and values"),
        ("a key that stands twice", "source: a\nsource: b", "duplicate key 'source'"),
        ("a list", "- source", "recipe.yaml is a list: expected keys and values"),
    ],
)
@pytest.mark.parametrize("command", ["train", "signals", "cka"])
def test_recipe_files(refused, tmp_path, command, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(message, command=command, recipe=tmp_path / "recipe.yaml")


FOLDERS = [
    ("output_dir a file", "train", "output_dir={}", "output_dir .* is not writable .File exists.: choose another folder"),
    ("output_dir below a file", "train", "output_dir={}/run", "output_dir .* is not writable .Not a directory."),
    ("output_dir of signals", "signals", "output_dir={}", "output_dir .* is not writable"),
    ("signals_dir a file", "train", "training.signals_dir={}", "signals_dir .* is not writable"),
    ("signals_dir of signals", "signals", "training.signals_dir={}", "signals_dir .* is not writable"),
    ("output of an analysis", "cka", "--output={}", "output .* is not writable"),
    ("a source to analyse", "pairing", "source={}/model", "The source '.*' was not found: set source="),
    ("no checkpoint", "train", "training.resume_from_checkpoint={}/step-2", "Cannot resume from .*: the folder does not exist"),
]


@table("command, change, message", FOLDERS)
def test_folders(refused, no_weights, tmp_path, command, change, message):
    (tmp_path / "file").write_text("kept")
    refused(message, change.format(tmp_path / "file"), command=command)
    assert (tmp_path / "file").read_text() == "kept"


ENDS = "lists of messages with role and content. Correct or remove this row"
DATA = [
    ("empty", "a.jsonl", [], "a.jsonl has no rows: every split needs at least one"),
    ("no JSON", "a.jsonl", ["hello"], "a.jsonl, line 1: expected one JSON object per line, got 'hello'"),
    (
        "a broken line",
        "a.jsonl",
        [*TEXTS[:5], "{'prompt':", *TEXTS[5:24]],
        "a.jsonl, line 6: expected one JSON object per line",
    ),
    ("a list", "a.jsonl", ["[1]"], r"a.jsonl, line 1: expected one JSON object per line, got '\[1\]'"),
    (
        "a field missing",
        "a.jsonl",
        [TEXTS[0], {"prompt": "w1"}],
        r"Row 1 of .*a.jsonl has columns \['prompt'\]: expected prompt and completion, or messages. With data.answers, a file",
    ),
    ("a number as prompt", "a.jsonl", [{"prompt": 5, "completion": "w1"}], f"Row 0 of .*a.jsonl has .'prompt': 5, .*{ENDS}"),
    ("no answer", "a.jsonl", [{"prompt": "w5", "completion": None}], f"Row 0 of .*'completion': None.: expected .*{ENDS}"),
    ("no messages", "a.jsonl", [{"messages": []}], f"Row 0 of .*'messages': .*: expected .*{ENDS}"),
    ("no UTF-8", "a.jsonl", b'{"prompt": "\xff"}', "a.jsonl cannot be read as UTF-8 text"),
    ("JSON cut short", "a.json", ["{oops"], "a.json cannot be read as json: "),
    ("CSV without columns", "a.csv", [], "a.csv has no rows"),
    ("CSV with a comma too many", "a.csv", ["prompt,completion", "w1,w2,w3"], "Row 0 of .*a.csv has more or fewer cells"),
    ("no Parquet", "a.parquet", ["hello"], "a.parquet cannot be read as parquet: "),
    ("another ending", "a.txt", ["hello"], "a.txt ends in '.txt': expected .jsonl, .json, .csv or .parquet"),
    ("not there", "a.jsonl", None, "a.jsonl does not exist. Correct the path in data.files.align"),
    ("rows of the eval split", "a.jsonl", TEXTS[:32], "Overlapping splits: 8 prompts are in more than one of"),
]


@table("name, content, message", DATA)
def test_data(refused, no_weights, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json_lines(content).encode())
    refused(message, f"data.files.align={tmp_path / name}", "data.align=100")


def test_a_byte_order_mark_is_no_bad_input(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(TEXTS[:2]), encoding="utf-8-sig")
    files = dict.fromkeys(("extract", "align", "eval"), str(tmp_path / "a.jsonl"))
    assert load_task("records", extract=1, align=2, eval=1, files=files).align == TEXTS[:2]


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug")])
def test_errors_that_are_not_ours_keep_their_traceback(good, tmp_path, monkeypatch, error):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr(SemanticMap, "from_heads", fail)
    with pytest.raises(type(error), match="a bug"):
        main(["train", "--config", str(good / "recipe.yaml"), f"output_dir={tmp_path / 'run'}"])


def test_the_command_itself_prints_one_line(good, tmp_path):
    command = [sys.executable, "-m", "hf_semalign.cli", "train", "--config", str(good / "recipe.yaml")]
    ended = subprocess.run([*command, f"target={tmp_path / 'nowhere'}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: The model '{tmp_path / 'nowhere'}' cannot be read: ")
    assert "Traceback" not in ended.stderr
