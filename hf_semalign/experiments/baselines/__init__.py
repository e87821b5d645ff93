"""Baselines for SemAlign, with the same splits, LoRA modules, seeds and evaluation."""
