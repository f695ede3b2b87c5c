"""Trainers: the same initialisation, on their own data and device. The place that knows
`transformers.Trainer`."""
