"""``SemAlignTrainer``: wires splits, attribution, pairing, map, losses and frontier into transformers' ``Trainer``."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints, sort_checkpoints

from hf_semalign.anatomy import add_lora, base_model, check_head, dissect
from hf_semalign.card import render_card
from hf_semalign.config import SemAlignConfig
from hf_semalign.frontier import (
    FrontierCallback,
    StageProgress,
    lora_parameters,
    skip_untouched,
    train_only,
    trainable,
    whole,
)
from hf_semalign.guards import (
    CHECKSUMS,
    CheckpointOnSignal,
    claimed,
    damage,
    disk_errors_explained,
    last_checkpoint,
    seal,
)
from hf_semalign.hooks import capture
from hf_semalign.hub import CARD, card_fault, hub_name, open_repo, push_transfer
from hf_semalign.loading import RECORD_NAME, is_quantised, load_model
from hf_semalign.losses import (
    answer_cross_entropy,
    relation_sequences,
    sequence_relation_losses,
    token_cross_entropy,
    token_kl,
    token_steering_losses,
)
from hf_semalign.pairing import LayerPairing, pair_layers
from hf_semalign.prefix import PrefixUnavailable, TargetPrefix
from hf_semalign.preparation import Preparation, prepare
from hf_semalign.scores import layer_scores
from hf_semalign.semantics import SemanticMap, checksum
from hf_semalign.sharding import autocast_under_zero, check_sharded, check_shards, part_by_layer
from hf_semalign.signals import CachedSignals, OnlineSignals, SourceSignals, match_scales
from hf_semalign.source import Source
from hf_semalign.splits import (
    IGNORED,
    Record,
    encode,
    fingerprint,
    valid_positions,
)
from hf_semalign.states import digest, file_digest, sha256

logger = logging.getLogger(__name__)
PREFIX = "_prefix"  # in the run folder
PREFIX_PAYS = 2  # epochs: a prefix costs one pass of the target over the split, and saves half a forward a step
SETTINGS = (
    "pairing", "map_kind", "scale", "relation_weight", "kl_weight", "layer_loss", "output_loss", "stage_budget", "frontier",
    "lora_r", "lora_alpha", "lora_targets", "source_parts", "target_parts",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "optim", "bf16", "fp16",
)  # fmt: skip


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Log the start of a phase, and keep its wall time in ``seconds``."""
    logger.info("%s", name)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def signals_root(args: SemAlignConfig) -> Path:
    """Where cached signals go: ``signals_dir``, or a folder of the run."""
    return Path(args.signals_dir or Path(str(args.output_dir)) / "_signals")


class SemAlignTrainer(Trainer):
    """Transfers a source into a target, one layer at a time.

    The losses of a step are the layer loss of the frontier's layer (equations 4 to 7) and the KL to the source's output
    (equation 8), averaged over the sequences and over the valid positions of the global batch, so that accumulation and
    data parallelism change nothing.

    Args:
        model: the target: a causal LM, a Hub id or a local folder. LoRA is added to it.
        source_model: the source, likewise.
        args: a :class:`SemAlignConfig`.
        train_dataset: the align split: rows with ``prompt`` and ``completion``, with ``messages``, or with ``input_ids`` and
            ``labels``.
        eval_dataset: the eval split, of the same form, or several by name.
        extract_dataset: the split for attribution and ``scale: match``. Where one of them needs it and none is given, up to
            20 rows (at most a fifth) are taken out of ``train_dataset``, and the log says so.
        processing_class: the target's tokenizer; loaded with the model when that is an id. Not needed for token ids.
        pairing: a pairing to use instead of ``args.pairing``.
        semantic_map: a map to use instead of ``args.map_kind``.
        callbacks: further callbacks.

    Attributes:
        method: what the run is called in records, results and cards; baselines have names of their own.
        settings: fields of :class:`SemAlignConfig` that make up the method, and must be so.
        takes_steps: whether the method's cost grows with the optimizer steps.
        pairing: the :class:`LayerPairing` in use.
        semantic_map: the :class:`SemanticMap` in use.
        scales: factor on the mapped states of each pair.
        known: the run as it was before weights were loaded.
        seconds: wall time of the phases before training.

    Raises:
        ValueError: bad settings, data, models or tokenizers, before any long work.
    """

    method: ClassVar[str] = "semalign"
    settings: ClassVar[Mapping[str, Any]] = {}
    takes_steps: ClassVar[bool] = True
    loss_is_scaled_for_ga = True
    args: SemAlignConfig

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
        )
        if other := {name: getattr(args, name) for name, value in self.settings.items() if getattr(args, name) != value}:
            name = type(self).__name__
            raise ValueError(
                f"{name} is what it is by {dict(self.settings)}, but args has {other}: SemAlignConfig(**{name}.settings, ...)."
            )
        self.check(known, args)
        self.known = known
        processing_class, encoded, collator, pairing = known.tokenizer, known.splits, known.collator, known.pairing
        self.source, self.source_id, self.target_id = known.source, known.source.name, known.target_id
        self.frontier, self.schedule = known.frontier, known.schedule
        self._learning_rate_factor, self._lora_targets = known.learning_rate_factor, known.lora_targets
        self._encode = partial(encode, tokenizer=processing_class, max_length=args.max_length)
        evals = {name.removeprefix("eval_"): rows for name, rows in encoded.items() if name.startswith("eval_")}
        with timed("loading the target", self.seconds):
            target = load_model(model, bf16=args.bf16, parts=args.target_parts)
        self.target_anatomy = dissect(target)
        torch.manual_seed(args.seed)
        adapted = self._adapt(target, args)
        self.lora_layers = lora_parameters(self.target_anatomy.layers)

        super().__init__(
            model=adapted,
            args=args,
            data_collator=collator,
            train_dataset=encoded["align"],
            eval_dataset=evals or encoded.get("eval"),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and is_quantised(target.config):
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(f"The target {self.target_id} is quantised, which {engine} is not known to work with: use DDP.")
        if self.is_fsdp_enabled:
            check_shards(self.target_anatomy.layers, args.world_size)
        if self.is_deepspeed_enabled:
            autocast_under_zero(self.accelerator.state.deepspeed_plugin.deepspeed_config)
            adapted.to(args.device)  # the Trainer would leave it to DeepSpeed, which is there for training alone
        check_head(adapted)  # where it is going to run
        self.model_accepts_loss_kwargs = True  # compute_loss takes num_items_in_batch whatever the model takes
        self._loss_shifts_labels = True
        self._keeps_logits = "logits_to_keep" in inspect.signature(target.forward).parameters

        extract = encoded.get("extract")
        root = None if args.signals == "online" else signals_root(args)
        if pairing is None:
            with timed("attribution", self.seconds):
                scores = layer_scores(
                    self.source,
                    cast(Dataset, extract),
                    collator,
                    root,
                    precision=self._precision,
                    device=args.device,
                    batch_size=args.per_device_eval_batch_size,
                    stream=args.source_memory == "stream",
                    progress=not args.disable_tqdm,
                )
                pairing = pair_layers(scores, self.frontier.num_layers, args.pairing)
        with timed("semantic map", self.seconds):
            head = self.source.head(root).to(args.device)
            self._source_head = head.rows(known.token_ids)
            self._own_head = self.target_anatomy.output_head().to(args.device)  # FSDP leaves the target where it was loaded
            self._target_head = self._own_head.rows(known.token_ids)
            if semantic_map is None and self.accelerator.is_main_process:
                cache = Path(str(args.output_dir)) / "semantic_map.safetensors"
                weights = self._source_head.weight, self._target_head.weight
                semantic_map = SemanticMap.from_heads(*weights, kind=args.map_kind, cache=cache).cpu()
        # Kernels may differ in the last bits between ranks; all must train on the same pairs and states.
        pairing, semantic_map = broadcast_object_list([pairing, semantic_map])
        self.semantic_map = semantic_map.to(args.device, torch.float32)
        self.pairing = pairing.named(self.source_id, self.target_id)
        self.scales: tuple[float, ...] = (1.0,) * self.frontier.num_layers
        self.signals: OnlineSignals | CachedSignals
        if root is None:
            self.signals = OnlineSignals(self.source.model(args.device), self.pairing, self.semantic_map)
        else:
            with timed("source signals", self.seconds):
                self.signals = self._cache(encoded, root, digest(processing_class.get_vocab()) if processing_class else None)
            if isinstance(source_model, Source):  # whose maker may want more of it
                self.source.rest()
            else:
                self.source.release()
        if args.scale == "match":
            self.scales = match_scales(self.signals, adapted, self._batches(extract))
            (self.scales,) = broadcast_object_list([self.scales])
            self.signals.scales = self.scales
        self.data_record = {name: {"rows": len(rows), "fingerprint": fingerprint(rows)} for name, rows in encoded.items()}

        self._prefix: TargetPrefix | None = None
        self._signals_taken = CheckpointOnSignal()
        self.add_callback(self._signals_taken)  # before the frontier moves
        self._frontier_callback = FrontierCallback(self.frontier, self.schedule, self.lora_layers, self._enter_stage)
        self.add_callback(self._frontier_callback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(self._frontier_callback))
        self._sequences_in_batch: torch.Tensor | None = None
        self._examples_in_batch: list[torch.Tensor] = []
        self._broken: list[str] = []  # what is not finite in the step in hand
        self._term_sums = torch.zeros(2, device=args.device)
        self._terms_logged = 0

    @classmethod
    def check(cls, known: Preparation, args: SemAlignConfig) -> None:
        """Refuse, before any weight is loaded, what the method of this class cannot work with."""

    @classmethod
    def own_cost(cls, known: Preparation, args: SemAlignConfig) -> dict[str, float]:
        """What the method does beside or instead of the phases of :func:`hf_semalign.plan.plan`: multiplications by phase."""
        return {}

    def _adapt(self, target: PreTrainedModel, args: SemAlignConfig) -> PeftModel:
        """The target with LoRA that changes nothing yet."""
        return add_lora(target, self._lora_targets, rank=args.lora_r, alpha=args.lora_alpha)

    # Precision

    @property
    def _precision(self) -> str:
        """Of forward passes: ``no``, ``bf16`` or ``fp16``."""
        return "bf16" if self.is_deepspeed_enabled and self.args.bf16 else str(self.accelerator.mixed_precision)

    def _autocast(self) -> AbstractContextManager[Any]:
        """The same with every engine; accelerate leaves it to DeepSpeed, which is there for training alone."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    # Schedule and optimizer

    def set_initial_training_values(self, args, dataloader):
        """The Trainer's count of epochs and steps; under ``per_stage`` the budget is every stage's."""
        if args.stage_budget == "per_stage":
            args = copy.copy(args)
            args.max_steps = self.schedule.total_steps
        return super().set_initial_training_values(args, dataloader)

    def create_optimizer(self, model=None):
        """The optimizer takes what is trainable when it is made: all of LoRA; ``FrontierCallback`` freezes afterwards."""
        train_only(self.lora_layers, range(len(self.lora_layers)))
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.is_deepspeed_enabled:
            part_by_layer(optimizer, self.lora_layers)
        return optimizer

    def _shard(self) -> None:
        """Under FSDP, before the first forward of any kind: accelerate shards a model only together with its optimizer."""
        if not self.is_fsdp_enabled or isinstance(self.model, FSDPModule):
            return
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast it is, as with every other engine
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        check_sharded(self.target_anatomy.layers)
        register_fsdp_forward_method(self.model, "generate")
        self.lora_layers = self._frontier_callback.layers = lora_parameters(self.target_anatomy.layers)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """A learning rate whose warmup and decay restart with each stage."""
        if num_training_steps != self.schedule.total_steps:
            raise ValueError(
                f"The run has {num_training_steps} steps, but its stages were planned for {self.schedule.total_steps}: set the "
                "budget before the trainer is made."
            )
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or cast(Optimizer, self.optimizer), self._learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.model_wrapped is self.model and getattr(self.model, "_is_accelerate_prepared", False):
            # An evaluation before training prepared it without DDP; accelerate would leave it so, and no gradient be averaged.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
        if self.is_deepspeed_enabled:
            if self.deepspeed is not None:
                self.deepspeed.destroy()  # what it hooked on for an earlier training
            self.model_wrapped = self.model
            if resume_from_checkpoint is not None:
                self._check_run(resume_from_checkpoint)
        self._shard()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.activation_checkpointing:
            # Checkpointing makes the embeddings' output require a gradient, which would drive backward through all layers.
            base_model(self.model).disable_input_require_grads()
        self._term_sums.zero_()
        self._terms_logged = self.state.global_step
        self._broken.clear()
        self._prefix = self._make_prefix()
        return prepared

    # Batches and losses

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "labels", "example_id"]

    def _batches(self, dataset: Dataset, size: int | None = None) -> DataLoader:
        return DataLoader(dataset, size or self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        """Also of rows of text, which are encoded as the eval split is."""
        if eval_dataset is not None and not isinstance(eval_dataset, str) and "example_id" not in eval_dataset[0]:
            eval_dataset = self._encode(eval_dataset, split="eval")
        return super().get_eval_dataloader(eval_dataset)

    def _cache(self, encoded: dict[str, Dataset], root: Path, tokenizer: str | None) -> CachedSignals:
        """The signals of all splits on disk; the source runs over what is missing."""
        args = self.args
        wanted = [name for name in encoded if name != "extract" or args.scale == "match"]
        signals = {
            name: SourceSignals(
                self.source,
                self.pairing,
                self.semantic_map,
                encoded[name],
                root,
                self.data_collator,
                tokenizer=tokenizer,
                precision=self._precision,
                device=args.device,
                batch_size=args.per_device_eval_batch_size,
                stream=args.source_memory == "stream",
                progress=not args.disable_tqdm,
            )
            for name in wanted
        }
        cached, layers = CachedSignals(signals, "align"), self._layers_from(0)
        if not args.signals_dir:  # prefix and checkpoints lie on the same disk
            trained = sum(p.numel() for layer in self.lora_layers for p in layer)
            states = int(cached.training.examples.tokens.sum()) * self._target_head.weight.shape[1] * 4
            cached.training.reserve = 2 * states + 5 * 12 * trained
        # In groups, training makes its own as it goes, and no other run may need what it deletes.
        learns = args.learns_from_source
        self._in_groups = (
            learns and not cached.training.fits(layers) and self.frontier.num_stages > 1 and args.signals_dir is None
        )
        with self._autocast(), disk_errors_explained(root):
            cached.prepare(layers if learns and not self._in_groups else None)
        return cached

    def prepare_signals(self) -> None:
        """Have the signals of all stages on disk at once, for a run of its own elsewhere.

        Raises:
            OSError: a disk that does not hold them.
        """
        if isinstance(self.signals, CachedSignals) and self.args.learns_from_source:
            with self._autocast(), disk_errors_explained(signals_root(self.args)):
                self.signals.training.prepare(self._layers_from(0))

    def _layers_from(self, stage: int) -> range:
        """Target layers whose supervision training still needs at a stage."""
        if not self.args.relation_weight:
            return range(0)
        return range(self.frontier.supervised(stage)[0], self.frontier.num_layers)

    def _enter_stage(self, stage: int) -> None:
        """Before the first step of a stage: its signals, where the disk holds some at a time, and the target below it."""
        if isinstance(self.signals, CachedSignals) and self._in_groups:
            self.signals.training.let_go()  # by every rank, before one deletes what is over
        self._compare_ranks()
        skip_untouched(self.target_anatomy.layers, self.frontier.trained(stage)[-1])
        with self._autocast():
            if isinstance(self.signals, CachedSignals) and self._in_groups:
                self.signals.training.prepare(self._layers_from(stage), in_groups=True)
                self.source.release()
            if self._prefix is not None:
                try:
                    self._prefix.move(stage)
                except PrefixUnavailable as reason:
                    logger.warning("From here on the target runs whole at every step, without its prefix: %s.", reason)
                    if self.accelerator.num_processes == 1:  # others may be reading it
                        self._prefix.close()
                    self._prefix = None

    def _compare_ranks(self) -> None:
        """Look whether all ranks have one adapter: they would not, if gradients had not been averaged.

        Raises:
            RuntimeError: they differ.
        """
        if self.is_fsdp_enabled:  # every number is one rank's alone
            return
        adapters = gather_object([digest([checksum(p) for layer in self.lora_layers for p in layer])])
        if len(set(adapters)) > 1:
            raise RuntimeError(f"The ranks' adapters differ after step {self.state.global_step}: {adapters}. Nothing is saved.")

    def _make_prefix(self) -> TargetPrefix | None:
        """The target prefix, where it is exact and pays: a pass of all layers below the last against half of each step's."""
        args, folder = self.args, Path(str(self.args.output_dir)) / PREFIX
        examples = self.schedule.total_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not isinstance(self.signals, CachedSignals) or self.frontier.kind != "single" or self.frontier.num_layers == 1:
            return None
        if self.is_fsdp_enabled:
            logger.info("Under FSDP the target runs whole at every step: its prefix would run layers that are sharded.")
            return None
        if examples <= PREFIX_PAYS * len(self.signals.training.examples.ids):
            logger.info(
                "Fewer than %d epochs in all: the target runs whole at every step, which costs less than its prefix.",
                PREFIX_PAYS,
            )
            return None
        target = self.accelerator.unwrap_model(self.model).train()
        try:
            with self._autocast():
                return TargetPrefix(
                    target,
                    self.lora_layers,
                    self.signals.training.examples,
                    self.data_collator,
                    folder,
                    precision=self._precision,
                    batch_size=args.per_device_eval_batch_size,
                    device=args.device,
                    progress=not args.disable_tqdm,
                )
        except PrefixUnavailable as reason:
            logger.warning("The target runs whole at every step, without its prefix: %s.", reason)
            return None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Also count the sequences of the global batch that carry a relation: the layer loss averages over them."""
        samples, num_items = super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)
        if samples:
            counts = [relation_sequences(valid_positions(batch["labels"])).sum() for batch in samples]
            self._sequences_in_batch = self.accelerator.reduce(torch.stack(counts).sum().to(device), "sum")
        self._examples_in_batch = [batch["example_id"] for batch in samples]
        return samples, num_items

    def _without_repeats(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """accelerate fills the last global batch of an epoch with rows of its start, for all ranks to have as many: they count
        for nothing here, so that one process and several learn from the same rows.
        """
        args = self.args
        # Counted here, because accelerate loses count in an epoch that a resumed run begins in its middle.
        rest = len(cast(Dataset, self.train_dataset)) % (args.train_batch_size * args.world_size)
        if rest and self.accelerator.gradient_state.end_of_dataloader and not args.dataloader_drop_last:
            fresh = rest - len(batch["labels"]) * self.accelerator.process_index
            batch["labels"][max(fresh, 0) :] = IGNORED
        return batch

    def _forward(self, model, inputs: dict[str, torch.Tensor], layers: Sequence[int], *, training: bool):
        """Both models on a batch: model outputs, target captures of ``layers`` and of the decoder, source signals; the last are
        ``None`` in training that needs nothing of them.
        """
        modules = [*(self.target_anatomy.layers[k] for k in layers), self.target_anatomy.decoder]
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        entered = self._prefix.entered(inputs) if self._prefix and training else nullcontext()
        with self._autocast():
            signals = self.signals(inputs, layers) if self.args.learns_from_source or not training else None
            with capture(modules) as states, entered:
                outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **keep)
        return outputs, states, signals

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """``relation_weight`` x layer loss + ``kl_weight`` x output loss (equation 9), as shares of the global batch's means.

        Without ``num_items_in_batch`` the batch at hand is the global batch.
        """
        stage = self.schedule.stage(self.state.global_step)
        layers = self.frontier.supervised(stage) if self.args.relation_weight else range(0)
        outputs, states, signals = self._forward(model, inputs, layers, training=self.model.training)
        valid = valid_positions(inputs["labels"])
        if num_items_in_batch is None:
            tokens, sequences, ranks = valid.sum(), relation_sequences(valid).sum(), 1
        else:
            tokens, sequences, ranks = num_items_in_batch, self._sequences_in_batch, self.accelerator.num_processes

        zero = torch.zeros((), device=valid.device)
        layer_terms = []
        for state, supervision in zip(states[:-1], signals.supervision if signals else (), strict=True):
            if self.args.layer_loss == "relation":
                output = state.output
                if state.input.requires_grad:
                    # Of y = x + f(x) the loss is about f(x): through x it would train layers below for another one's residual.
                    output = output + (state.input.detach() - state.input)
                losses = sequence_relation_losses(state.input, output, supervision, valid)
                layer_terms.append(losses.sum() / sequences.clamp_min(1))
            else:
                layer_terms.append(token_steering_losses(state.output[valid], supervision[valid]).sum() / tokens)
        layer_term = torch.stack(layer_terms).mean() if layer_terms else zero
        output_term = zero
        if self.args.kl_weight:
            hidden = states[-1].output[valid]
            if self.args.output_loss == "answers":
                losses = answer_cross_entropy(hidden, self._own_head, inputs["labels"][:, 1:][valid[:, :-1]])
            elif self.args.output_loss == "kl":
                losses = token_kl(hidden, self._target_head, signals.final, self._source_head)
            else:
                losses = token_steering_losses(hidden, self.semantic_map(signals.final.float()))
            output_term = losses.sum() / tokens
        if self.model.training:
            self._last_terms = torch.stack([layer_term.detach(), output_term.detach()])
            self._term_sums += self._last_terms
        loss = (self.args.relation_weight * layer_term + self.args.kl_weight * output_term) * ranks
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A step's forward and backward, and a look at its loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._broken.append(f"the loss of the examples {inputs['example_id'].tolist()} is ({self._terms()})")
        return loss

    def _terms(self) -> str:
        names = self.args.layer_loss, self.args.output_loss
        return ", ".join(f"{name} {term.item():.4g}" for name, term in zip(names, self._last_terms, strict=True))

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of a step's gradient: the moment at which all ranks agree whether anything is learnt from it.

        Raises:
            FloatingPointError: some loss or the gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        fp16 = self.accelerator.scaler is not None  # which drops such a step, and goes on with a smaller scale
        odd = not fp16 and not torch.isfinite(torch.as_tensor(norm))
        news = torch.tensor([bool(self._broken), odd, self._signals_taken.received is not None], device=self.args.device)
        loss, gradient, stopped = self.accelerator.reduce(news.int(), "sum").bool().tolist()
        if loss or gradient:
            if not loss:
                ids = torch.cat(self._examples_in_batch).tolist()
                self._broken.append(f"the gradient of the examples {ids} is, of a finite loss ({self._terms()})")
            step = self.state.global_step
            where = f"step {step + 1} of {self.schedule.total_steps} (stage {self.schedule.stage(step) + 1})"
            raise FloatingPointError(
                f"Not finite at {where}: {'; '.join(gather_object(self._broken))}. Nothing was learnt from this step; the last "
                f"checkpoint: {last_checkpoint(str(self.args.output_dir)) or 'none was written'}. Lower the learning rate, or "
                "look at these examples."
            )
        self._signals_taken.agreed = stopped
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean loss terms since the last log and the stage, counted from 1, to training logs."""
        steps = self.state.global_step - self._terms_logged
        if "loss" in logs and steps > 0:
            layer_term, output_term = (self.accelerator.reduce(self._term_sums, "sum") / steps).tolist()
            if self.args.relation_weight:
                logs[self.args.layer_loss] = layer_term
            if self.args.kl_weight:
                logs[self.args.output_loss] = output_term
            logs["stage"] = self.schedule.stage(self.state.global_step - 1) + 1
            self._term_sums.zero_()
            self._terms_logged = self.state.global_step
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per-example sums of answer cross-entropy, KL and layer loss, kept for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        layers = range(self.frontier.num_layers)
        with torch.no_grad():
            _, states, signals = self._forward(model, inputs, layers, training=False)
            valid = valid_positions(inputs["labels"])
            hidden = states[-1].output[valid]
            answers = inputs["labels"][:, 1:][valid[:, :-1]]
            rows = valid.nonzero()[:, 0]
            sums = torch.zeros(len(valid), 5, device=valid.device)
            sums[:, 0].index_add_(0, rows, token_cross_entropy(hidden, self._own_head, answers))
            sums[:, 1].index_add_(0, rows, token_kl(hidden, self._target_head, signals.final, self._source_head))
            sums[:, 2] = valid.sum(1)
            sums[:, 3] = torch.stack(
                [
                    sequence_relation_losses(state.input, state.output, supervision, valid)
                    for state, supervision in zip(states[:-1], signals.supervision, strict=True)
                ]
            ).mean(0)
            sums[:, 4] = relation_sequences(valid)
        self._evaluated.append(self.accelerator.gather_for_metrics(sums).cpu())
        return sums[:, 0].sum() / sums[:, 2].sum(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """``eval_loss`` (answer cross-entropy), ``eval_kl`` and ``eval_relation`` (mean over layers), exact over the split."""
        self._shard()
        self._evaluated: list[torch.Tensor] = []
        enabled = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = enabled and self.deepspeed is not None  # else the Trainer insists on ZeRO-3
        try:
            output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.is_deepspeed_enabled = enabled
        cross_entropy, kl, tokens, relation, sequences = torch.cat(self._evaluated).double().sum(0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = cross_entropy / tokens
        output.metrics[f"{metric_key_prefix}_kl"] = kl / tokens
        output.metrics[f"{metric_key_prefix}_relation"] = relation / max(sequences, 1)
        return output

    # Saving and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; a run that is resumed from its last step is over, where the Trainer would take one step more.

        Raises:
            ValueError: another process trains in this ``output_dir``; a checkpoint that is damaged, or of another run.
            FloatingPointError: a loss or gradient that is not finite; nothing is learnt from it, the last checkpoint stays.
            RuntimeError: the ranks' adapters differ.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, with a checkpoint of the last step written.
        """
        path, folder = self._checkpoint(resume_from_checkpoint), str(self.args.output_dir)
        if path:
            state = TrainerState.load_from_json(str(Path(path) / TRAINER_STATE_NAME))
            if state.global_step >= self.schedule.total_steps:
                self._shard()
                self._load_from_checkpoint(path)
                self.state = state
                shutil.rmtree(Path(folder) / PREFIX, ignore_errors=True)  # of a run that was killed after its last step
                return TrainOutput(state.global_step, 0.0, {})
        try:
            with (
                claimed(folder) if self.args.should_save else nullcontext(),
                self._signals_taken.watching(),
                disk_errors_explained(folder),
            ):
                output = super().train(path, *args, **kwargs)
        finally:
            skip_untouched(self.target_anatomy.layers, self.frontier.num_layers - 1)
        self._compare_ranks()
        if self.state.global_step < self.schedule.total_steps:
            self._signals_taken.leave()
        self._prefix = None
        if self.args.should_save:  # an interrupted run keeps it
            shutil.rmtree(Path(folder) / PREFIX, ignore_errors=True)
        return output

    def _checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from, the same for all ranks, and whole."""
        path = last_checkpoint(str(self.args.output_dir)) if wanted is True else wanted or None
        (path,) = broadcast_object_list([path])
        if path is None and wanted is not True:
            return None
        found = f"none in {self.args.output_dir} is whole" if path is None else damage(Path(path))
        if found:
            raise ValueError(
                f"The run cannot go on from {path or 'a checkpoint'}: {found}. Name another one, or start anew with "
                "resume_from_checkpoint=False. Machines without a common disk need save_on_each_node."
            )
        return path

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint whose files have checksums, which are written last; older ones go only then."""
        folder, limit = Path(str(self.args.output_dir)), self.args.save_total_limit
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._compare_ranks()
        if self.args.should_save:
            (checkpoint / CHECKSUMS).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)
            for other in sort_checkpoints(str(folder)):  # of a course that this run has left, by resuming or starting anew
                if int(other.rpartition("-")[2]) > self.state.global_step:
                    shutil.rmtree(other, ignore_errors=True)
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; with ``push_to_hub`` it is also published, unless the Trainer itself asks, for a checkpoint."""
        self._write(output_dir, checkpoint=_internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _write(self, output_dir: str | None, *, checkpoint: bool) -> None:
        """The adapter as it is; under FSDP and DeepSpeed it alone is put together, not the base with it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call=True)
        adapter = {
            name: whole(p.detach()).cpu() for name, p in cast(nn.Module, self.model).named_parameters() if "lora_" in name
        }
        self._save(output_dir, adapter)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """FSDP and DeepSpeed keep once more, to go on from, what is trainable: for once that is all of LoRA."""
        with trainable(self.lora_layers, range(self.frontier.num_layers)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Under FSDP torch first gives a state to what is trainable, which layers that have not trained yet must not get."""
        begun = self.frontier.trained(self.schedule.stage(max(self.state.global_step - 1, 0)))[-1] + 1
        with trainable(self.lora_layers, range(begun)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def record(self) -> dict[str, Any]:
        """What ``semalign.json`` says: versions, models, pairing, map, settings and data, without local paths."""
        settings = {name: getattr(self.args, name) for name in SETTINGS}
        settings["lora_targets"] = self._lora_targets
        return {
            "versions": {name: version(name) for name in ("hf_semalign", "torch", "transformers", "peft", "accelerate")},
            "method": self.method,
            "source": self.source_id,
            "target": self.target_id,
            "pairing": self.pairing.to_dict(),
            "map": {
                "kind": self.semantic_map.kind,
                "shape": list(self.semantic_map.matrix.shape),
                "shared_tokens": self.semantic_map.shared_tokens,
                "condition_number": self.semantic_map.condition_number,
                "fingerprint": self.semantic_map.fingerprint,
                "scales": list(self.scales),
            },
            "stages": list(self.schedule.boundaries),
            "processes": self.args.world_size,
            "settings": settings,
            "data": self.data_record,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.should_save:
            return
        adapted = self.accelerator.unwrap_model(self.model)
        adapted.peft_config["default"].base_model_name_or_path = self.target_id  # a local path stays here
        card = folder / "README.md"
        kept = card.read_bytes() if card.is_file() else None
        # "auto" would ask the Hub for the base, and save embeddings where vocabularies differ
        adapted.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        card.unlink(missing_ok=True)  # peft's placeholder card, which names the local path
        if kept is not None:
            card.write_bytes(kept)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        sums = {"adapter_checksum": file_digest(weights), "adapter_sha256": sha256(weights)}  # the second one the Hub has too
        (folder / RECORD_NAME).write_text(json.dumps({**self.record(), **sums}, indent=2))

    # Publishing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Have the repository ready, so that what cannot be published is refused before any long work."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            _, repo_id = open_repo(hub_name(self.args), token=token or self.args.hub_token, private=private)
            self.hub_model_id = cast(Any, repo_id)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint is not finished, and holds more than is meant for the Hub."""

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
        """Save the adapter and publish ``output_dir``, as :func:`hf_semalign.push_transfer` does.

        The card is the recipe's, where one has written ``results.json``, and else a new one, of what this trainer knows; a
        README that is no card is left alone, and refused.

        Args:
            commit_message: of the commit.
            blocking: True: the push ends with a comparison.
            token: by default ``hub_token`` of the settings, or the one that is logged in.
            revision: branch; by default ``hub_revision``.
            private: by default ``hub_private_repo``.
            tags: further tags of the card.
            kwargs: none; those of the Trainer are for its own card.

        Returns:
            URL of the commit; of the main process alone.

        Raises:
            ValueError, OSError: see :func:`hf_semalign.push_transfer`.
        """
        if kwargs or not blocking:
            given = sorted(kwargs) if blocking else ["blocking=False"]
            raise ValueError(f"push_to_hub does not take {given}: the card is the run's, and what was sent is compared.")
        folder, base = Path(str(self.args.output_dir)), str(base_model(cast(Any, self.model)).name_or_path)
        self._write(None, checkpoint=False)
        if not self.is_world_process_zero():
            return None
        card = folder / CARD
        known = card.is_file() and ((folder / "results.json").is_file() or card_fault(card))  # a recipe's, or somebody's own
        if not known:
            card.write_text(render_card(self.record(), self._card_results()), encoding="utf-8")
        if tags:
            content: Any = ModelCard(card.read_text(encoding="utf-8"))
            more = [tags] if isinstance(tags, str) else tags
            content.data.tags = list(dict.fromkeys([*(content.data.tags or ()), *more]))
            card.write_text(str(content), encoding="utf-8")
        return push_transfer(
            folder,
            self.hub_model_id or hub_name(self.args),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            target=base or None,
            message=commit_message or "SemAlign transfer",
        )

    def _card_results(self) -> dict[str, Any]:
        """What a card needs beside the record, as far as this trainer knows: the last evaluation, if it was of this step."""
        last = [e for e in self.state.log_history if "eval_kl" in e and e["step"] == self.state.global_step]
        return {
            "task": "its training data",
            "dataset": None,
            "steps": self.state.global_step,
            "metrics": {self.method: {"kl": last[-1]["eval_kl"], "loss": last[-1]["eval_loss"]}} if last else {},
            "history": [entry for entry in self.state.log_history if "stage" in entry],
            "seconds": self.seconds,
            "peak_memory_mb": None,
            "machine": {"device": str(self.args.device)},
            "figures": [],
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The weights of a checkpoint of this run."""
        self._check_run(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_run(self, resume_from_checkpoint: str) -> None:
        """Refuse a checkpoint of another run: its weights would go on under other pairs, settings or data."""
        marks = {"FSDP": f"{FSDP_MODEL_NAME}.bin", "DeepSpeed": "latest"}
        enabled = {"FSDP": self.is_fsdp_enabled, "DeepSpeed": self.is_deepspeed_enabled}
        for engine, mark in marks.items():
            if (Path(resume_from_checkpoint) / mark).is_file() != enabled[engine]:
                way = f"without {engine}, or with save_only_model" if enabled[engine] else f"under {engine}"
                raise ValueError(
                    f"The checkpoint {resume_from_checkpoint} was made {way}: resume with the accelerate config of its run, or "
                    "start anew in another output_dir."
                )
        saved = json.loads((Path(resume_from_checkpoint) / RECORD_NAME).read_text())
        ours = json.loads(json.dumps(self.record()))
        defaults = {one.name: one.default for one in fields(SemAlignConfig)}  # of settings that are newer than the checkpoint
        different = [
            name
            for name, mine, theirs in [
                *((key, ours[key], saved[key]) for key in ("method", "source", "target", "data", "stages")),
                ("number of processes", ours["processes"], saved.get("processes", ours["processes"])),
                ("source layers", ours["pairing"]["source_layers"], saved["pairing"]["source_layers"]),
                ("map", ours["map"]["fingerprint"], saved["map"]["fingerprint"]),
                *((key, value, saved["settings"].get(key, defaults.get(key))) for key, value in ours["settings"].items()),
            ]
            if mine != theirs
        ]
        if different:
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} was made with other {', '.join(different)}: resume with the same "
                "models, data and settings, or start anew in another output_dir."
            )
