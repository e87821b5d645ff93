"""MMLU, GSM8K, HumanEval and MBPP, scored with lm-eval."""
