"""TRL's GKD on the rows of a recipe, measured and scored as `semalign train` does it: a cell of the real pair's table.

    HF_ALLOW_CODE_EVAL=1 python benchmarks/real_pair_gkd.py recipes/qwen2.5-coder-1.5b-to-0.5b/mbpp.yaml FOLDER [key=value ...]
        [--on-policy]

By default it teaches the data's answers (``lmbda=0``). ``--on-policy`` lets the target write them (``lmbda=1``,
``data.max_new_tokens``), a batch at a time. ``FOLDER/results.json`` gets what it has cost and is worth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rivals import gkd_trainer
from torch.utils.data import DataLoader

from hf_semalign.experiments.benchmarks.harness import run_benchmark
from hf_semalign.experiments.evaluation import answer_loss, final_states
from hf_semalign.experiments.recipe import load_recipe, load_tokenizer
from hf_semalign.method.losses import token_kl
from hf_semalign.models.anatomy import dissect
from hf_semalign.models.hooks import without_cudnn_attention
from hf_semalign.models.loading import load_model
from hf_semalign.models.names import resolve_model
from hf_semalign.splits import Collator, encode


def main() -> None:
    """Train, measure, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--on-policy", action="store_true")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(options.recipe, options.overrides)
    data, tokenizer, args = recipe.data.load(), load_tokenizer(recipe), recipe.config(options.folder)
    args.disable_tqdm, args.save_strategy, args.report_to = True, "no", []
    collator = Collator(tokenizer.pad_token_id)
    align, held_out = (encode(rows, tokenizer, split="rows", max_length=args.max_length) for rows in (data.align, data.eval))
    models = [load_model(resolve_model(name), precision=args.mixed_precision) for name in (recipe.target, recipe.source)]
    new_tokens = recipe.data.max_new_tokens if options.on_policy else None
    trainer = gkd_trainer(models[0], models[1], align, collator, args, processing_class=tokenizer, max_new_tokens=new_tokens)
    started = time.perf_counter()
    with without_cudnn_attention():
        trainer.train()
    seconds = {"training": time.perf_counter() - started}
    trainer.save_model(str(options.folder))
    model: Any = trainer.model

    def batches() -> DataLoader:
        return DataLoader(held_out, args.per_device_eval_batch_size, collate_fn=collator)

    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        kl, count = 0.0, 0
        heads = [dissect(one).output_head() for one in (model, models[1])]
        for (ours, _), (theirs, _) in zip(final_states(model, batches()), final_states(models[1], batches()), strict=True):
            with torch.no_grad():
                kl, count = kl + token_kl(ours, heads[0], theirs, heads[1]).sum().item(), count + len(ours)
        found: dict[str, Any] = {"kl": kl / count, "loss": answer_loss(model, batches())}
    models[1].cpu()
    scoring = recipe.benchmark
    for task in scoring.tasks if scoring else ():
        how = {"files": scoring.files, "limit": scoring.limit, "chat_template": scoring.chat_template} if scoring else {}
        found.setdefault("benchmarks", []).append(run_benchmark(model, tokenizer, task, **how))
    results = {"metrics": {"gkd": found}, "seconds": seconds, "steps": trainer.state.global_step}
    results["history"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    (options.folder / "results.json").write_text(json.dumps(results, indent=1))
    print(json.dumps({**seconds, **{name: found[name] for name in ("kl", "loss")}}))


if __name__ == "__main__":
    main()
