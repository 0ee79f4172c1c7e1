"""A headless browser of the Chromium family, if there is one: what a page looks like, and does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

_NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "chrome-headless-shell", "microsoft-edge",
)  # fmt: skip
PATH = next(filter(None, map(shutil.which, _NAMES)), None)
needed = pytest.mark.skipif(PATH is None, reason=f"needs a browser: one of {', '.join(_NAMES)}")


class Browser:
    """Opens pages from ``folder``, which also holds the browser's own files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def screenshot(self, page: str, size: tuple[int, int], *, dark: bool = False) -> np.ndarray:
        """The colours [height, width, 3] of the page's top, from 0 to 1."""
        image = self.folder / "page.png"
        image.unlink(missing_ok=True)
        self._run(page, "", size, dark, f"--screenshot={image}")
        return imread(image)[:, :, :3]

    def after(self, page: str, script: str = "", *, fragment: str = "", width: int = 1000) -> str:
        """The page as HTML after its own scripts and ``script`` ran."""
        page = page.replace("</body>", f"<script>{script}</script></body>")
        return self._run(page, fragment, (width, 900), False, "--dump-dom")

    def _run(self, page: str, fragment: str, size: tuple[int, int], dark: bool, action: str) -> str:
        file = self.folder / "page.html"
        file.write_text(page, encoding="utf-8")
        command = [
            str(PATH), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", f"--user-data-dir={self.folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={size[0]},{size[1]}", action, f"{file.as_uri()}{fragment}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
