"""Fine-tuning runs: recipes, methods, tasks, comparisons."""
