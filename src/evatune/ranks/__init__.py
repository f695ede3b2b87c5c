"""Spectra to ranks within a budget. Pure: needs spectra and sizes, no model."""

from evatune.ranks.allocation import Candidate, RankPlan, allocate

__all__ = ["Candidate", "RankPlan", "allocate"]
