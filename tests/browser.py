"""A headless Chromium over its DevTools protocol: one page, what it asks for, what it complains of."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The path of a Chromium: $CHROMIUM, or the first known name on PATH."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """The page of a browser.

    Attributes:
        requests: addresses asked for since `open`, that of the page first.
        complaints: since `open`: exceptions, console messages, log entries (refusals of the content policy).
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._number, self._session = socket, 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded: set[str] = set()  # loads that are done
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, timeout: float = 20.0, **params: Any) -> dict[str, Any]:
        """Answer of a DevTools command; RuntimeError where it fails."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=timeout))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        """Load a file, to the end of its scripts."""
        self.requests, self.complaints = [], []
        loader = self.call("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        while loader not in self._loaded:
            self._note(json.loads(self._socket.recv(timeout=20)))

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page (a promise's too); RuntimeError where it throws."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """A key that goes to whatever has the focus."""
        codes = {"Tab": 9, " ": 32, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        codes |= {"ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35}
        key_event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        if key == " ":
            key_event["text"] = " "
        self.call("Input.dispatchKeyEvent", type="keyDown", **key_event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_event)

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getClientRects()[0];"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """The window's size in CSS pixels, and device pixels for each; returns when the page knows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 700,
        )
        # The handlers of a new size run in the next frame, before what was asked of that frame.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def scheme(self, name: str) -> None:
        """prefers-color-scheme: "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole, timeout=60)["data"]
        path.write_bytes(base64.b64decode(image))


@contextlib.contextmanager
def open_browser(executable: str) -> Iterator[Page]:
    """A browser of its own, with an empty profile; it and all its processes are gone in the end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",  # the tests may run as root, and open no page but their own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen(
            [executable, *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with connect(_address(Path(profile), process), max_size=None, open_timeout=30) as socket:
                yield Page(socket)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(profile: Path, process: subprocess.Popen) -> str:
    """Where the browser listens: it writes port and path into its profile when it is ready."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        lines = file.read_text().split("\n") if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise TimeoutError("the browser did not open its DevTools port within 60 s")
