"""``SemAlignTrainer``: trains on the layer loss of the frontier and the KL to the source's output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import TrainOutput

from hf_semalign.cache.examples import Examples
from hf_semalign.cache.prefix import PrefixUnavailable, TargetPrefix, prefix_pays
from hf_semalign.method.losses import relation_sequences
from hf_semalign.splits import taught_positions, valid_positions
from hf_semalign.transfer import TransferTrainer

logger = logging.getLogger(__name__)


class SemAlignTrainer(TransferTrainer):
    """Transfer knowledge from a source model into a target model.

    The loss of a step is the layer loss of the layers at the frontier (equations 4 to 7) plus the KL to the source's output
    (equation 8). The first is averaged over the sequences of the global batch, the second over its valid positions, so gradient
    accumulation and data parallelism change nothing.

    The constructor checks models, data and settings and adds LoRA to the target. The long work on the source (attribution,
    map, signals) is done once, by :meth:`prepare`, which :meth:`train` and :meth:`evaluate` call.

    Args:
        model: the target: a causal LM, a Hub id or a local folder. LoRA is added to it.
        source_model: the source, in the same forms.
        args: a :class:`SemAlignConfig`.
        train_dataset: the align split: rows with ``prompt`` and ``completion``, with ``messages``, or with ``input_ids`` and
            ``labels``.
        eval_dataset: the eval split in the same form, or a dict of several.
        extract_dataset: the split for attribution and ``scale: match``. If one of them needs it and it is not given, up to
            20 rows (at most a fifth) are taken out of ``train_dataset``, and the log says so.
        processing_class: the target's tokenizer. It is loaded with the model if that is an id. Not needed for token ids.
        pairing: a pairing to use instead of ``args.pairing``.
        semantic_map: a map to use instead of ``args.map_kind``.
        callbacks: further callbacks.

    Attributes:
        pairing: the :class:`LayerPairing` in use.
        semantic_map: the :class:`SemanticMap` in use.
        objective: the losses.
        scales: factor on the mapped states of each pair.
        known: what was known of the run before weights were loaded.
        seconds: wall time of the phases before training.

    Raises:
        ValueError: bad settings, data, models or tokenizers, before any long work.
    """

    method = "semalign"
    _prefix: TargetPrefix | None = None
    _sequences_in_batch: torch.Tensor | None = None
    _terms_logged = 0  # up to this step

    @cached_property
    def _term_sums(self) -> torch.Tensor:
        """Sums of layer loss and output loss since the last log."""
        return torch.zeros(2, device=self.args.device)

    # The target below the frontier

    def enter_stage(self, stage: int) -> None:
        """Called before the first step of a stage. It also moves the target prefix."""
        super().enter_stage(stage)
        if self._prefix is not None:
            with self._autocast():
                self._prefix.move(stage)

    def _make_prefix(self) -> TargetPrefix | None:
        """The target prefix; ``None`` if it is not exact or does not pay."""
        args, examples = self.args, Examples(cast(Dataset, self.train_dataset))
        if not prefix_pays(args, self.frontier, self.schedule.total_steps, len(examples.ids)):
            return None
        if self.is_fsdp_enabled:
            logger.info("Under FSDP the whole target runs at every step: a target prefix would need layers that are sharded.")
            return None
        prefix = None
        try:
            with self._autocast():
                prefix = TargetPrefix(
                    self.accelerator.unwrap_model(self.model).train(),
                    examples,
                    self.data_collator,
                    batch_size=args.per_device_eval_batch_size,
                    device=args.device,
                    memory=args.prefix_memory,
                    part=self._own_part,
                    progress=not args.disable_tqdm,
                )
        except PrefixUnavailable as reason:
            logger.warning("The whole target runs at every step, without the target prefix: %s.", reason)
        return prefix if all(gather_object([prefix is not None])) else None  # the processes share its moves

    def entered(self, inputs: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """A context in which the target's forward on a batch begins at the frontier, if there is a prefix."""
        return self._prefix.entered(inputs) if self._prefix else nullcontext()

    # Batches and losses

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Also count the sequences of the global batch that have a relation, because the layer loss averages over them."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            taught = [taught_positions(batch) for batch in samples]
            counts = torch.stack([torch.stack((relation_sequences(one).sum(), one.sum())) for one in taught]).sum(0)
            self._sequences_in_batch, in_batch = self.accelerator.reduce(counts.to(device), "sum")
            if "source_rank" in samples[0] and self.args.output_loss != "answers":
                num_items = in_batch.clamp_min(1)
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute ``relation_weight`` x layer loss + ``kl_weight`` x output loss (equation 9).

        The batches of a step are shares of one mean over the global batch. Without ``num_items_in_batch``, this batch is the
        global batch.
        """
        stage = self.schedule.stage(self.state.global_step)
        layers = self.frontier.supervised(stage) if self.args.uses_pairs else range(0)
        outputs, states, signals = self._forward(model, inputs, layers, training=self.model.training)
        if num_items_in_batch is None:
            taught = taught_positions(inputs)
            tokens = valid_positions(inputs["labels"]).sum() if self.args.output_loss == "answers" else taught.sum()
            sequences, ranks = relation_sequences(taught).sum(), 1
        else:
            tokens, sequences, ranks = num_items_in_batch, self._sequences_in_batch, self.accelerator.num_processes
        terms = self.objective.terms(states, signals, inputs["labels"], tokens, sequences)
        if self.model.training:
            self._last_terms = torch.stack(terms).detach()
            self._term_sums += self._last_terms
        loss = self.objective.total(*terms) * ranks
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self) -> dict[str, float]:
        """Layer loss and output loss of the last batch, by name."""
        return dict(zip((self.args.layer_loss, self.args.output_loss), self._last_terms.tolist(), strict=True))

    def begin_training(self) -> None:
        """Called before the first step. It resets the logged sums and makes the target prefix."""
        self._term_sums.zero_()
        self._terms_logged = self.state.global_step
        self._prefix = self._make_prefix()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, see :meth:`~hf_semalign.training.layerwise.LayerwiseTrainer.train`."""
        self.prepare()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._prefix = None  # its memory is free again

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean loss terms since the last log, and the stage counted from 1, to training logs."""
        steps = self.state.global_step - self._terms_logged
        if "loss" in logs and steps > 0:
            layer_term, output_term = (self.accelerator.reduce(self._term_sums, "sum") / steps).tolist()
            if self.args.uses_pairs:
                logs[self.args.layer_loss] = layer_term
            if self.args.kl_weight:
                logs[self.args.output_loss] = output_term
            logs["stage"] = self.schedule.stage(self.state.global_step - 1) + 1
            self._term_sums.zero_()
            self._terms_logged = self.state.global_step
        super().log(logs, start_time)
