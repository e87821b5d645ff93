"""What a run will do and cost, counted before any weight is loaded, for dry runs, equal compute and comparisons.

The unit of cost is a **target forward**: one forward of the whole target over an align example of mean length, with the heads
on its valid positions. It is counted in multiplications of a state with a weight. Backward through a frozen layer costs as much
as its forward. Layers below the frontier cost nothing if there is a target prefix. Not counted are LoRA, the products of
attention, the losses between positions, and the singular value decompositions of Seeking.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import EngFormatter
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_semalign.cache.examples import Examples
from hf_semalign.cache.prefix import prefix_pays
from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError
from hf_semalign.experiments.answers import question
from hf_semalign.experiments.methods import METHODS
from hf_semalign.experiments.recipe import DataSettings, Recipe, load_tokenizer
from hf_semalign.experiments.rows import Row
from hf_semalign.experiments.tasks import TaskData
from hf_semalign.method.losses import LOGIT_ROWS
from hf_semalign.method.vocabularies import differing
from hf_semalign.models.anatomy import Size, dissect
from hf_semalign.models.loading import product_seconds
from hf_semalign.splits import check_disjoint, column_chunks
from hf_semalign.tokenization import IGNORED, prompt_ids
from hf_semalign.training.order import rows_by_stage
from hf_semalign.training.preparation import Counts, Encoded, Preparation, encode_splits, prepare
from hf_semalign.training.source_rows import has_source_columns

logger = logging.getLogger(__name__)
ADAM_BYTES = 16  # per trained number, in float32: the number, its gradient and two moments
# What backward keeps per layer and position: so many times the outputs of its weights, and so many states of its width
# (measured on Qwen2). Under autocast, norms also keep float32.
KEPT_OUTPUTS, KEPT_STATES, KEPT_IN_HALF = 1.5, 7, 1.25
LOGIT_BUFFERS = 3  # of LOGIT_ROWS x vocabulary in float32, for the output loss
LIBRARIES = 0.7e9  # memory of a process for torch, transformers and other libraries
CPU_SHARE = 0.7  # training's share of the speed of a product of 64 states with a square weight
GPU_FLOPS = 1e14  # sustained, of a large GPU


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        method: a key of ``METHODS``.
        source: name of the source.
        target: name of the target.
        source_layers: the source layer of each target layer; ``None`` if attribution will choose it, empty if the layer loss
            has no weight.
        stages: first step of each stage, and the end.
        splits: rows and tokens of each split.
        sizes: of ``source`` and ``target``.
        cost: target forwards by phase.
        multiplications: of one target forward.
        disk_bytes: signals, at most.
        memory_bytes: estimate, by what needs it: the source's pass, training, and beside training the target prefix, which is
            on the GPU or the host. The other two are of the GPU, or on a CPU of the process.
        shared_tokens: rows of both heads that map and KL are over; with two tokenizers the map alone.
        aligned: if the source reads rows of its own, the share of the target's answer tokens that are used.
        machine: the hardware that the time is for.
        flops: floating-point operations a second that it sustains.
    """

    method: str
    source: str
    target: str
    source_layers: tuple[int, ...] | None
    stages: tuple[int, ...]
    splits: dict[str, Counts]
    sizes: dict[str, Size]
    cost: dict[str, float]
    multiplications: float
    disk_bytes: int
    memory_bytes: dict[str, int]
    shared_tokens: int
    aligned: float | None = None
    machine: str = "100 TFLOP/s sustained, as on a large GPU (training.use_cpu=true: on this CPU)"
    flops: float = GPU_FLOPS

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1]

    def seconds(self, flops: float) -> float:
        """Time on hardware that sustains so many floating-point operations per second."""
        return 2 * sum(self.cost.values()) * self.multiplications / flops

    def steps_for(self, budget: float) -> int:
        """Number of steps for a budget in target forwards.

        Raises:
            ValueError: the budget leaves fewer steps than stages after the work before training.
        """
        fixed = sum(self.cost.values()) - self.cost["training"]
        steps = round((budget - fixed) * self.steps / self.cost["training"])
        if steps < len(self.stages) - 1:
            raise InputError(
                f"{self.method} costs {fixed:.0f} target forwards before training, and {budget:.0f} are to be spent in all, "
                f"which leaves {steps} steps for {len(self.stages) - 1} stages: raise the budget."
            )
        return steps

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)


class Material:
    """What the plans of several methods share on one task: data, tokenizer, and the source without its weights.

    Args:
        recipe: the recipe of the task.
        data: its data, if they have been read already.
        tokenizer: the target's tokenizer, if it has been loaded already.
    """

    def __init__(self, recipe: Recipe, data: TaskData | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.data = data or recipe.data.load()
        self.tokenizer = tokenizer or load_tokenizer(recipe)
        self._name = recipe.source
        self._sources: dict[str, Source] = {}
        self._encoded: dict[Any, tuple[dict[str, Any], Encoded]] = {}

    def encode(self, splits: dict[str, Any], source: Source, target: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode splits like :func:`hf_semalign.training.preparation.encode_splits`, and the same rows only once."""
        key = id(source), max_length, *((name, id(rows)) for name, rows in splits.items())
        if key not in self._encoded:  # the rows stay here, so that no others get their ids
            self._encoded[key] = splits, encode_splits(splits, source, target, tokenizer, max_length)
        return self._encoded[key][1]

    def source(self, args: SemAlignConfig) -> Source:
        """The source under some settings."""
        key = json.dumps([args.mixed_precision, args.source_parts])
        if key not in self._sources:
            self._sources[key] = Source(self._name, precision=args.mixed_precision, parts=args.source_parts)
        return self._sources[key]


def plan_recipe(recipe: Recipe, material: Material | None = None) -> Plan:
    """Plan a recipe's run. The data are read, and the models without their weights.

    Args:
        recipe: the recipe.
        material: what is already known of its task.

    Raises:
        ValueError: the run would be refused.
    """
    planned, dtype = plans_of(recipe, material or Material(recipe))
    if not recipe.training.get("use_cpu"):  # a recipe for a GPU is planned for one, whatever this machine has
        return planned
    # Two operations per multiplication, at the share of the speed of one product that training reaches.
    size = 2048
    flops = CPU_SHARE * 2 * 64 * size**2 / product_seconds(dtype, size)
    return replace(planned, flops=flops, machine=f"{EngFormatter('FLOP/s', places=0)(flops)} sustained, as this CPU in {dtype}")


def plans_of(recipe: Recipe, material: Material) -> tuple[Plan, torch.dtype]:
    """The plan of all rounds of a recipe together, and the dtype that training computes in.

    Raises:
        ValueError: the run would be refused.
    """
    args, data, tokenizer = recipe.config(Path(recipe.output_dir)), material.data, material.tokenizer
    align = data.align
    if recipe.data.answers != "dataset":
        check_disjoint({"extract": data.extract, "align": align, "eval": data.eval})
        own = material.source(args).tokenizer
        as_text = own is not None and differing(own, tokenizer) is not None
        as_text |= any(map(has_source_columns, (data.extract, align, data.eval)))
        align = _as_if_answered(recipe.data, align, tokenizer, as_text=as_text)
    plans, cost, stages = [], dict[str, float](), [0]
    for settings in recipe.rounds(args, len(data.align)):
        given = settings, align, data.eval, data.extract, tokenizer
        known = prepare(recipe.target, material.source(settings), *given, encode=material.encode)
        plans.append(plan(known, settings, recipe.method, recipe.data.answers))
        stages += [stages[-1] + boundary for boundary in plans[-1].stages[1:]]
        for phase, amount in plans[-1].cost.items():
            if phase != "attribution" or phase not in cost:  # the scores are computed once
                cost[phase] = cost.get(phase, 0.0) + amount
    dtype = torch.bfloat16 if args.bf16 else known.target_dtype
    disk = sum(one.disk_bytes for one in plans)
    return replace(plans[0], cost=cost, stages=tuple(stages), disk_bytes=disk), dtype


def _as_if_answered(settings: DataSettings, rows: list[Row], tokenizer: PreTrainedTokenizerBase, *, as_text: bool) -> list[Row]:
    """Rows in place of those whose answers a model will write: the data set's answers, or answers of the greatest length.

    With ``as_text``, the answers are texts of so many words, because the source reads them in its own rows.
    """
    if all(row.get("completion") or (row.get("messages") or [{}])[-1].get("role") == "assistant" for row in rows):
        logger.info(
            "The %s has not written its answers yet: they are assumed to be as long as the data set's.", settings.answers
        )
        return rows
    length = settings.max_new_tokens
    logger.info("The %s has not written its answers yet: each is assumed to have %d tokens.", settings.answers, length)
    filled = []
    for number, row in enumerate(rows):
        if as_text:
            asked, text = question(row), " a" * length
            in_chat = not isinstance(asked["prompt"], str)
            filled.append({**asked, "completion": [{"role": "assistant", "content": text}] if in_chat else text})
            continue
        ids, answer = prompt_ids(question(row), tokenizer, f"Row {number}"), [tokenizer.eos_token_id] * length
        filled.append({"input_ids": ids + answer, "labels": [IGNORED] * len(ids) + answer})
    return filled


def plan_table(plan: Plan) -> Table:
    """The plan as a table for the terminal."""
    table = Table(title=f"{plan.source} to {plan.target}, by {plan.method}", show_header=False)
    pairs = "chosen by attribution"
    if plan.source_layers is not None:
        pairs = ", ".join(f"{layer} to {k}" for k, layer in enumerate(plan.source_layers)) or "none, relation_weight is 0"
    spans = [f"{first}-{last}" for first, last in pairwise(plan.stages)]
    splits = [f"{name} {counts.rows:,} rows, {counts.valid:,} answer tokens" for name, counts in plan.splits.items()]
    rows = {
        "layers": f"{plan.sizes['source'].layers} source, {plan.sizes['target'].layers} target",
        "pairs (source to target)": pairs,
        "stages (optimizer steps)": f"{len(spans)}: {', '.join(spans)}",
        "splits": "; ".join(splits),
        "shared tokens": f"{plan.shared_tokens:,}",
        **({} if plan.aligned is None else {"answer tokens used": f"{plan.aligned:.1%}"}),
        "cost (target forwards)": ", ".join(f"{phase} {amount:,.0f}" for phase, amount in plan.cost.items()),
        "operations": f"{EngFormatter('FLOP', places=1)(plan.seconds(1))}, evaluation not counted",
        "time": f"at least {timedelta(seconds=math.ceil(plan.seconds(plan.flops)))} at {plan.machine}",
        "disk": f"{decimal(plan.disk_bytes)} at most",
        "memory (estimate)": ", ".join(f"{phase} {decimal(amount)}" for phase, amount in plan.memory_bytes.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def plan(known: Preparation, args: SemAlignConfig, method: str, answers: str = "dataset") -> Plan:
    """Plan a run that has been prepared. What only one method does is in its ``own_cost``.

    Args:
        known: the prepared run.
        args: the settings.
        method: a key of ``METHODS``.
        answers: who writes the answers of the align split, see :class:`hf_semalign.experiments.recipe.DataSettings`.
    """
    METHODS[method].trainer.check(known, args)
    splits = {name: Counts.of(rows) for name, rows in known.splits.items()}
    read = {name: Counts.of(rows) for name, rows in known.source_splits.items()} if known.has_source_rows else splits
    stored = Size.of(dissect(known.source.shape))
    source = replace(stored, bytes=known.source.dtype.itemsize)
    target = replace(Size.of(known.target), bytes=known.target_dtype.itemsize)
    align, source_layers = splits["align"], known.pairing.source_layers if known.pairing else None
    source_layers = source_layers if args.uses_pairs else ()
    distinct = target.layers if source_layers is None else len(set(source_layers))
    seen_tokens, final, mapped = _read(known, args)
    prefix, batch = prefix_pays(args, known.frontier, known.schedule.total_steps, align.rows), _batch(known, args)
    cost = {}
    if answers != "dataset":
        writer, written = (source, read["align"]) if answers == "source" else (target, align)
        cost["answers"] = writer.forward(written.tokens, written.valid)
    if known.pairing is None:
        extract = read["extract"]  # backward runs each layer forward once more
        cost["attribution"] = 3 * source.forward(extract.tokens, extract.valid)
    if args.learns_from_source and args.signals == "cached":
        cost["signals"] = source.forward(seen_tokens) + mapped * source.width * target.width
    held = {}
    if prefix:
        cost["prefix"] = target.forward(align.tokens, layers=target.layers - 1)
        held["target prefix"] = align.tokens * target.width * target.bytes
    example = align.tokens / align.rows, align.valid / align.rows
    source_tokens = read["align"].tokens / read["align"].rows
    cost["training"] = batch * sum(
        known.schedule.steps(stage) * _step(known, args, source, target, *example, source_tokens, stage, prefix)
        for stage in range(known.schedule.num_stages)
    )
    cost |= METHODS[method].own_cost(known, args)
    unit = target.forward(*example)
    evaluated = sum(counts.valid for name, counts in read.items() if name.startswith("eval"))
    disk = evaluated * (source.width + distinct * target.width) * source.bytes
    if args.learns_from_source:
        disk += (final * source.width + mapped * target.width) * source.bytes
    return Plan(
        method,
        known.source.name,
        known.target_id,
        source_layers,
        known.schedule.boundaries,
        splits,
        {"source": source, "target": target},
        {phase: amount / unit for phase, amount in cost.items()},
        unit,
        disk if args.signals == "cached" else 0,
        _memory(known, args, source, target, stored.bytes) | held,
        known.shared_tokens,
        known.aligned.get("align"),
    )


def _read(known: Preparation, args: SemAlignConfig) -> tuple[int, int, int]:
    """What training reads of the source: tokens of the examples that it sees, positions of their final states, and positions of
    mapped states over all paired source layers.
    """
    rows, stages = known.source_splits["align"], range(known.schedule.num_stages)
    examples, by_stage = Examples(rows), rows_by_stage(args, known.schedule, len(rows))
    ids = np.concatenate([chunk.to_numpy() for chunk in column_chunks(rows, "example_id")])
    places = examples.places(torch.from_numpy(ids.copy()))
    read = [places if by_stage is None else places[by_stage[stage]] for stage in stages]
    seen = np.unique(np.concatenate(read))
    by_layer: dict[int, list[np.ndarray]] = {}
    for stage in stages if args.uses_pairs else ():
        for k in known.frontier.supervised(stage):
            by_layer.setdefault(known.pairing.source_layers[k] if known.pairing else k, []).append(read[stage])
    mapped = sum(int(examples.answers[np.unique(np.concatenate(some))].sum()) for some in by_layer.values())
    return int(examples.tokens[seen].sum()), int(examples.answers[seen].sum()), mapped


def _batch(known: Preparation, args: SemAlignConfig) -> int:
    """Number of examples in an optimizer step."""
    return min(args.train_batch_size * args.gradient_accumulation_steps * args.world_size, len(known.splits["align"]))


def _step(
    known: Preparation,
    args: SemAlignConfig,
    source: Size,
    target: Size,
    tokens: float,
    valid: float,
    source_tokens: float,
    stage: int,
    prefix: bool,
) -> float:
    """Cost of an example in a stage: forward from its first layer, backward to the lowest layer that trains, and heads."""
    above = target.layers - known.frontier.trained(stage)[0]
    layers = above + (above if prefix else target.layers)
    heads = {"kl": 2 * target.head + source.head, "cosine": 0, "answers": 3 * target.head}[args.output_loss]
    if args.uses_pairs and args.layer_loss == "fisher":
        heads += 3 * target.head * len(known.frontier.supervised(stage))
    online = source.forward(source_tokens) if args.learns_from_source and args.signals == "online" else 0
    return target.forward(tokens, layers=layers) + valid * heads + online


def _memory(known: Preparation, args: SemAlignConfig, source: Size, target: Size, stored: int) -> dict[str, int]:
    """Peak bytes of the source's pass and of training. ``stored`` is the bytes of a weight in the source's files."""
    longest, read = (
        max(int(Examples(rows).tokens.max()) for rows in side.values()) for side in (known.splits, known.source_splits)
    )
    above = max(target.layers - known.frontier.trained(stage)[0] for stage in range(known.schedule.num_stages))
    names = set(known.lora_targets)
    trained = args.lora_r * sum(
        sum(module.get_parameter("weight").shape)
        for layer in known.target.layers
        for path, module in layer.named_modules()
        if path.rpartition(".")[2] in names
    )
    half = args.bf16 or args.fp16
    always: float = target.parameters * target.bytes + source.head * source.bytes + trained * ADAM_BYTES
    always += LIBRARIES if args.use_cpu else 0

    kept = (KEPT_OUTPUTS * target.outputs + KEPT_STATES * target.width) * (KEPT_IN_HALF if half else 1) * target.layers
    states = args.per_device_train_batch_size * longest * kept * above / target.layers * (2 if half else target.bytes)
    training = always + states + LOGIT_BUFFERS * LOGIT_ROWS * target.head / target.width * 4

    whole = args.source_memory == "resident"
    weights = (source.parameters if whole else 2 * source.layer) * source.bytes
    loading = source.parameters * stored if whole and source.bytes != stored else 0  # weights as they are stored stand beside
    window = args.per_device_eval_batch_size * read * (source.outputs + source.width * source.layers) * source.bytes
    return {"source": int(always + weights + max(loading, window)), "training": int(training)}
