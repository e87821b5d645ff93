"""The methods that SemAlign is judged against, on the same splits, LoRA modules, seeds and evaluation."""
