"""A bucket in a folder, behind gs://, for tests in this process; and, as a program, for commands in
another one: python -m tests.bucket FOLDER COMMAND ... Objects of the names in the environment
variable AWAY cannot be read there.
"""

import os
import pathlib
import sys

from etils.epath import backend, gpath


class Store(backend._OsPathBackend):
    """Objects appear when they are closed; `left` more can be written, and those with a name of
    `away` in theirs cannot be read.
    """

    def __init__(self, folder, away=()):
        self.folder, self.left, self.written, self.away = folder, 10**9, [], away

    def _here(self, path):
        return str(self.folder / os.fspath(path).removeprefix("gs://"))

    def open(self, path, mode):
        if "w" in mode:
            if self.left == 0:
                raise OSError("503 Service Unavailable")
            self.left -= 1
            self.written.append(os.fspath(path).removeprefix("gs://bucket/runs/a/"))
        elif any(name in os.fspath(path) for name in self.away):
            raise OSError("503 Service Unavailable")
        return super().open(self._here(path), mode)

    def exists(self, path):
        return super().exists(self._here(path))

    def isdir(self, path):
        return super().isdir(self._here(path))

    def mkdir(self, path, **more):
        super().mkdir(self._here(path), **more)

    def makedirs(self, path, **more):
        super().makedirs(self._here(path), **more)

    def remove(self, path):
        super().remove(self._here(path))

    def stat(self, path):
        return super().stat(self._here(path))


def main():
    """Runs a command of the program on this machine, whose gs:// is a folder."""
    _, folder, *argv = sys.argv
    gpath._PREFIX_TO_BACKEND["gs"] = Store(pathlib.Path(folder), os.environ.get("AWAY", "").split())
    gpath._is_tf_installed = lambda: False
    sys.argv = ["ictjax", *argv]
    from experiments.__main__ import main  # its signals, as users start it

    main()


if __name__ == "__main__":
    main()
