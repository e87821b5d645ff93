"""Ordinary distillation: KL to the source's output, LoRA in all layers at once, nothing about hidden states."""

from __future__ import annotations

from hf_semalign.trainer import SemAlignTrainer


class KDTrainer(SemAlignTrainer):
    """SemAlign's trainer with one joint stage and no layer loss: the same optimizer, batches, LoRA modules and evaluation.

    ``KDTrainer(..., args=SemAlignConfig(**KDTrainer.settings, ...))``.
    """

    method = "kd"
    settings = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "kl"}
