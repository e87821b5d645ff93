"""MMLU, GSM8K, HumanEval and MBPP, through lm-eval."""
