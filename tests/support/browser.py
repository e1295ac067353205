"""A headless Chromium that opens a page without a network, and what a script sees in it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NO_BROWSER = "no Chromium on this machine: apt-get install chromium"
RESULT = "result-of-the-test"


def _run(folder: Path, *words: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={folder / 'browser'}",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def seen_by_script(page: str, script: str, folder: Path, width: int = 1280) -> Any:
    """What ``script``, the body of an async function of ``page`` (its document), returns. width: of the window.

    The page lies in a frame, because a browser's own window may not be narrow.
    """
    frame = f"""<!DOCTYPE html><meta charset="utf-8">
<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>
<pre id="{RESULT}"></pre>
<script>
addEventListener("load", async () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  let result;
  try {{ result = await (async () => {{ {script} }})(); }} catch (error) {{ result = String(error); }}
  document.getElementById("{RESULT}").textContent = JSON.stringify(result);
}});
</script>"""
    file = folder / "frame.html"
    file.write_text(frame, encoding="utf-8")
    dumped = _run(folder, "--virtual-time-budget=5000", "--dump-dom", file.as_uri())
    (found,) = re.findall(rf'<pre id="{RESULT}">(.*?)</pre>', dumped, re.DOTALL)
    return json.loads(html.unescape(found))


def screenshot(file: Path, image: Path, folder: Path, width: int, height: int) -> None:
    """A picture of the page in ``file``."""
    _run(folder, f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={image}", file.as_uri())
