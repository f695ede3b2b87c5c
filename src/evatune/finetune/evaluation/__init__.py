"""Measures of finished runs: standard tasks, ours and those of lm-evaluation-harness."""
