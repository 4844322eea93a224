"""A headless Chromium, for the tests of pages."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """A headless Chromium behind chromedriver, in the words of the WebDriver protocol."""

    def __init__(self, port: int, profile: Path) -> None:
        self.port, self.path = port, "/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.path += "/" + self("POST", "", capabilities={"alwaysMatch": asked})["sessionId"]

    def __call__(self, method: str, command: str, **arguments: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, self.path + command, json.dumps(arguments) if method == "POST" else None)
            answer = connection.getresponse()
            value = json.loads(answer.read())["value"]
        finally:
            connection.close()
        assert answer.status == 200, value
        return value

    def width(self, pixels: int) -> None:
        screen = {"width": pixels, "height": 844, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=screen)

    def theme(self, name: str) -> None:
        """What the reader has chosen: `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def picture(self) -> NDArray[np.floating]:
        """What is on the screen: red, green and blue in [0, 1], by row and column [H, W, 3]."""
        return imread(io.BytesIO(base64.b64decode(self("GET", "/screenshot"))), format="png")[..., :3]

    def run(self, script: str) -> Any:
        return self("POST", "/execute/sync", script=script, args=[])

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self("POST", "/se/log", type=kind)

    def asked(self) -> set[str]:
        """The addresses that were asked for, but for those of the browser's own first page."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return {each["request"]["url"] for each in requests if not each["documentURL"].startswith("chrome:")}


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    with subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            ports = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout or ())
            chromium = Browser(next(int(port[1]) for port in ports if port), profile)
            try:
                yield chromium
            finally:
                chromium("DELETE", "")
        finally:
            driver.terminate()
