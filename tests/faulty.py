"""A command in which one function fails, as a program: python -m tests.faulty COMMAND ...

The environment variable FAULT names it, module:name or module:class.name; where it is not set,
nothing fails. With BYTES, it fails as a device does that has too little memory. Hosts wait for each
other as many seconds as SILENT says, where it is set.
"""

import importlib
import os


def main():
    """Runs the command on this machine."""
    if fault := os.environ.get("FAULT"):
        module, _, name = fault.partition(":")
        place, *below = [importlib.import_module(module), *name.split(".")]
        for part in below[:-1]:
            place = getattr(place, part)

        def fail(*_, **__):
            if "BYTES" in os.environ:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes.")
            raise ValueError(f"{name} is broken here")

        getattr(place, below[-1])  # there is one to replace
        setattr(place, below[-1], fail)
    if seconds := os.environ.get("SILENT"):
        from experiments import hosts

        hosts._SILENT_S = int(seconds)
    from experiments.__main__ import main  # its signals, as users start it

    main()


if __name__ == "__main__":
    main()
