"""`python -m experiments COMMAND ...`: the same as `ictjax COMMAND ...`."""

import os

from envs.stopping import armed
from experiments.compiled_cache import keep_compiled
from experiments.streams import open_missing


def main() -> None:
    """Answers signals from here on, while everything else is still to be imported."""
    open_missing()
    keep_compiled(os.environ)
    with armed():
        from experiments import cli

        cli.main()


if __name__ == "__main__":
    main()
