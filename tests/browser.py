"""Pages in a headless Chromium: what it shows, and what its console says."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--v=0", "--virtual-time-budget=10000", "--dump-dom",
)  # fmt: skip
# a page that holds the one under test and writes down what became of it
WRAPPER = """<!doctype html><meta charset="utf-8"><pre id="told">nothing</pre><script>
function look(frame) {
  const page = frame.contentDocument
  const targets = [...page.querySelectorAll('a')].map(a => a.getAttribute('href'))
  document.getElementById('told').textContent = JSON.stringify({
    text: page.body.innerText,
    images: [...page.images].map(i => i.complete ? i.naturalWidth : -1),
    tables: page.querySelectorAll('table').length,
    scripts: page.scripts.length,
    lost: targets.filter(t => !t.startsWith('#') || !page.getElementById(t.slice(1))),
    beyond: page.documentElement.scrollWidth - page.documentElement.clientWidth,
  })
}
</script><iframe width="1000" height="900" onload="look(this)" src="%s"></iframe>"""


def chromium() -> str:
    """Where it is; skips the test where it is not."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on the PATH (apt-get install chromium)")
    return browser


@contextlib.contextmanager
def visiting(width: int, height: int = 900) -> Iterator[tuple]:
    """(page of Playwright, list of what went wrong): pages of a server of this machine.

    Errors of the console and of scripts, requests that failed, and requests to elsewhere.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})

        def requested(request) -> None:
            if not re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", request.url):
                wrong.append(f"elsewhere: {request.url}")

        page.on("request", requested)
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("console", lambda m: m.type == "error" and wrong.append(f"console: {m.text}"))
        page.on("response", lambda r: r.status >= 400 and wrong.append(f"{r.status}: {r.url}"))
        yield page, wrong
        browser.close()


def browse(page: Path) -> dict:
    """What Chromium shows of a page; skips the test where there is no Chromium.

    Returns:
      text, images (widths, 0 where one is broken), tables, scripts, lost (links to nowhere),
      beyond (pixels by which the page is too wide), console (lines).
    """
    browser = chromium()
    wrapper = page.with_name(f"{page.stem}-looked-at.html")
    wrapper.write_text(WRAPPER % page.name)
    with tempfile.TemporaryDirectory(prefix="moe_ablm-chromium-") as profile:
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={profile}", wrapper.resolve().as_uri()],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told and told[1] != "nothing", done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(told[1])) | {"console": console}
