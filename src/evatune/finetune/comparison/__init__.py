"""Comparisons: many runs of methods on tasks, their learning rates, and what they tell."""
