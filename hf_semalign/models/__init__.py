"""Language models: their parts, LoRA, hooks and loading."""
