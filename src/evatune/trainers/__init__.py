"""Trainers: the same initialization, on their own data and device."""
