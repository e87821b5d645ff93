"""The four benchmarks over their real files: loaders, prompts and scorers, answered from a table instead of by a model.

    HF_ALLOW_CODE_EVAL=1 python benchmarks/harness_check.py FOLDER [--model NAME --tokenizer NAME --limit 2]

FOLDER holds ``mmlu/test/*_test.csv``, ``gsm8k/test.jsonl``, ``humaneval/HumanEval.jsonl.gz`` and ``mbpp/mbpp.jsonl``. Right
answers must score 100 %, wrong ones 0 %. With a model, some rows of each task are answered by it as well.
"""

import argparse
import time

from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from hf_semalign.experiments.benchmarks.harness import BENCHMARK_METRICS, run_benchmark
from hf_semalign.models.loading import find_tokenizer, load_weights
from hf_semalign.models.names import resolve_model

ANSWERS = {  # task: from a row to a right answer, and to a wrong one
    "gsm8k": (
        lambda row: " " + row["answer"],
        lambda row: f" {row['answer'].rpartition('####')[0]} So the answer is {row['answer'].rpartition('#### ')[2]}1.",
    ),
    "humaneval": (lambda row: row["canonical_solution"], lambda row: "    return None\n"),
    "mbpp": (
        lambda row: f"{row['code']}\n```\nThat is it.",
        lambda row: f"{row['code']}\n{row['test_list'][0].split('assert')[1].split('(')[0].strip(' (')} = lambda *_: None\n",
    ),
}


class Answers(LM):
    """Answers every row from itself, cut at the stop words as a model's answers are."""

    def __init__(self, task, wrong):
        super().__init__()
        self.task, self.wrong, self.prompts = task, wrong, []

    def generate_until(self, requests):
        """The right answer of each row, or a wrong one."""
        self.prompts += [request.args[0] for request in requests]
        answer = ANSWERS[self.task][self.wrong]
        return [postprocess_generated_text(answer(request.doc), request.args[1]["until"], None) for request in requests]

    def loglikelihood(self, requests):
        """One choice is certain: the answer, or the one after it."""
        self.prompts += [request.args[0] for request in requests]
        wanted = ((request, "ABCD"[(request.doc["answer"] + self.wrong) % 4]) for request in requests)
        return [(0.0 if request.args[1].strip() == letter else -9.0, False) for request, letter in wanted]

    def loglikelihood_rolling(self, requests):
        """No task wants it."""
        raise NotImplementedError

    tokenizer_name = "none"

    def apply_chat_template(self, history, add_generation_prompt=True):
        """Roles and texts."""
        return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in history)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARK_METRICS), choices=list(BENCHMARK_METRICS))
    parser.add_argument("--chat-template", action="store_true", help="HumanEval in the form for chats")
    parser.add_argument("--model", help="name of a model that answers some rows as well")
    parser.add_argument("--tokenizer", help="by default the one that lies with it")
    parser.add_argument("--limit", type=int, help="first rows only")
    options = parser.parse_args()
    print(f"{'task':<10} {'answers':<8} {'rows':>6} {'value':>8} {'seconds':>8}  data")
    model = tokenizer = None
    if options.model:
        model = load_weights(resolve_model(options.model), dtype="auto").eval()
        tokenizer = find_tokenizer(options.tokenizer or resolve_model(options.model))
    for task in options.tasks:
        answering = [("right", Answers(task, False)), ("wrong", Answers(task, True))] if model is None else [("model", model)]
        for name, lm in answering:
            started = time.perf_counter()
            settings = {"files": options.folder, "limit": options.limit, "chat_template": options.chat_template}
            entry = run_benchmark(lm, tokenizer, task, **settings)
            seconds = time.perf_counter() - started
            print(
                f"{task:<10} {name:<8} {entry['rows']:>6} {entry['value']:>8.2%} {seconds:>8.1f}  {entry['data']}", flush=True
            )
            if name == "right":
                print("--- first prompt, as it is:", lm.prompts[0], "---", sep="\n")
            elif name == "model":
                print(entry)


if __name__ == "__main__":
    main()
