"""Trainers: the same initialization, on their own data and device. The place that knows
`transformers.Trainer`."""
