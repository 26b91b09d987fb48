"""Headless Chromium for tests of pages, spoken to over a pipe: no driver, no port."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

PATH = shutil.which("chromium")


class Browser:
    """One page of one Chromium without a network. A context manager.

    Args:
      profile: an empty folder of its own.
    """

    def __init__(self, profile: pathlib.Path):
        assert PATH is not None
        theirs, self._to = os.pipe()
        self._from, back = os.pipe()
        # Chromium reads commands from 3 and answers on 4
        command = f'exec "$@" 3<&{theirs} 4>&{back}'
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", PATH, *flags],
            pass_fds=(theirs, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self._number, self._read, self._session, self._loads = 0, b"", None, 0
        self.complaints: list[str] = []  # of the console, and exceptions
        (page,) = (
            target
            for target in self.ask("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        )
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._to)  # Chromium ends with its pipe
        self._process.wait()
        os.close(self._from)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the DevTools protocol."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._to, json.dumps(request).encode() + b"\0")
        while (message := self._next()).get("id") != self._number:
            self._hear(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path: pathlib.Path, *, width: int, dark: bool = False, part: str = "") -> None:
        """Loads a page at this width, in CSS pixels, scrolled to a part of it."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.ask("Page.navigate", url="about:blank")  # another part alone would not load it again
        self._loaded()
        self.ask("Page.navigate", url=path.as_uri() + part)
        self._loaded()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; what it promises is awaited."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: pathlib.Path) -> None:
        """The whole page as a PNG."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _loaded(self) -> None:
        while not self._loads:
            self._hear(self._next())
        self._loads -= 1

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            read = os.read(self._from, 1 << 20)
            assert read, "Chromium has ended"
            self._read += read
        line, _, self._read = self._read.partition(b"\0")
        return json.loads(line)

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Page.loadEventFired":
            self._loads += 1
        elif message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(message["params"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
