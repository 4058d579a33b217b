"""The page as a person has it: the command serves it in a process of its own, and Debian's Chromium shows it."""

from __future__ import annotations

import base64
import io
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

Found = TypeVar("Found")
PATIENCE = 60  # seconds; other tests may keep both cores busy
_FLAGS = (
    "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1280,1000",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


def lacking() -> str | None:
    """Why no browser can be driven here; None where one can."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(missing)} not found: make browser, or apt install chromium chromium-driver" if missing else None
    )


@contextmanager
def served(*arguments: object) -> Iterator[Callable[[], str]]:
    """`magnet-fast app` with these arguments in a process of its own. What is yielded waits for its address."""
    command = [sys.executable, "-m", "magnet_fast", "app", "--device", "cpu", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def address() -> str:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            assert ready.select(2 * PATIENCE), "the server prints nothing"
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        return line.split()[0]

    try:
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)
        process.stdout.close()


@contextmanager
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that saves into a folder and logs its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*_FLAGS, *(["--no-sandbox"] if os.getuid() == 0 else [])):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, driver: webdriver.Chrome, address: str, downloads: Path) -> None:
        self.driver, self.address, self.downloads = driver, address, downloads

    def open(self) -> None:
        """The page anew."""
        self.driver.get(self.address)
        self.wait(lambda: self.all("#segment"))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.wait(lambda: self.all(selector))[0]

    def wait(self, found: Callable[[], Found]) -> Found:
        """What `found` gives as soon as that is true; what is being redrawn meanwhile is looked at again."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if value := found():
                    return value
            except (WebDriverException, OSError):
                pass
            assert time.monotonic() < end, f"not within {PATIENCE} s; on the page: {self.one('body').text[:2000]}"
            time.sleep(0.05)

    def click(self, found: Callable[[], WebElement | None]) -> None:
        """Click on what `found` gives, once it stands still: the page moves while its parts come, and the click would
        meet what has come in that place."""

        def still() -> WebElement | None:
            if (element := found()) is None:
                return None
            before = element.rect
            time.sleep(0.1)
            return element if element.rect == before and element.is_displayed() else None

        self.wait(still).click()

    def example(self, number: int) -> None:
        """Choose a drawn scene."""
        self.click(lambda: self.one(f"#scenes tbody tr:nth-child({number})"))
        self._chosen()

    def paste(self, picture: Path) -> None:
        """Copy a picture elsewhere, and paste it here."""
        self.driver.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        self.driver.execute_async_script(
            "const bytes = Uint8Array.from(atob(arguments[0]), one => one.charCodeAt());"
            "const copied = new ClipboardItem({'image/png': new Blob([bytes], {type: 'image/png'})});"
            "navigator.clipboard.write([copied]).then(arguments[1])",
            base64.b64encode(picture.read_bytes()).decode(),
        )
        self.click(lambda: self.one("#picture button[aria-label='Paste from clipboard']"))
        self._chosen()

    def photograph(self) -> None:
        """Take a picture with the browser's make-believe camera."""
        self.click(lambda: self.one("#picture button[aria-label='Capture from camera']"))
        self.click(lambda: next((one for one in self.all("#picture button") if "Webcam" in one.text), None))
        self.wait(lambda: (video := self.all("#picture video")) and int(video[0].get_property("readyState")) >= 2)
        self.click(lambda: self.one("#picture button[aria-label='capture photo']"))
        self._chosen()

    def upload(self, picture: Path) -> None:
        remove = "#picture button[aria-label='Remove Image']"
        if self.all(remove):
            self.click(lambda: self.one(remove))
            self.wait(lambda: not self.all(remove))
        self.one("#picture input[type=file]").send_keys(str(picture))
        self._chosen()

    def _chosen(self) -> None:
        """The picture has come: the server has it, and the page what the server calls it."""
        self.wait(lambda: [one for one in self.all("#picture img") if "/file=" in (one.get_attribute("src") or "")])

    def write(self, text: str) -> None:
        field = self.one("#sentences textarea")
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)

    def press(self) -> np.ndarray:
        """Press Segment: the picture with its masks, once it is there."""
        before = self.shown()
        self.click(lambda: self.one("#segment"))
        return self.changed(before)

    def shown(self) -> str | None:
        """Where the picture with its masks is to be had."""
        return next((one.get_attribute("src") for one in self.all("#overlay img")), None)

    def changed(self, before: str | None) -> np.ndarray:
        """That picture, once it is another one: (H, W, 3) uint8."""
        source = self.wait(lambda: (now := self.shown()) != before and now)
        return np.asarray(Image.open(io.BytesIO(fetched(source))).convert("RGB"))

    def threshold(self, value: float) -> np.ndarray:
        """Move the slider to a threshold, from its end: the picture with its masks at it."""
        steps = [Keys.ARROW_LEFT] * round((1 - value) / 0.01)
        self.one("#threshold input[type=range]").send_keys(Keys.END, *steps)
        self.wait(lambda: f"above {value:g}," in self.one("#legend").text)
        return self.changed(None)

    def download(self, name: str) -> Path:
        """Press a file's link: the file, once it is whole."""
        file = self.downloads / name
        file.unlink(missing_ok=True)

        def link() -> WebElement | None:
            return next((one for one in self.all("#files a") if name in (one.get_attribute("download") or "")), None)

        self.click(link)
        return self.wait(lambda: file.exists() and not list(self.downloads.glob("*.crdownload")) and file)

    def said(self) -> str:
        """The message that stands in the page, which is then closed."""
        text = self.wait(lambda: "".join(one.text for one in self.all("[data-testid=toast-text]")))
        self.click(lambda: self.one("[data-testid=toast-close]"))
        self.wait(lambda: not self.all("[data-testid=toast-text]"))
        return text

    def choose(self, field: str, name: str) -> None:
        """Choose from a list."""
        self.click(lambda: self.one(f"#{field} input"))
        self.click(lambda: next((one for one in self.all("[role=option]") if name in one.text), None))
        self.wait(lambda: name in (self.one(f"#{field} input").get_attribute("value") or ""))

    def requested(self) -> set[str]:
        """Every address that the browser asked for since the last time."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"}


def fetched(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        return answer.read()
