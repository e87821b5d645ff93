"""LaTen (Tan et al., ACL 2025): locate neurons of the source, translate them by hypernetworks, and add them to the target.

For an example, LaTen locates the layers and neurons of source and target that matter for its last answer token. Hypernetworks
translate the source's rows of up and value and columns of down and output to the target's width. The result (Delta) is added to
the target's rows and columns. Located layers are matched in order of depth, and their neurons in order of score. The
hypernetworks take one training step per extract example, on its answer and the answers of 15 align examples. Then Delta is
computed for one align example and injected. Nothing is trained after that.

Differences from the authors' public code, and their reasons:

- Their code divides a state by the square root of its standard deviation. The final norm divides by the root mean square.
- Their attention neuron uses only the last key position. An attention neuron is a sum over all key positions.
- Their code never saves Delta, so it saves the unchanged target. Here Delta is LoRA of its own rank and scale 1 (a one-hot
  factor times Delta). It is saved, evaluated, pushed and loaded on the unchanged target like the result of any other method.
- Their learning rate is 3e-5 in one place and 3e-4 in another. Here it is the one with the lower answer loss after injection,
  on align rows that were not used for pre-alignment. The eval split is never used.
- Their script builds a one-cycle schedule but never steps it, and torch's version would also change the first beta. Here the
  schedule is stepped, and beta is 0.9 as announced.
- Under grouped-query attention their code leaves out value. Here an attention neuron is a channel of a query head, and the
  updates of neurons that share a row of value are summed.
- Their code has a setting, but no rule, for the checkpoint to inject. Here it is the last one.

As in their code, the hypernetworks' weights are drawn from N(0, 1e-5), where 1e-5 is the standard deviation (their ``std``).
Gradients are summed over the examples, each with its own penalty. Trailing punctuation of an answer is ignored.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, NotFiniteError
from hf_semalign.experiments.baselines.carrier import Carrier, Hypernetworks, knowledge_of, penalty, sites
from hf_semalign.experiments.baselines.neurons import (
    Located,
    NeuronParts,
    Unembedding,
    answer_label,
    check_neurons,
    locate,
    neuron_parts,
)
from hf_semalign.experiments.evaluation import answer_loss
from hf_semalign.files import claimed, disk_errors_explained
from hf_semalign.method.frontier import FrontierSchedule
from hf_semalign.method.losses import answer_cross_entropy
from hf_semalign.models.anatomy import Anatomy, CausalLM, Head, Size, dissect
from hf_semalign.models.hooks import without_cudnn_attention
from hf_semalign.models.loading import is_quantised
from hf_semalign.models.lora import add_lora
from hf_semalign.splits import Collator, valid_positions
from hf_semalign.tokenization import Record
from hf_semalign.training.engines import is_set
from hf_semalign.training.preparation import Counts, Preparation
from hf_semalign.training.stages import train_only
from hf_semalign.transfer import TransferTrainer, timed

logger = logging.getLogger(__name__)
RATE = 0.1  # neurons per layer, as a share of the target's FFN width and hidden width
PENALTY = 1000.0  # weight of the mean square of Delta
LEARNING_RATES = (3e-5, 3e-4)  # from the authors' README and script
POOL = 80  # align rows that pre-alignment draws from
DRAWN = 15  # align rows drawn per step
VALIDATION = 80  # most align rows for choosing the learning rate


def example_losses(model: CausalLM, head: Head, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of each example's answer ``[B]``, with gradients."""
    valid = valid_positions(batch["labels"])
    hidden = dissect(model).decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    losses = answer_cross_entropy(hidden[valid], head, batch["labels"][:, 1:][valid[:, :-1]])
    return losses.new_zeros(len(valid)).index_add(0, valid.nonzero()[:, 0], losses) / valid.sum(1)


def one_cycle(step: int, steps: int, *, warmup: float = 0.1, start: float = 1 / 25) -> float:
    """Learning rate factor of torch's ``OneCycleLR`` with cosine annealing, ending at its start value.

    Runs of fewer than 11 steps have no warmup.

    Args:
        step: current step, from 0.
        steps: number of steps in the run.
        warmup: share of the steps in which the factor rises.
        start: factor at the first and the last step.
    """
    peak = max(warmup * steps - 1, 0.0)
    rising = step <= peak and peak > 0
    done = step / peak if rising else (step - peak) / max(steps - 1 - peak, 1)
    first, last = (start, 1.0) if rising else (1.0, start)
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class PreAlignment:
    """Result of pre-alignment at one learning rate: Delta of the injected example, training history, and held-out loss."""

    deltas: dict[str, torch.Tensor]
    history: list[dict[str, float]]
    held_out_loss: float


@dataclass(frozen=True)
class Draw:
    """The rows for each purpose. They depend only on the numbers of rows and the seed.

    Attributes:
        order: extract rows, one per step.
        drawn: align rows of each step, in addition to the extract row.
        injected: the align row for which Delta is injected.
        held_out: align rows for choosing the learning rate.
    """

    order: list[int]
    drawn: list[list[int]]
    injected: int
    held_out: list[int]

    @classmethod
    def draw(cls, align: int, extract: int, seed: int) -> Draw:
        """Draw the rows. Pre-alignment uses the first four fifths of the align rows, but at most ``POOL``.

        Args:
            align: number of align rows.
            extract: number of extract rows.
            seed: random seed.

        Raises:
            ValueError: there are too few align rows.
        """
        pool = min(POOL, align * 4 // 5)
        if pool < DRAWN or align - pool < 2:
            raise InputError(
                f"The align split has {align} rows: LaTen needs at least 19, for pre-alignment ({DRAWN} or more), injection "
                "(one) and choosing the learning rate (one or more)."
            )
        random_state = random.Random(seed)
        order = random_state.sample(range(extract), extract)
        drawn = [random_state.sample(range(pool), DRAWN) for _ in order]
        injected = random_state.randrange(pool, align)
        others = [row for row in range(pool, align) if row != injected]
        return cls(order, drawn, injected, others[:VALIDATION])


def neuron_counts(source: Anatomy, target: Anatomy) -> tuple[int, int]:
    """The numbers of attention and FFN neurons to transfer per layer. Needs only the shapes of the models.

    Raises:
        ValueError: the neurons of a model are unknown, the target is too narrow, or the source has fewer layers or neurons.
    """
    ours, theirs = neuron_parts(target)[1], neuron_parts(source)[1]
    width = target.head_weight().shape[1]
    attention, ffn = int(RATE * width), int(RATE * _neurons(ours)[1])
    if min(attention, ffn) < 1:
        raise InputError(
            f"The target has {width} channels: LaTen transfers a tenth of them and of the FFN neurons. Choose a wider target."
        )
    if len(theirs) < len(ours):
        raise InputError(
            f"The source has {len(theirs)} layers and the target {len(ours)}: LaTen needs a source with at least as many."
        )
    for model, parts in (("source", theirs), ("target", ours)):
        heads, inner = _neurons(parts)
        if heads < attention or inner < ffn:
            raise InputError(
                f"The {model} has {heads} attention and {inner} FFN neurons per layer: LaTen needs {attention} and {ffn}."
            )
    return attention, ffn


def _neurons(parts: Sequence[NeuronParts]) -> tuple[int, int]:
    """The numbers of attention and FFN neurons in the narrowest layer."""
    return min(len(part.value_rows) for part in parts), min(cast(Any, part.down).in_features for part in parts)


def states_read(anatomy: Anatomy, layers: int) -> int:
    """Number of states read out through the head to locate the neurons of one example in ``layers`` layers."""
    parts = neuron_parts(anatomy)[1]
    return 4 * len(parts) + layers * sum(_neurons(parts))


def special_ids(tokenizer: PreTrainedTokenizerBase | None, anatomy: Anatomy) -> set[int]:
    """Special tokens, which are skipped when neurons are located. Without a tokenizer, the model's end and pad tokens."""
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    config: Any = anatomy.decoder.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {token for token in (*ends, config.pad_token_id) if token is not None}


def _shared(rows: torch.Tensor) -> int:
    """Number of repeated entries in the rows ``[L, n]``, counted per layer."""
    return sum(len(some) - len(some.unique()) for some in rows)


def transfer_cost(known: Preparation, args: SemAlignConfig) -> dict[str, float]:
    """Multiplications for locating neurons in both models, and for pre-alignment and held-out rows at each learning rate."""
    anatomies = dissect(known.source.shape), known.target
    source, target = (Size.of(anatomy) for anatomy in anatomies)
    extract, align = (Counts.of(known.splits[split]) for split in ("extract", "align"))
    drawn, depth = Draw.draw(len(known.splits["align"]), len(known.splits["extract"]), args.seed), len(known.target.layers)
    tokens, valid = align.tokens / align.rows, align.valid / align.rows  # of an average align row
    seen = len(drawn.order) * DRAWN * tokens + extract.tokens, len(drawn.order) * DRAWN * valid + extract.valid
    translated = len(drawn.order) * 2 * depth * sum(neuron_counts(*anatomies))
    networks = 3 * translated * source.width * (source.width + target.width)
    held_out, tried = len(drawn.held_out) * target.forward(tokens, valid), len(LEARNING_RATES)
    return {
        "locating": sum(
            size.forward(extract.tokens + tokens, (extract.rows + 1) * states_read(anatomy, depth))
            for size, anatomy in zip((source, target), anatomies, strict=True)
        ),
        "training": tried * (target.forward(2 * seen[0], 3 * seen[1]) + networks),
        "choosing the learning rate": (tried + 1) * held_out,
    }


class LaTenTrainer(TransferTrainer):
    """LaTen with the interface of SemAlign's trainer: the same splits, evaluation, folder and record.

    Use it as ``LaTenTrainer(..., args=SemAlignConfig(**LaTenTrainer.settings, ...))``. Of the other settings, only ``seed``,
    ``bf16`` and the batch sizes have an effect. Batch sizes only limit memory, because a step always has 16 examples. Budget,
    learning rate and LoRA rank are part of the method. Source and target are in memory at the same time.

    It does not run the Trainer's loop, so callbacks only get ``on_log``, after training. It writes no checkpoints: an
    interrupted run starts again, with the same result.

    Attributes:
        located: neurons of the source and the target for the injected example. Set by :meth:`train`.
        deltas: the injected Delta, ``[L, n, D]`` by role (``up``, ``down``, ``value``, ``output``). Set by :meth:`train`.

    Raises:
        ValueError: the neurons of a model are unknown, the source has fewer layers or neurons, or there are several processes.
    """

    method = "laten"
    needs_extract = True
    settings = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "answers"}
    located: tuple[Located, Located]
    deltas: dict[str, torch.Tensor]
    _facts: Mapping[str, Any] = {}  # set by a finished run

    @classmethod
    def check(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse settings, models and rows that LaTen does not support. Needs only the shapes of the models."""
        refused = {
            "several processes": args.world_size > 1 or is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED"),
            "fp16, because its gradients would vanish": args.fp16,
            "source_memory='stream', because it reads the source's weights at every step": args.source_memory == "stream",
            "a quantised source": known.source.quantised,
            "two tokenizers, because both models read the same tokens": known.tokenizers is not None,
            "prompts of the source's own, because both models read the same rows": known.has_source_rows,
            "a quantised target": is_quantised(cast(Any, known.target.decoder).config),
        }
        for what, given in refused.items():
            if given:
                raise InputError(
                    f"LaTen does not support {what}: run it in one process, in bf16 or float32, with source_memory='resident', "
                    "models that are not quantised and share a tokenizer, and rows without source_prompt."
                )
        neuron_counts(dissect(known.source.shape), known.target)
        extract = known.splits["extract"]
        Draw.draw(len(known.splits["align"]), len(extract), args.seed)
        specials = special_ids(known.tokenizer, known.target)
        for row in extract:
            answer_label(cast(Record, row), known.tokenizer, specials)

    def _adapt(self, target: PreTrainedModel, args: SemAlignConfig) -> PeftModel:
        """Add LoRA with enough rank for Delta to the target."""
        self._attention, self._ffn = neuron_counts(dissect(self.source.shape), self.known.target)
        names, _ = neuron_parts(dissect(target))
        value, output, _, _ = names
        self._lora_targets = sorted(names)
        ranks = {value: self._attention, output: self._attention}
        return add_lora(target, self._lora_targets, rank=self._ffn, alpha=self._ffn, ranks=ranks)

    @cached_property
    def _extract(self) -> Dataset:
        return self.known.splits["extract"]

    @cached_property
    def _draw(self) -> Draw:
        return Draw.draw(len(self.known.splits["align"]), len(self._extract), self.args.seed)

    @cached_property
    def _specials(self) -> set[int]:
        return special_ids(self.known.tokenizer, self.target_anatomy)

    def _schedule(self, known: Preparation) -> FrontierSchedule:
        """A schedule with one stage and one step per extract example."""
        return FrontierSchedule(1, len(known.splits["extract"]))

    def _ask_source(self) -> None:
        """Check that both models use their neurons as expected."""
        check_neurons(self._adapted)
        check_neurons(self.source.model(self.args.device))

    @property
    def _adapted(self) -> PeftModel:
        return cast(PeftModel, self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Locate neurons, train the hypernetworks at each learning rate, and inject the best Delta.

        Args:
            resume_from_checkpoint: must not be a path, because LaTen writes no checkpoints. Every call starts from scratch.
            *args: ignored.
            **kwargs: ignored.

        Raises:
            ValueError: ``resume_from_checkpoint`` is a path, or another process uses this ``output_dir``.
            FloatingPointError: a loss is not finite.
        """
        if isinstance(resume_from_checkpoint, str):
            raise InputError(f"LaTen has no checkpoints and cannot resume from {resume_from_checkpoint}: start from scratch.")
        self.prepare()
        folder = str(self.args.output_dir)
        was_training = self._adapted.training
        self._adapted.eval()
        try:
            with claimed(folder) if self.args.should_save else nullcontext(), disk_errors_explained(folder):
                return self._transfer()
        finally:
            self._rest()
            train_only(self.lora_layers, range(len(self.lora_layers)))
            self._adapted.train(was_training)

    def _transfer(self) -> TrainOutput:
        carrier = Carrier(self._adapted)
        carrier.clear()  # undo an earlier call
        try:
            return self._locate_and_inject(carrier)
        except BaseException:
            carrier.clear()  # undo an unfinished step
            raise

    def _locate_and_inject(self, carrier: Carrier) -> TrainOutput:
        rows, source = cast(Dataset, self.train_dataset), self.source.model(self.args.device)
        examples = [*(self._extract[k] for k in self._draw.order), rows[self._draw.injected]]
        with timed("locating neurons", self.seconds):
            sources = self._locate(source, examples)
            targets = self._locate(self._adapted, examples)
        parts = neuron_parts(dissect(source))[1]
        held_out = rows.select(self._draw.held_out)
        before = self._answer_loss(held_out)
        runs: dict[float, PreAlignment] = {}
        for rate in LEARNING_RATES:
            with timed(f"pre-alignment at {rate}", self.seconds):
                networks, history = self._pre_align(rate, carrier, parts, examples[:-1], sources, targets)
                with torch.no_grad():
                    deltas = networks(knowledge_of(parts, sources[-1]))
                carrier.write(targets[-1], deltas)
                runs[rate] = PreAlignment(deltas, history, self._answer_loss(held_out))
            if not math.isfinite(runs[rate].held_out_loss):
                raise NotFiniteError(f"LaTen's answer loss at learning rate {rate} is not finite. Nothing was injected.")
        best = min(runs, key=lambda rate: runs[rate].held_out_loss)
        self.located, self.deltas = (sources[-1], targets[-1]), runs[best].deltas
        carrier.write(targets[-1], self.deltas)
        for step, entry in enumerate(runs[best].history, start=1):
            self.state.global_step = step
            self.log({**entry, "stage": 1})
        self._facts = self._results(best, runs, before)
        return TrainOutput(len(examples) - 1, sum(entry["answers"] for entry in runs[best].history) / (len(examples) - 1), {})

    def _locate(self, model: CausalLM, examples: Sequence[Record]) -> list[Located]:
        """Locate the neurons for each example's :func:`~hf_semalign.experiments.baselines.neurons.answer_label`."""
        unembedding, found = Unembedding(model), []
        for row in examples:
            position = answer_label(row, cast(Any, self.processing_class), self._specials)
            ids = torch.as_tensor(row["input_ids"][:position])
            counts = {"layers": self.frontier.num_layers, "attention": self._attention, "ffn": self._ffn}
            found.append(locate(model, unembedding, ids, row["labels"][position], **counts))
        return found

    def _pre_align(
        self,
        rate: float,
        carrier: Carrier,
        parts: Sequence[NeuronParts],
        examples: Sequence[Record],
        sources: Sequence[Located],
        targets: Sequence[Located],
    ) -> tuple[Hypernetworks, list[dict[str, float]]]:
        """Train the hypernetworks for one step per extract example. Returns them and the training history."""
        torch.manual_seed(self.args.seed)
        networks = Hypernetworks(self.source.width, self.objective.own_head.weight.shape[1]).to(self.args.device)
        optimizer = torch.optim.AdamW(networks.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
        schedule = LambdaLR(optimizer, lambda step: one_cycle(step, len(examples)))
        pool = cast(Dataset, self.train_dataset)
        history: list[dict[str, float]] = []
        for step, (row, source, target) in enumerate(zip(examples, sources, targets, strict=False)):
            batch = [*(pool[k] for k in self._draw.drawn[step]), row]
            deltas = networks(knowledge_of(parts, source))
            loss = self._backward(carrier, target, deltas, batch)
            square = penalty(deltas).item()
            if not math.isfinite(loss + square):
                raise NotFiniteError(
                    f"LaTen's loss is not finite at step {step + 1}: answer loss {loss:.4g}, penalty {square:.4g}. Nothing was "
                    "injected."
                )
            history.append({"answers": loss, "penalty": square, "learning_rate": float(schedule.get_last_lr()[0])})
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return networks, history

    @without_cudnn_attention()
    def _backward(self, carrier: Carrier, target: Located, deltas: dict[str, torch.Tensor], batch: Sequence[Record]) -> float:
        """Compute the gradients of the hypernetworks, and return the mean answer loss.

        The target runs with Delta in its LoRA. The gradient of Delta, summed over the examples with one penalty each, is then
        propagated into the hypernetworks once.
        """
        held = carrier.write(target, deltas)
        train_only(self.lora_layers, range(0))
        for factor in held:
            factor.requires_grad_(True)
        total = 0.0
        size = self.args.per_device_train_batch_size
        for start in range(0, len(batch), size):
            collated = cast(Collator, self.data_collator)(batch[start : start + size])
            with self.accelerator.autocast():
                some = {key: tensor.to(self.args.device) for key, tensor in collated.items()}
                loss = example_losses(self._adapted, self.objective.own_head, some).sum()
            loss.backward()
            total += loss.item()
        weighted = len(batch) * PENALTY * penalty(deltas)
        torch.autograd.backward([*deltas.values(), weighted], [*carrier.gradients(held, deltas), None])
        return total / len(batch)

    def _answer_loss(self, rows: Dataset) -> float:
        with self.accelerator.autocast():
            return answer_loss(self._adapted, self._batches(rows))

    def _results(self, best: float, runs: Mapping[float, PreAlignment], before: float) -> dict[str, Any]:
        """The facts of a finished run for the record: choices, the losses behind them, and cost."""
        source, target = self.located
        steps, batch, depth = len(self._draw.order), DRAWN + 1, self.frontier.num_layers
        held_out, located = len(self._draw.held_out), len(self._draw.order) + 1
        return {
            "learning_rate": best,
            "held_out_rows": held_out,
            "held_out_loss": {"target": before, **{str(rate): run.held_out_loss for rate, run in runs.items()}},
            "source_attention_layers": source.attention_layers,
            "source_ffn_layers": source.ffn_layers,
            "shared_value_rows": _shared(sites(neuron_parts(self.target_anatomy)[1], target, "value").indices),
            "delta_norm": {role: delta.norm().item() for role, delta in self.deltas.items()},
            "penalty": penalty(self.deltas).item(),
            "cost": {
                "source_forward": located,
                "target_forward": located + len(runs) * (steps * batch + held_out) + held_out,
                "target_backward": len(runs) * steps * batch,
                "source_states_read": located * states_read(dissect(self.source.shape), depth),
                "target_states_read": located * states_read(self.target_anatomy, depth),
            },
        }

    def record(self) -> dict[str, Any]:
        """The record, with LaTen's choices and cost, and the LoRA rank that it used instead of the one in ``args``."""
        record = super().record()
        record["settings"] |= {"lora_r": self._ffn, "lora_alpha": self._ffn}
        if "learning_rate" in self._facts:
            record["settings"]["learning_rate"] = self._facts["learning_rate"]
        counts = {"rate": RATE, "ffn_neurons": self._ffn, "attention_neurons": self._attention, "steps": len(self._extract)}
        return {**record, self.method: {**counts, **self._facts}}
