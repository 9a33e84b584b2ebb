"""A headless Chromium, spoken to through a pipe by the DevTools protocol: what a page shows, says and asks for."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
WAIT = 120  # seconds for an answer: the machine may be busy with other tests
#: Nothing of its own goes to a network: what is asked for is the page's.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def find() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Use it as a context manager."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        read_here, self._write_fd = os.pipe()
        self._read_fd, write_here = os.pipe()
        command = [find(), *OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]

        def descriptors():
            """Chromium reads the protocol from descriptor 3 and writes it to 4."""
            ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_here, write_here)]
            for fd, place in zip(ends, (3, 4), strict=True):
                os.dup2(fd, place)

        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=descriptors, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(read_here)
        os.close(write_here)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict] = []

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            os.close(self._write_fd)  # at which it ends
        try:
            self._process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._read_fd)

    def call(self, method: str, **parameters):
        """The result of a method of the protocol. What happens meanwhile is kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._receive(WAIT)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            assert left > 0 and select.select([self._read_fd], [], [], left)[0], "Chromium does not answer"
            piece = os.read(self._read_fd, 1 << 16)
            assert piece, "Chromium ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, dark: bool = False) -> None:
        """Load a file and wait until it and all that it asks for is there."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(WAIT))
        self.evaluate("new Promise(r => setTimeout(r, 100))")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get("value")

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself left out."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What stands in the console, and what was not caught."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in methods]
