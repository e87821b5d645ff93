"""The four benchmarks, through lm-eval."""
