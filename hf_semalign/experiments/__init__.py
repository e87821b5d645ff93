"""Recipes, baselines, benchmarks, comparisons and analyses; only the command line imports this room."""
