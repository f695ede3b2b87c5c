"""Tasks: model, data and batches per domain. Together with `trainers/`, the place that imports `transformers`."""
