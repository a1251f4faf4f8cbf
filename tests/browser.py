"""A real Chromium for tests: screens, colour schemes, an accessibility audit."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCREENS = {"laptop": (1280, 800), "phone": (390, 844)}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
).split()


def _found() -> tuple[str, str]:
    """Chromium and its driver, or a skip that says what is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium chromium-driver)")
    pytest.importorskip("selenium", reason="needs selenium, of the extra dev")
    return browser, driver


@contextmanager
def chromium() -> Iterator[Any]:
    """A fresh headless browser, closed at the end."""
    browser, driver = _found()
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        page = webdriver.Chrome(options, webdriver.ChromeService(driver))
        page.set_page_load_timeout(60)
        try:
            yield page
        finally:
            page.quit()


def show_as(page: Any, screen: str, theme: str) -> None:
    """Sets the size of the screen and the colour scheme, for this page and those after it."""
    width, height = SCREENS[screen]
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"},
    )
    scheme = [{"name": "prefers-color-scheme", "value": theme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def screenshot(page: Any, path: Path, whole: bool = True) -> None:
    """Writes what is on the screen, or the whole page, as PNG."""
    settings = {"captureBeyondViewport": whole, "format": "png"}
    if whole:
        size = page.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        settings["clip"] = {"x": 0, "y": 0, **{k: size[k] for k in ("width", "height")}, "scale": 1}
    path.write_bytes(
        base64.b64decode(page.execute_cdp_cmd("Page.captureScreenshot", settings)["data"])
    )


def overflow(page: Any) -> int:
    """Pixels by which the page is wider than the screen."""
    return int(
        page.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    )


def audit(page: Any) -> list[str]:
    """Findings of axe-core on the page as it is shown, all but the minor ones."""
    spec = find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-core-python, of the extra dev")
    # Another axe.min.js may be named, a newer one than the package brings.
    script = Path(os.environ.get("AXE_CORE", Path(spec.origin).with_name("axe.min.js")))
    # Through the driver, since the pages' own policy forbids scripts from elsewhere.
    page.execute_cdp_cmd("Runtime.evaluate", {"expression": script.read_text("utf-8")})
    result = page.execute_async_script("axe.run(document).then(arguments[0])")
    return [
        f"{found['impact']}: {found['id']}: {found['nodes'][0]['html']}"
        for found in result["violations"]
        if found["impact"] != "minor"
    ]
