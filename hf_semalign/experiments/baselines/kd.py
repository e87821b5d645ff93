"""Ordinary distillation: KL to the source's output, with LoRA in all layers at once and no loss on hidden states."""

from __future__ import annotations

from hf_semalign.trainer import SemAlignTrainer


class KDTrainer(SemAlignTrainer):
    """SemAlign's trainer with one joint stage and no layer loss. Optimizer, batches, LoRA modules and evaluation are the same.

    Use it as ``KDTrainer(..., args=SemAlignConfig(**KDTrainer.settings, ...))``.
    """

    method = "kd"
    settings = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "kl"}
