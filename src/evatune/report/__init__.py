"""Tables, plots and pages from results.

A leaf: the command line imports it, and `evatune.utils.shown` loads it by name for a result's
`summary`, `to_pandas` and `plot`.
"""
