"""One transfer of a recipe, trained with SemAlign, one of its trials or TRL's SFT, and measured: what the ablation repeats."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rivals import sft_trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trials import TRIALS

from hf_semalign.cache.source import Source
from hf_semalign.experiments.evaluation import exact_match
from hf_semalign.experiments.recipe import Recipe, load_recipe
from hf_semalign.method.losses import token_cross_entropy, token_kl
from hf_semalign.models.anatomy import CausalLM, dissect
from hf_semalign.models.names import resolve_model
from hf_semalign.splits import Collator, encode, valid_positions


def load(name: str) -> PreTrainedModel:
    """A model of a recipe, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(resolve_model(name)).eval()


@torch.no_grad()
def measure(model: CausalLM, source: CausalLM, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """KL(source || model) and answer cross-entropy, both in nats a token over all valid positions; models of one vocabulary."""
    model.eval()
    kl = loss = count = 0.0
    for batch in batches:
        valid = valid_positions(batch["labels"])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        own, theirs = (
            (anatomy.decoder(**inputs)[0][valid], anatomy.output_head()) for anatomy in map(dissect, (model, source))
        )
        kl += token_kl(*own, *theirs).sum().item()
        loss += token_cross_entropy(*own, batch["labels"][:, 1:][valid[:, :-1]]).sum().item()
        count += int(valid.sum())
    return {"kl": kl / count, "loss": loss / count}


def transfer(recipe: Path, settings: Mapping[str, Any] | None, seed: int, folder: Path) -> dict[str, Any]:
    """Train a recipe's target under changed settings and measure it on the eval split, or read what an earlier run of it left.

    Args:
        recipe: a YAML file.
        settings: fields of :class:`SemAlignConfig`; with them may stand ``method``, ``sft`` or a name of ``TRIALS``. ``None``
            trains nothing: the target as it is, and the source.
        seed: seed of LoRA and of the order of the rows.
        folder: gets ``results.json``.

    Returns:
        ``metrics`` by role, ``steps``, and the ``seconds`` of training alone.
    """
    results = folder / "results.json"
    if not results.is_file():
        disable_progress_bar()
        logging.disable(logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        material = Material.of(recipe)
        found = material.ends() if settings is None else train(material, dict(settings), seed, folder)
        results.write_text(json.dumps(found, indent=1))
    return json.loads(results.read_text())


class Material:
    """Data and models of a recipe as the benchmarks need them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.target))
        self.records = recipe.data.load()
        splits = {"extract": self.records.extract, "align": self.records.align, "eval": self.records.eval}
        length = recipe.data.max_length
        self.rows = {name: encode(rows, self.tokenizer, split=name, max_length=length) for name, rows in splits.items()}
        self.collator = Collator(self.tokenizer.pad_token_id)
        self.source = load(recipe.source)

    @staticmethod
    @cache
    def of(path: Path) -> Material:
        """That of a file, read once in a process."""
        return Material(load_recipe(path))

    def evaluate(self, model: CausalLM) -> dict[str, Any]:
        """:func:`measure` on the eval split, and exact match by skill where the records have any."""
        found: dict[str, Any] = measure(model, self.source, DataLoader(self.rows["eval"], 100, collate_fn=self.collator))
        if "skill" in self.records.eval[0]:
            found["exact_match"] = exact_match(model, self.tokenizer, self.records.eval)
        return found

    def ends(self) -> dict[str, Any]:
        """Figures of the target before, and of the source."""
        return {"metrics": {"target": self.evaluate(load(self.recipe.target)), "source": self.evaluate(self.source)}}


def train(material: Material, settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure; see :func:`transfer`."""
    method, budget = settings.pop("method", "semalign"), settings.pop("budget", "equal steps")
    recipe, target = material.recipe, load(material.recipe.target)
    quiet = {
        "disable_tqdm": True,
        "logging_strategy": "no",
        "log_level": "error",
        "signals_dir": str(folder.parent / "_signals"),
    }
    args = recipe.config(folder / "trainer", **{**quiet, "seed": seed, **settings})
    if budget == "four times the steps":
        args.max_steps *= 4
    if budget == "equal compute":
        batches = len(material.rows["align"]) / args.train_batch_size
        args.max_steps = equal_steps(args.max_steps, method, batches, *map(sizes, (material.source, target)))
    trainer: Any
    if method == "sft":
        trainer = sft_trainer(target, material.rows["align"], material.collator, args, material.tokenizer)
    else:
        trainer = TRIALS[method](
            target,
            Source(resolve_model(recipe.source)),
            args,
            material.rows["align"],
            extract_dataset=material.rows["extract"],
            processing_class=material.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = {"metrics": {"semalign": material.evaluate(trainer.model)}, "steps": trainer.state.global_step, "seconds": seconds}
    if method != "sft":
        found |= {"source_layers": trainer.pairing.source_layers, "scales": trainer.scales}
        found |= {"relation_weight": args.relation_weight}  # which some trials change as they go
    return found


def sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, weights of one of them, and weights of the head: what a forward multiplies with."""
    anatomy = dissect(model)
    return len(anatomy.layers), sum(p.numel() for p in anatomy.layers[0].parameters()), anatomy.head_weight().numel()


def equal_steps(steps: int, method: str, batches: float, source: tuple[int, int, int], target: tuple[int, int, int]) -> int:
    """Steps of SFT or of the strict frontier that cost what so many of KD with cached signals do.

    Cost is counted in forwards of the target over a batch, by weights: backward through a frozen layer or head costs what its
    forward does, and layers below the frontier cost nothing, but that each is run once over the data (the prefix). The
    source runs once over the data. LoRA, attention and the losses are not counted.

    Args:
        steps: of KD.
        method: ``sft``, or SemAlign under the strict frontier.
        batches: in one pass over the data.
        source: :func:`sizes` of the source.
        target: of the target.
    """
    depth, layer, head = target
    forward = depth * layer + head
    source_pass = batches * (source[0] * source[1] + source[2]) / forward
    if method == "sft":
        return round(steps + source_pass / 2)
    prefix = batches * (depth - 1) * layer / forward
    step = sum(2 * (above * layer + head) / forward for above in range(1, depth + 1)) / depth
    return round((2 * steps - prefix) / step)
