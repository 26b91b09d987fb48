"""`python -m experiments COMMAND ...`: the same as `ictjax COMMAND ...`."""

from experiments.cli import main

main()
