"""A real headless Chromium, driven over its remote-debugging pipe: no driver program, no port, nothing to install.

The protocol (Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/) is JSON messages ended by
a zero byte; Chromium reads them from descriptor 3 and answers on 4.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.programs import require_program

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


class Browser:
    """One page in one browser; a context manager."""

    def __init__(self, directory: Path) -> None:
        chromium = require_program("chromium", package="chromium")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # Chromium wants its pipe at 3 and 4, whatever those are here: a shell moves them there in the child.
        command = [chromium, *FLAGS, f"--user-data-dir={directory}", "about:blank"]
        move = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._log = (directory / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", move, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        """What the page wrote to its console as a warning or an error, and exceptions that nobody caught."""
        (page,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of that size."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=url)

    def before_each_page(self, script: str) -> None:
        """Run a script in every page from now on, before its own."""
        self._call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def evaluate(self, script: str) -> Any:
        """The value of an expression; a promise is waited for. Fails when it throws."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: int = 30) -> None:
        """Until an expression is true: looked at whenever the document changes."""
        assert self.evaluate(
            f"""new Promise(done => {{
                const holds = () => {{ try {{ return {condition}; }} catch {{ return false; }} }};  // not parsed so far
                const met = () => {{ if (holds()) {{ watch.disconnect(); done(true); }} }};
                const watch = new MutationObserver(met);
                watch.observe(document, {{subtree: true, childList: true, attributes: true, characterData: true}});
                setTimeout(() => done(false), {seconds * 1000});
                met();
            }})"""
        ), f"{condition}: not within {seconds} s: {self.evaluate('document.body.innerText')}"

    def screenshot(self, path: Path) -> None:
        """The whole page, also what lies below the window, as PNG."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        session, self._session = self._session, ""
        if session:
            self._call("Browser.close")
        os.close(self._out)
        os.close(self._in)
        self._process.wait(timeout=30)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            self._listen(answer)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._buffer:
            read = os.read(self._in, 1 << 20)
            assert read, f"chromium ended: {Path(self._log.name).read_text(errors='replace')}"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _listen(self, message: Any) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] in {"warning", "error"}:
            self.complaints.append(" ".join(str(item.get("value")) for item in params["args"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] in {"warning", "error"}:
            self.complaints.append(params["entry"]["text"])
