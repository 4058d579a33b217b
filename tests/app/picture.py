"""`python -m tests.app.picture FILE`: a picture of the page, with a drawn scene, for the documentation."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.app.browser import Page, chromium, lacking, served


def main(out: Path) -> None:
    if lacking():
        raise SystemExit(lacking())
    with tempfile.TemporaryDirectory() as folder, served() as address, chromium(Path(folder)) as driver:
        page = Page(driver, address(), Path(folder))
        page.open()
        page.example(4)
        page.press()
        driver.execute_script("window.scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    shot.save(out, quality=88, subsampling=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
