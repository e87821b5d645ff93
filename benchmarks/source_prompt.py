"""A prompt of the source's own on a real pair: it is asked for brief answers, and the target learns to give them unasked.

    HF_ALLOW_CODE_EVAL=1 python benchmarks/source_prompt.py SOURCE TARGET MBPP.jsonl FOLDER [--rows 128 --scored 64 --bf16]

SOURCE and TARGET are folders or Hub ids of chat models with one tokenizer, MBPP.jsonl is the authors' file. The prompts are
those of MBPP's benchmark, with the opened fence. Distillation trains on the reference solutions of ``--rows`` training rows for
two epochs, once with the same prompt for both models, and once with a source that is also asked to be brief. Both are scored on
``--scored`` validation rows without that request, beside the target before training with and without it. What FOLDER has is
not computed again. It prints a table and writes ``source_prompt.json`` and ``source_prompt.md`` there. The last column is the
mean probability that the fence closes right after the reference solution, on the first 16 of these rows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from hf_semalign import SemAlignConfig
from hf_semalign.experiments.baselines.kd import KDTrainer
from hf_semalign.experiments.benchmarks.problems import CONFIGS
from hf_semalign.experiments.benchmarks.sandbox import run_program
from hf_semalign.experiments.generation import computing_in, continue_prompts, end_tokens, fastest_dtype, generating
from hf_semalign.experiments.rows import MBPP, Row, same_questions
from hf_semalign.hub.loading import load_transfer
from hf_semalign.models.loading import find_tokenizer, load_weights

REQUEST = "\nReply with the function alone: no tests, no examples, no explanation."
CELLS = {  # what is added to the scored prompts
    "source": "", "source-asked": REQUEST, "target": "", "target-asked": REQUEST, "kd": "", "kd-asked": "",
}  # fmt: skip
FENCE = "\n```"
CLOSED = 16  # rows on which the probability of closing the fence is measured
LONGEST = 1600  # characters of a row that is trained on
BATCH = 64


class Prompts:
    """The rows of MBPP as the benchmark asks them."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        config = yaml.safe_load((CONFIGS / "mbpp.yaml").read_text())
        self.text, self.opened = jinja2.Template(config["doc_to_text"]), config["gen_prefix"]
        tests = [MBPP.item(row) for row in MBPP.load("test", path)]
        self.rows = {}
        for split in ("train", "validation"):
            rows = MBPP.load(split, path)
            known = same_questions(map(MBPP.item, rows), tests)
            self.rows[split] = [row for row in rows if row["task_id"] not in known]

    def ask(self, row: Row, request: str = "") -> str:
        """The prompt of a row, rendered, with the opened fence."""
        turn = [{"role": "user", "content": self.text.render(**row) + request}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + self.opened

    def record(self, row: Row, request: str) -> Row:
        """A row to train on; a request goes to the source alone."""
        own = {"source_prompt": self.ask(row, request)} if request else {}
        return {"prompt": self.ask(row), "completion": solution(row) + FENCE, **own}


def solution(row: Row) -> str:
    """The reference solution."""
    return row["code"].replace("\r\n", "\n").rstrip()


def train(prompts: Prompts, options: argparse.Namespace, name: str) -> Path:
    """Distil, if that has not been done, and return the folder of the adapter."""
    folder, request = options.folder / name, REQUEST if "asked" in name else ""
    if not (folder / "semalign.json").is_file():
        rows = [row for row in prompts.rows["train"] if len(prompts.ask(row)) + len(row["code"]) < LONGEST]
        random.Random(42).shuffle(rows)
        align = [prompts.record(row, request) for row in rows[: options.rows]]
        args = SemAlignConfig(
            **KDTrainer.settings, output_dir=str(folder), signals_dir=str(options.folder / "signals"), num_train_epochs=2,
            learning_rate=3e-4, per_device_train_batch_size=4, gradient_accumulation_steps=4, per_device_eval_batch_size=4,
            bf16=options.bf16, use_cpu=not torch.accelerator.is_available(), max_length=640, save_steps=8, save_total_limit=1,
            logging_steps=1, report_to="none", disable_tqdm=True, seed=42,
        )  # fmt: skip
        trainer = KDTrainer(options.target, options.source, args, align, processing_class=prompts.tokenizer)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        trainer.save_model()
    return folder


def answer(model: Any, prompts: Prompts, rows: list[Row], request: str, path: Path) -> list[Row]:
    """Greedy answers of a model up to the closing fence, at most 512 tokens. They are saved batch by batch."""
    tokenizer = prompts.tokenizer
    known = {one["task_id"]: one for one in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}
    missing = sorted((row for row in rows if row["task_id"] not in known), key=lambda row: -len(prompts.ask(row)))
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            texts = [prompts.ask(row, request) for row in some]
            asked = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
            new = continue_prompts(
                model,
                asked["input_ids"].to(model.device),
                asked["attention_mask"].to(model.device),
                max_new_tokens=512,
                eos_token_ids=end_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                has_ended=lambda tokens: FENCE in tokenizer.decode(tokens),
            )
            for row, tokens in zip(some, new.tolist(), strict=True):
                code, ended, _ = tokenizer.decode(tokens, skip_special_tokens=True).partition(FENCE)
                known[row["task_id"]] = {"task_id": row["task_id"], "answer": code, "ended": bool(ended)}
                file.write(json.dumps(known[row["task_id"]]) + "\n")
            file.flush()
    return [known[row["task_id"]] for row in rows]


@torch.no_grad()
def closing(model: Any, prompts: Prompts, rows: list[Row], request: str) -> float:
    """Mean probability that the fence closes right after the reference solution."""
    found = []
    for row in rows:
        code, whole = (
            prompts.tokenizer(prompts.ask(row, request) + text, add_special_tokens=False)["input_ids"]
            for text in (solution(row), solution(row) + FENCE)
        )
        first = next(k for k, token in enumerate(whole) if code[k : k + 1] != [token])
        logits = model(torch.tensor([whole], device=model.device)).logits[0].float().log_softmax(-1)
        found.append(sum(logits[k - 1, whole[k]] for k in range(first, len(whole))).exp().item())
    return sum(found) / len(found)


def measure(prompts: Prompts, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The figures of a cell. The source writes no answers, because it is slow on a CPU."""
    rows, request = prompts.rows["validation"][: options.scored], CELLS[name]
    if name.startswith("kd"):
        model: Any = load_transfer(train(prompts, options, name), target=options.target)[0].merge_and_unload()
    else:
        model = load_weights(options.source if name.startswith("source") else options.target, dtype="auto")
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    with generating(model), computing_in(model, fastest_dtype(model)):
        closes = closing(model, prompts, rows[:CLOSED], request)
        if name.startswith("source"):
            return {"P(fence closes)": closes}
        answers = answer(model, prompts, rows, request, options.folder / f"{name}.jsonl")
    passed = [
        run_program("\n".join([one["answer"], row.get("test_setup_code", ""), *row["test_list"]])).passed
        for row, one in zip(rows, answers, strict=True)
    ]
    tokens = [len(prompts.tokenizer(one["answer"])["input_ids"]) for one in answers]
    wordy = ["assert" in one["answer"] or "print(" in one["answer"] for one in answers]
    return {
        "rows": len(rows),
        "passed, %": 100 * sum(passed) / len(rows),
        "tokens an answer": sum(tokens) / len(rows),
        "with tests or examples, %": 100 * sum(wordy) / len(rows),
        "P(fence closes)": closes,
        "outcomes": "".join(str(int(one)) for one in passed),
    }


def main() -> None:
    """Train and score what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("mbpp")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--scored", type=int, default=64)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    run_program("")  # report a missing opt-in or sandbox before models are trained
    options.folder.mkdir(parents=True, exist_ok=True)
    place = options.folder / "source_prompt.json"
    cells = json.loads(place.read_text()) if place.is_file() else {}
    prompts = Prompts(options.mbpp, find_tokenizer(options.target))
    for name in CELLS:
        if name not in cells:
            cells[name] = measure(prompts, options, name)
            place.write_text(json.dumps(cells, indent=1) + "\n")
    figures = ("passed, %", "tokens an answer", "with tests or examples, %", "P(fence closes)")
    lines = [f"| | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name in CELLS:
        shown = (f"{cells[name][figure]:.3g}" if figure in cells[name] else "-" for figure in figures)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    table = "\n".join(lines) + "\n"
    (options.folder / "source_prompt.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
