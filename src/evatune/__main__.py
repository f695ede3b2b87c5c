"""`python -m evatune`."""

from evatune.cli import main

main()
