"""Recipes, comparisons and analyses; used by the command line alone."""
