"""Pages of the site that have their source elsewhere; `mkdocs.yml` names this file twice.

README.md, CONTRIBUTING.md and CHANGELOG.md as pages, a page of API reference for each module of
`moe_ablm` and for each room one that lists them, and the mermaid picture of docs/architecture.md
drawn here, since a script that draws it in the browser would be fetched from elsewhere.
"""

import ast
import re
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

TOP = Path(__file__).resolve().parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
EXAMPLE = re.compile(r"^( *)Examples?:\n((?:\1 +\S.*\n)*\1 +\S.*)", re.MULTILINE)
PICTURE = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WIDTH, HEIGHT, STEP_X, STEP_Y = 108, 34, 150, 74  # of a box, and from one to the next


def on_files(files: Files, config) -> Files:
    """Adds the pages that are no files of docs/."""
    pages = {page: from_top((TOP / source).read_text()) for source, page in COPIED.items()}
    for module in ("antibody_model", "api"):
        pages[f"reference/{module}.md"] = reference(module)
    for room in sorted(p.parent.name for p in TOP.glob("moe_ablm/*/__init__.py")):
        if room != "verbs":  # command lines, not for import
            pages |= reference_of_room(room)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def from_top(text: str) -> str:
    """Links from the top of the checkout as links from docs/."""
    return re.sub(r"\]\(docs/", "](", text)


def reference(module: str) -> str:
    """The page of a module."""
    return f"# moe_ablm.{module}\n\n{documented(module)}"


def documented(module: str) -> str:
    """What mkdocstrings fills in for a module."""
    return f"::: moe_ablm.{module}\n    options:\n      heading_level: 2\n"


def reference_of_room(room: str) -> dict[str, str]:
    """The page of a room, which lists its modules, and a page for each of them, by name."""
    pages, lines = {}, []
    for source in sorted((TOP / "moe_ablm" / room).rglob("*.py")):
        parts = source.relative_to(TOP / "moe_ablm" / room).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        about = ast.get_docstring(ast.parse(source.read_text()))
        if not module or not about or not (source.parent / "__init__.py").exists():
            continue  # the room itself; no module, such as code that exports take along
        pages[f"reference/{room}/{module}.md"] = (
            f"# moe_ablm.{room}.{module}\n\nIn [moe_ablm.{room}](../{room}.md).\n\n"
            + documented(f"{room}.{module}")
        )
        summary = about.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| [{module}]({room}/{module}.md) | {summary} |\n")
    own = ast.get_docstring(ast.parse((TOP / "moe_ablm" / room / "__init__.py").read_text()))
    table = "| module | |\n|---|---|\n" + "".join(lines)
    pages[f"reference/{room}.md"] = (
        f"# moe_ablm.{room}\n\n{table}\n{documented(room) if own else ''}"
    )
    return pages


def on_page_markdown(markdown: str, **_) -> str:
    """Mermaid graphs as pictures."""
    return PICTURE.sub(lambda found: draw(found[1]), markdown)


class Examples(griffe.Extension):
    """Examples of docstrings are code, of which Markdown would make links and quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                r"\1Example:\n\1  ```python\n\2\n\1  ```", obj.docstring.value
            )


def levels(edges: list[tuple[str, str]], names: list[str]) -> dict[str, int]:
    """Of each name the length of the longest way down along the edges."""
    level = dict.fromkeys(names, 0)
    for _ in names:
        for upper, lower in edges:
            level[upper] = max(level[upper], level[lower] + 1)
    return level


def draw(graph: str) -> str:
    """The SVG of a mermaid graph of lines `a --> b` or `a`, without a circle."""
    edges = re.findall(r"^\s*(\w+) --> (\w+)$", graph, re.MULTILINE)
    names = list(dict.fromkeys(re.findall(r"^\s+(\w+)|--> (\w+)", graph, re.MULTILINE)))
    names = list(dict.fromkeys(a or b for a, b in names))
    level = levels(edges, names)
    top = max(level.values())
    place = {}
    for row, below in groupby(sorted(names, key=lambda name: -level[name]), key=level.get):
        for column, name in enumerate(below):
            # every other row stands aside, so that no arrow runs through a box
            place[name] = (20 + STEP_X * (2 * column + row % 2), 10 + STEP_Y * (top - row))
    width = max(x for x, _ in place.values()) + WIDTH + 60
    parts = [
        f'<svg viewBox="0 0 {width} {(top + 1) * STEP_Y}" style="max-width:{width}px;width:100%" '
        f'role="img" aria-label="{escape(", ".join(f"{a} imports {b}" for a, b in edges))}">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/>'
        "</marker></defs>",
    ]
    for upper, lower in edges:
        (x, y), (u, v) = place[upper], place[lower]
        begin, end = x + WIDTH / 2, u + WIDTH / 2
        parts.append(
            f'<path d="M{begin} {y + HEIGHT}C{begin} {y + HEIGHT + 40} {end} {v - 40} {end} {v}" '
            'fill="none" stroke="currentColor" opacity=".6" marker-end="url(#tip)"/>'
        )
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#cfd8dc" '
            f'stroke="currentColor"/><text x="{x + WIDTH / 2}" y="{y + 22}" font-size="15" '
            f'text-anchor="middle" fill="#1c2430">{name}</text>'
        )
    return f"<figure>{''.join(parts)}</svg></figure>"
