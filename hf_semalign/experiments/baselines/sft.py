"""Fine-tuning on the answers alone, LoRA in all layers at once: what a target learns without any source.

SemAlign's trainer and not TRL's ``SFTTrainer``, so that batches, LoRA modules, checkpoints, evaluation and card are the same
for all methods; ``tests/test_baselines.py`` holds both to the same losses and the same adapter.
"""

from __future__ import annotations

from hf_semalign.trainer import SemAlignTrainer


class SFTTrainer(SemAlignTrainer):
    """Cross-entropy of the answers, mean over the valid positions of the global batch; the source is only measured.

    ``SFTTrainer(..., args=SemAlignConfig(**SFTTrainer.settings, ...))``.
    """

    method = "sft"
    settings = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "answers"}
