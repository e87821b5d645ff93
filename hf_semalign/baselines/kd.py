"""Ordinary distillation: KL to the source's output, LoRA in all layers at once, nothing about hidden states.

It is what SemAlign's trainer does with one joint stage and no layer loss, so it runs there, under the same optimizer,
batches, LoRA modules and evaluation: ``SemAlignTrainer(..., args=SemAlignConfig(**settings, **kd.SETTINGS))``.
"""

SETTINGS = {"frontier": "joint", "relation_weight": 0.0, "kl_weight": 1.0, "output_loss": "kl"}
