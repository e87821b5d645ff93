"""``TransferTrainer``: what every method shares, from the source's signals to the published adapter."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PredictionOutput, align_special_tokens

from hf_semalign.cache.scores import layer_scores
from hf_semalign.cache.signals import CachedSignals, OnlineSignals, Reading, SourceSignals, match_scales
from hf_semalign.cache.source import Source
from hf_semalign.config import SemAlignConfig
from hf_semalign.errors import InputError, brief
from hf_semalign.files import Part, digest, disk_errors_explained
from hf_semalign.hub.push import hub_name, open_repo, push_transfer, write_card
from hf_semalign.hub.record import describe_run, save_adapter
from hf_semalign.method.frontier import FrontierSchedule
from hf_semalign.method.objective import Objective
from hf_semalign.method.pairing import LayerPairing, pair_layers
from hf_semalign.method.semantic_map import SemanticMap
from hf_semalign.models.anatomy import base_model, check_head, dissect
from hf_semalign.models.hooks import capture, without_logits
from hf_semalign.models.loading import device_name, licence_of, load_model, quietly
from hf_semalign.models.lora import add_lora
from hf_semalign.splits import column_chunks, encode, fingerprint, is_encoded
from hf_semalign.tokenization import Record
from hf_semalign.training.engines import warn_of_slow_bf16
from hf_semalign.training.layerwise import LayerwiseTrainer
from hf_semalign.training.preparation import Preparation, prepare

logger = logging.getLogger(__name__)
METRICS = ("loss", "kl")  # of every evaluation
PER_BYTE = ("bits_per_byte", "kl_per_byte")  # with two tokenizers, whose tokens do not compare


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Log the start of a phase, and add its wall time to ``seconds``, even if the phase fails."""
    logger.info("%s", name)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def _check_metric(args: SemAlignConfig, evals: Sequence[str], figures: Sequence[str]) -> None:
    """Refuse a metric that evaluation does not give. transformers would look for it only at the first checkpoint."""
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    known = [f"{name}_{figure}" for name in evals for figure in figures] or list(figures)
    wanted = args.load_best_model_at_end or args.save_strategy == "best"
    if wanted and metric not in (*known, "runtime", "samples_per_second", "steps_per_second"):
        raise InputError(f"metric_for_best_model is {args.metric_for_best_model!r}: expected one of {', '.join(known)}.")


def _check_callbacks(callbacks: Any) -> None:
    """Refuse anything that is not a callback, before transformers calls it."""

    def is_one(one: Any) -> bool:
        return isinstance(one, TrainerCallback) or (isinstance(one, type) and issubclass(one, TrainerCallback))

    if callbacks is not None and not (isinstance(callbacks, (list, tuple)) and all(map(is_one, callbacks))):
        raise InputError(f"callbacks is {brief(repr(callbacks))}: expected a list of TrainerCallbacks.")


def signals_root(args: SemAlignConfig) -> Path:
    """The folder of cached signals: ``signals_dir``, or a folder of the run."""
    return Path(args.signals_dir or Path(str(args.output_dir)) / "_signals")


class TransferTrainer(LayerwiseTrainer):
    """The part of a trainer that all methods share: checks, evaluation, records, saving and publishing.

    The constructor checks models, data and settings and adds LoRA to the target. The long work on the source (attribution,
    map, signals) is done once, by :meth:`prepare`, which ``train`` and ``evaluate`` call. Each subclass is a method and adds
    the training. Its arguments are those of :class:`hf_semalign.trainer.SemAlignTrainer`.

    Attributes:
        method: name of the method in records, results and cards.
        settings: fields of :class:`SemAlignConfig` that make up the method. Other values are refused.
        needs_extract: whether the method needs an extract split whatever its settings.
        known: what was known of the run before weights were loaded.
        seconds: wall time of the phases before training.

    Raises:
        ValueError: bad settings, data, models or tokenizers, before any long work.
    """

    method: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    needs_extract: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel | str,
        source_model: PreTrainedModel | str | Source,
        args: SemAlignConfig,
        train_dataset: Dataset | Sequence[Record],
        eval_dataset: Dataset | Sequence[Record] | dict[str, Any] | None = None,
        extract_dataset: Dataset | Sequence[Record] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        pairing: LayerPairing | None = None,
        semantic_map: SemanticMap | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {}
        _check_callbacks(callbacks)
        model = str(model) if isinstance(model, Path) else model
        source_model = str(source_model) if isinstance(source_model, Path) else source_model
        known = prepare(
            model,
            source_model,
            args,
            train_dataset,
            eval_dataset,
            extract_dataset,
            processing_class,
            pairing,
            semantic_map,
            needs_extract=self.needs_extract,
        )
        self._check_settings(known, args)
        evals = {name.removeprefix("eval_"): rows for name, rows in known.splits.items() if name.startswith("eval_")}
        if not callbacks:  # callbacks may add metrics of their own
            figures = (*METRICS, *(["relation"] if args.uses_pairs else []), *(PER_BYTE if known.tokenizers else []))
            _check_metric(args, list(evals), figures)
        warn_of_slow_bf16(args)
        self.known = known
        self.source, self.source_id, self.target_id = known.source, known.source.name, known.target_id
        self._borrowed = isinstance(source_model, Source)  # the caller may need it again
        self._lora_targets = known.lora_targets
        self._given_map = semantic_map
        target = self._load_target(model, known, args)
        anatomy = dissect(target)
        torch.manual_seed(args.seed)
        super().__init__(
            self._adapt(target, args),
            args,
            anatomy=anatomy,
            frontier=known.frontier,
            schedule=self._schedule(known),
            learning_rate_factor=known.learning_rate_factor,
            callbacks=callbacks,
            data_collator=known.collator,
            train_dataset=known.splits["align"],
            eval_dataset=evals or known.splits.get("eval"),
            processing_class=known.tokenizer,
        )
        check_head(cast(PeftModel, self.model))  # on the device that it will run on
        self.data_record = {name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in known.splits.items()}
        for name, pair in known.pairs.items():
            self.data_record[name]["source_fingerprint"] = fingerprint(pair.source)
            if pair.own_prompts:
                self.data_record[name] |= {"source_prompts": pair.own_prompts, "aligned": pair.aligned}
        self._is_prepared = False

    @classmethod
    def _check_settings(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse settings that are not the method's, or that do nothing here."""
        if other := {name: getattr(args, name) for name, value in cls.settings.items() if getattr(args, name) != value}:
            name = cls.__name__
            raise InputError(f"{name} requires {dict(cls.settings)}; got {other}: SemAlignConfig(**{name}.settings, ...).")
        cls.check(known, args)
        if args.fp16 and args.device.type == "cpu":
            raise InputError("fp16 is for a GPU, and does nothing on a CPU: set bf16, or neither.")

    @classmethod
    def check(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse what this method cannot work with, before any weight is loaded."""

    def _load_target(self, model: PreTrainedModel | str, known: Preparation, args: SemAlignConfig) -> PreTrainedModel:
        """The target, with the special tokens of its tokenizer."""
        with timed("loading the target", self.seconds):
            target = load_model(model, precision=args.mixed_precision, parts=args.target_parts)
        if known.tokenizer is not None:
            with quietly():  # the Trainer would log it in every run
                align_special_tokens(target, known.tokenizer)
        return target

    def _schedule(self, known: Preparation) -> FrontierSchedule:
        """The stages in optimizer steps."""
        return known.schedule

    def _adapt(self, target: PreTrainedModel, args: SemAlignConfig) -> PeftModel:
        """The target with LoRA that changes nothing yet."""
        return add_lora(target, self._lora_targets, rank=args.lora_r, alpha=args.lora_alpha)

    # The work on the source, which is done once

    def prepare(self) -> None:
        """Score the source's layers, build the map and run the source over the data, unless the result is cached. Then release
        the source. A second call does nothing. With several processes, all of them call it.

        Raises:
            OSError: too little space on the disk for the signals.
        """
        if not self._is_prepared:
            _ = self.pairing, self.objective, self.signals
            self._ask_source()
            self._rest()
            self._is_prepared = True

    @cached_property
    def pairing(self) -> LayerPairing:
        """The source layer of each target layer; with ``pairing="attribution"`` this scores the source's layers first."""
        # Kernels may differ in the last bits between ranks, but all ranks must train on the same pairs and states.
        (pairing,) = broadcast_object_list([self.known.pairing or self._attribute(self.known.source_splits["extract"])])
        return pairing.named(self.source_id, self.target_id)

    @property
    def semantic_map(self) -> SemanticMap:
        """The map from the source's space to the target's."""
        return self.objective.semantic_map

    @property
    def _signals_folder(self) -> Path | None:
        """The folder of the source's signals; ``None`` if they are not kept."""
        return None if self.args.signals == "online" else signals_root(self.args)

    def _attribute(self, extract: Dataset) -> LayerPairing:
        """The layer pairing from attribution scores on the extract split."""
        args = self.args
        with timed("attribution", self.seconds):
            scores = layer_scores(
                self.source,
                extract,
                self.known.source_collator,
                self._signals_folder,
                precision=self._precision,
                device=args.device,
                batch_size=args.per_device_eval_batch_size,
                stream=args.source_memory == "stream",
                progress=not args.disable_tqdm,
            )
            return pair_layers(scores, self.frontier.num_layers, args.pairing)

    @cached_property
    def objective(self) -> Objective:  # type: ignore[override]
        """The losses, with both heads and the map."""
        args, tokens, semantic_map = self.args, self.known.token_ids, self._given_map
        with timed("semantic map", self.seconds):
            two = self.known.tokenizers
            whole_head = self.source.head(self._signals_folder).to(args.device)
            source_head = whole_head.rows(tokens if two is None else torch.arange(len(two.classes.source)))
            own_head = self.target_anatomy.output_head().to(args.device)  # under FSDP the target is still on the CPU
            target_head = own_head.rows(tokens)
            semantic_map = None if semantic_map is None else semantic_map.by_content()
            if semantic_map is None and self.accelerator.is_main_process:
                cache = Path(str(args.output_dir)) / "semantic_map.safetensors"
                weights = source_head.weight, target_head.weight
                shared = None if two is None else two.map_rows
                semantic_map = SemanticMap.from_heads(*weights, rows=shared, kind=args.map_kind, cache=cache).cpu()
            (semantic_map,) = broadcast_object_list([semantic_map])
        return Objective(
            args.layer_loss,
            args.output_loss,
            args.relation_weight,
            args.kl_weight,
            semantic_map.to(args.device, torch.float32),
            source_head,
            target_head,
            own_head,
            None if two is None else two.classes.to(args.device),
        )

    @cached_property
    def signals(self) -> OnlineSignals | CachedSignals:
        """The source's signals. If they are cached, the source first runs over what is missing on disk."""
        if self._signals_folder is None:
            own_rows = self._source_batch if self.known.has_source_rows else None
            model = self.source.model(self.args.device)
            signals: Any = OnlineSignals(model, self.pairing, self.semantic_map, own_rows=own_rows)
        else:
            signals = self._cached_signals
            with timed("source signals", self.seconds), self._autocast(), disk_errors_explained(self._signals_folder):
                signals.prepare(self._readings(), self._own_part)
        if self.args.matches_scales:
            batches = self._batches(self.known.splits["extract"])
            (signals.scales,) = broadcast_object_list([match_scales(signals, cast(PeftModel, self.model), batches)])
        return signals

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor on the mapped states of each pair."""
        return tuple(self.signals.scales) if self.args.matches_scales else (1.0,) * self.frontier.num_layers

    def _readings(self) -> list[Reading]:
        """What training reads of the source's signals, stage by stage."""
        args, stages = self.args, range(self.schedule.num_stages)
        if not args.learns_from_source:
            return []
        layers = [self.frontier.supervised(stage) if args.uses_pairs else range(0) for stage in stages]
        rows = self.rows_by_stage()
        if rows is None:
            return [Reading(some) for some in layers]
        name = "source_id" if self.known.has_source_rows else "example_id"
        ids = np.concatenate([chunk.to_numpy() for chunk in column_chunks(self.known.splits["align"], name)])
        return [Reading(some, ids[numbers]) for some, numbers in zip(layers, rows, strict=True)]

    def write_signals(self, part: Part | None = None) -> None:
        """Compute the source's signals of all rows, for runs with other seeds, schedules and numbers of processes.
        :meth:`prepare` computes only what the steps of this run read.

        Args:
            part: ``(i, n)`` for only the i-th of n parts, counted from 0. Machines that share ``signals_dir``, or the jobs of
                an array, compute the others.

        Raises:
            ValueError: ``signals="online"``.
            OSError: too little space on the disk.
        """
        if self._signals_folder is None:
            raise InputError("write_signals needs signals='cached'; got 'online'.")
        readings = [Reading(self._paired_layers)] if self.args.learns_from_source else []
        signals = self._cached_signals
        with timed("source signals", self.seconds), self._autocast(), disk_errors_explained(self._signals_folder):
            if part is None:
                signals.prepare(readings, self._own_part)
            else:
                signals.write(readings, part)

    @property
    def _paired_layers(self) -> range:
        """The target layers that have supervision in any stage."""
        return range(self.frontier.num_layers if self.args.uses_pairs else 0)

    @property
    def _own_part(self) -> Part:
        """The part of the shards that this process computes first."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @cached_property
    def _cached_signals(self) -> CachedSignals:
        """The signals of all splits. Nothing is computed yet."""
        args, two = self.args, self.known.tokenizers
        tokenizer = self.known.tokenizer if two is None else two.source_tokenizer
        signals = {
            name: SourceSignals(
                self.source,
                self.pairing,
                self.semantic_map,
                rows,
                signals_root(args),
                self.known.source_collator,
                tokenizer=digest(tokenizer.get_vocab()) if tokenizer else None,
                precision=self._precision,
                device=args.device,
                batch_size=args.per_device_eval_batch_size,
                stream=args.source_memory == "stream",
                progress=not args.disable_tqdm,
            )
            for name, rows in self.known.source_splits.items()
            if name != "extract" or args.matches_scales
        }
        cached = CachedSignals(signals, "align", self._paired_layers)
        if not args.signals_dir:  # checkpoints go to the same disk
            cached.training.reserve = 5 * 12 * sum(p.numel() for layer in self.lora_layers for p in layer)
        return cached

    def _source_batch(self, source_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The source's batch for some of its example ids."""
        found = [self._source_rows[example] for example in source_ids.tolist()]
        return self.known.source_collator([self.known.source_splits[split][row] for split, row in found])

    @cached_property
    def _source_rows(self) -> dict[int, tuple[str, int]]:
        """Split and row of each example of the source."""
        splits = self.known.source_splits.items()
        return {example: (split, row) for split, rows in splits for row, example in enumerate(rows["example_id"])}

    def _ask_source(self) -> None:
        """Called before the source is released, for a method that needs its weights."""

    def _rest(self) -> None:
        """Release the source if nothing needs it any more."""
        if self.args.signals == "online":
            return
        if self._borrowed:
            self.source.rest()
        else:
            self.source.release()

    # Batches

    def _batches(self, dataset: Dataset) -> DataLoader:
        return DataLoader(cast(Any, dataset), self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        """Batches of all rows, even with ``dataloader_drop_last``. Rows of text are encoded like the eval split."""
        if eval_dataset is not None and not isinstance(eval_dataset, str) and not is_encoded(eval_dataset):
            if self.known.has_source_rows:
                raise InputError(
                    "The source has a tokenizer or prompts of its own, so evaluation is of the rows that the trainer was made "
                    "with: pass these rows as its eval_dataset."
                )
            eval_dataset = encode(eval_dataset, self.known.tokenizer, split="eval", max_length=self.args.max_length)
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def get_test_dataloader(self, test_dataset):
        """Like the batches of ``evaluate``, because ``predict`` measures the same."""
        return self.get_eval_dataloader(test_dataset)

    def entered(self, inputs: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """A context in which the target's forward on a training batch may skip layers whose result is already known."""
        return nullcontext()

    def _forward(self, model, inputs: dict[str, torch.Tensor], layers: Sequence[int], *, training: bool):
        """Run the target on a batch and read the source's signals.

        Returns:
            Model outputs; captured states of ``layers`` and of the decoder; source signals, ``None`` if training needs none.
        """
        modules = [*(self.target_anatomy.layers[k] for k in layers), self.target_anatomy.decoder]
        entered = self.entered(inputs) if training else nullcontext()
        wanted = self.args.learns_from_source or not training
        read = self.signals.find(inputs) if wanted else None  # before the forward occupies the GPU
        with self._autocast():
            with capture(modules) as states, entered, without_logits(self.target_anatomy.head):
                outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            return outputs, states, read and read(layers)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with the metrics of :meth:`evaluation_loop`."""
        self.prepare()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Measure what :meth:`evaluate` does, on other rows. No predictions are returned."""
        self.prepare()
        return super().predict(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Collect per-example sums of answer cross-entropy, KL and layer loss for :meth:`evaluation_loop`."""
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            _, states, signals = self._forward(model, inputs, self._paired_layers, training=False)
            sums = self.objective.sums(states, signals, inputs["labels"])
            if "answer_bytes" in inputs:
                sums = torch.column_stack((sums, inputs["answer_bytes"]))
        self._evaluated.append(self.accelerator.gather_for_metrics(sums).cpu())
        return sums[:, 0].sum() / sums[:, 1].sum(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Compute ``eval_loss`` (answer cross-entropy) and ``eval_kl``, both exact over the split, and unless
        ``relation_weight`` is 0 also ``eval_relation``, the mean over layers.

        If the source has a tokenizer or prompts of its own, ``eval_kl`` is per aligned position. With two tokenizers it is the
        KL over classes of tokens, and ``eval_bits_per_byte`` and ``eval_kl_per_byte`` can be compared between tokenizers.
        """
        self._evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        cross_entropy, tokens, kl, taught, relation, sequences, *read = torch.cat(self._evaluated).double().sum(0).tolist()
        found = {"loss": cross_entropy / tokens, "kl": kl / taught}
        if self.args.uses_pairs:
            found["relation"] = relation / max(sequences, 1)
        for answer_bytes in read:  # these do not depend on how a tokenizer splits the text
            found |= dict(zip(PER_BYTE, (cross_entropy / answer_bytes / math.log(2), kl / answer_bytes), strict=True))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    # Saving and publishing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. With ``push_to_hub`` it is also published, except when the Trainer saves a checkpoint."""
        self.write_adapter(output_dir, checkpoint=_internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def record(self) -> dict[str, Any]:
        """The content of ``semalign.json``, see :func:`hf_semalign.hub.record.describe_run`."""
        return describe_run(
            self.args,
            self.pairing,
            self.semantic_map,
            scales=self.scales,
            lora_targets=self._lora_targets,
            stages=self.schedule.boundaries,
            data=self.data_record,
            method=self.method,
            source=self.source_id,
            target=self.target_id,
            licences=self._licences,
            **self._tokenizer_facts(),
        )

    def _tokenizer_facts(self) -> dict[str, Any]:
        """The record's facts about two tokenizers."""
        if self.known.tokenizers is None:
            return {}
        return {"tokenizers": {"classes": self.known.tokenizers.classes.count, "aligned": self.known.aligned}}

    @cached_property
    def _licences(self) -> dict[str, dict[str, str] | None]:
        return {"source": licence_of(self.source.origin), "target": licence_of(self._target_origin)}

    @property
    def _target_origin(self) -> str:
        """Folder or Hub id of the target; empty if it was made in memory."""
        return str(base_model(cast(Any, self.model)).name_or_path)

    def save_weights(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Save the adapter with its record, see :func:`hf_semalign.hub.record.save_adapter`."""
        adapted = self.accelerator.unwrap_model(self.model)
        save_adapter(folder, adapted, self.record(), cast(Any, self.processing_class), weights)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository if needed, so that a run that cannot be published is refused before any long work."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            _, repo_id = open_repo(hub_name(self.args), token=token or self.args.hub_token, private=private)
            self.hub_model_id = cast(Any, repo_id)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "SemAlign transfer",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> str | None:
        """Save the adapter and publish ``output_dir``, see :func:`hf_semalign.push_transfer`.

        If a recipe has written ``results.json``, its card is published, and otherwise a new card of what this trainer knows. A
        README that is not a card is refused and not changed.

        Args:
            commit_message: message of the commit.
            blocking: must be True, because the push ends with a comparison.
            token: Hub token; by default ``hub_token`` of the settings, or the token that you are logged in with.
            revision: branch; by default ``hub_revision``.
            private: whether a new repository is private; by default ``hub_private_repo``.
            tags: further tags of the card.
            kwargs: refused. The Trainer's are for its own card.

        Returns:
            URL of the commit in the main process, ``None`` in the others.

        Raises:
            ValueError, OSError: see :func:`hf_semalign.push_transfer`.
        """
        if kwargs or not blocking:
            given = sorted(kwargs) if blocking else ["blocking=False"]
            raise InputError(
                f"push_to_hub does not take {given}: the library writes the card, and compares the files after the upload."
            )
        folder = Path(str(self.args.output_dir))
        self.write_adapter(None, checkpoint=False)
        if not self.is_world_process_zero():
            return None
        write_card(folder, self.record(), self._card_results(), tags)
        return push_transfer(
            folder,
            self.hub_model_id or hub_name(self.args),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            target=self._target_origin or None,
            message=commit_message or "SemAlign transfer",
        )

    def _card_results(self) -> dict[str, Any]:
        """What the card needs besides the record. Its metrics are of the last evaluation, if that was at this step."""
        last = [e for e in self.state.log_history if "eval_kl" in e and e["step"] == self.state.global_step]
        return {
            "task": "its training data",
            "dataset": None,
            "steps": self.state.global_step,
            "metrics": {self.method: {"kl": last[-1]["eval_kl"], "loss": last[-1]["eval_loss"]}} if last else {},
            "history": [entry for entry in self.state.log_history if "stage" in entry],
            "seconds": self.seconds,
            "peak_memory_mb": None,
            "machine": {"device": device_name(self.args.device)},
            "figures": [],
        }
