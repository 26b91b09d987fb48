"""The standard streams, for a program that was started without some of them (`>&-`, a service)."""

import os
import sys


def open_missing() -> None:
    """Opens /dev/null in the place of each standard stream that is closed: reading there ends at
    once, and what is written goes nowhere. Otherwise the next file that is opened would take its
    number, and whatever a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
