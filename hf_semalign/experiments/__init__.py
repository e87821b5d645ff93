"""Recipes, baselines, benchmarks, comparisons and analyses. Only the command line imports this package."""
