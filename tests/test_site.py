"""The site of docs/: its navigation, its drawings and, with --slow, all pages in a browser."""

import functools
import http.server
import re
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from browser import visiting
from conftest import REPO

DOCS = REPO / "docs"


def navigation(entry) -> list[str]:
    """Pages of a part of `nav`, in their order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


def test_every_page_is_in_the_navigation():
    """Those of docs/, those that docs/hooks.py makes, and one of each room of the package."""
    pages = navigation(yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"])
    assert len(pages) == len(set(pages))
    rooms = {path.parent.name for path in (REPO / "moe_ablm").glob("*/__init__.py")} - {"verbs"}
    expected = {path.name for path in DOCS.glob("*.md")}
    expected |= {"index.md", "contributing.md", "changelog.md"}
    expected |= {"reference/antibody_model.md", "reference/api.md"}
    assert set(pages) == expected | {f"reference/{room}.md" for room in rooms}


def test_pictures_have_words():
    """Of README.md and docs/: each has a text instead, and exists."""
    for page in (*REPO.glob("*.md"), *DOCS.glob("*.md")):
        for words, target in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text()):
            assert words.strip(), (page.name, target)
            assert (page.parent / target).is_file(), (page.name, target)


def circles(name: str, kind: str = "taken") -> list[tuple[int, int]]:
    """(token, expert) of the circles of a drawing."""
    root = ET.parse(DOCS / "drawings" / f"{name}.svg").getroot()
    found = [element for element in root.iter() if element.get("class") == kind]
    return [(int(c.get("data-token")), int(c.get("data-expert"))) for c in found]


def by(axis: int, cells: list[tuple[int, int]], size: int) -> list[int]:
    return [sum(cell[axis] == i for cell in cells) for i in range(size)]


def test_drawings_show_the_rules_of_routers():
    """Seven tokens, four experts: what docs/concepts.md says of each drawing."""
    tokens, experts = 7, 4
    top = circles("topk")
    assert by(0, top, tokens) == [2] * tokens and by(1, top, experts) == [5, 2, 5, 2]
    kept, dropped = circles("capacity"), circles("capacity", "dropped")
    assert sorted(kept + dropped) == sorted(top) and len(dropped) == 2
    assert max(by(1, kept, experts)) == 4
    assert by(0, circles("topp"), tokens) == [2, 2, 2, 2, 2, 3, 1]
    chosen = circles("expert_choice")
    assert by(1, chosen, experts) == [2] * experts
    assert by(0, chosen, tokens) == [2, 2, 1, 1, 0, 1, 1]
    assert len(circles("soft")) == tokens * experts
    assert by(1, circles("sequence"), experts) == [tokens, 0, tokens, 0]


class Page(HTMLParser):
    """Links, ids, and pictures without words of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.wordless = [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]
        if tag == "img" and not given.get("alt"):
            self.wordless.append(given.get("src"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a warning, such as a page that is missing, is an error."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
def test_no_link_leads_nowhere_and_pictures_have_words(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name == "index.html"}
    assert len(pages) > 200
    assert max(path.stat().st_size for path in pages) < 300_000
    lost = []
    for path, page in pages.items():
        assert not page.wordless, path
        assert "```" not in path.read_text(), path  # code that was not taken for such
        for link in page.links:
            target, fragment = urldefrag(link)
            if re.match(r"[a-z]+:|//", target):
                continue  # elsewhere
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            known = there in pages and (not fragment or unquote(fragment) in pages[there].ids)
            if not (known or (there not in pages and there.is_file())):
                lost.append((str(path.relative_to(site)), link))
    assert not lost


def references(site: Path) -> list[Path]:
    """Pages of rooms, and the largest of the modules of each."""
    rooms = sorted((site / "reference").glob("*/index.html"))
    modules = [list(room.parent.glob("*/index.html")) for room in rooms]
    return rooms + [max(each, key=lambda path: path.stat().st_size) for each in modules if each]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_pages_in_a_browser(site, width):
    """No error, nothing from elsewhere, no broken picture, nothing wider than the window.

    Of pages of modules, which are alike, the largest of each room.
    """

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=site)
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        visiting(width) as (page, wrong),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.set_default_timeout(300_000)
        for path in [*site.glob("index.html"), *site.glob("*/index.html"), *references(site)]:
            url = f"http://127.0.0.1:{server.server_port}/{path.parent.relative_to(site)}/"
            page.goto(url, wait_until="load")
            assert page.title()
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert page.evaluate(broken) == 0, url
            beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(beyond) <= 0, url
        server.shutdown()
    assert not wrong
