"""Fine-tuning on the answers, with LoRA in all layers at once. It shows what the target learns without a source.

It uses SemAlign's trainer instead of TRL's ``SFTTrainer``, so that all methods share batches, LoRA modules, checkpoints,
evaluation and card. ``tests/test_baselines.py`` checks that both give the same losses and the same adapter.
"""

from __future__ import annotations

from hf_semalign.trainer import SemAlignTrainer


class SFTTrainer(SemAlignTrainer):
    """Minimise the mean cross-entropy over the valid positions of the global batch. The source is only evaluated.

    Use it as ``SFTTrainer(..., args=SemAlignConfig(**SFTTrainer.settings, ...))``.
    """

    method = "sft"
    settings = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "answers"}
