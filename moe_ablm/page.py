"""Self-contained HTML pages: tables, sentences and figures; no script, no link to elsewhere."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from moe_ablm.files import write_atomically

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2430;--faint:#5f6b7a;--line:#d9dee5;
--band:#f5f7fa;--accent:#1f5a96;--yes:#17683a;--yes-band:#e8f5ec;--no:#9c2b1e;--no-band:#fcecea;
--open:#6b5200;--open-band:#fdf6dd}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14181e;--ink:#dfe4ea;--faint:#98a3b0;
--line:#333b46;--band:#1e242d;--accent:#7fb2e8;--yes:#7fd6a2;--yes-band:#163222;--no:#f2a093;
--no-band:#3a1c18;--open:#e5c869;--open-band:#352c10}
figure img{background:#fff;padding:.4rem;border-radius:3px;box-sizing:border-box}}
body{background:var(--paper);color:var(--ink);
font:16px/1.55 "Source Serif 4",Georgia,"DejaVu Serif",serif;max-width:58rem;
margin:2.5rem auto 5rem;padding:0 1.25rem}
h1,h2,h3,table,nav,figcaption,.faint,.tag{font-family:"Inter",system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem}
h2{font-size:1.35rem;margin:3rem 0 .6rem;padding-top:.8rem;border-top:2px solid var(--ink)}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
p{margin:.5rem 0;max-width:44rem}ul{margin:.5rem 0;padding-left:1.2rem;max-width:44rem}
a{color:var(--accent)}
.faint{color:var(--faint);font-size:.85em}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.82rem;line-height:1.35;margin:.9rem 0 1.2rem;
font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;font-size:.92rem;padding:.2rem 0 .4rem}
th,td{border-bottom:1px solid var(--line);padding:.32rem .8rem .32rem 0;text-align:left;
vertical-align:top}
thead th{border-bottom:1.5px solid var(--ink);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
td.number{text-align:right;white-space:nowrap}th.number{text-align:right}
td.number .faint{font-size:.92em}
tbody tr:hover{background:var(--band)}
figure{margin:1.2rem 0 1.6rem}figure img{max-width:100%;height:auto;display:block}
figcaption{color:var(--faint);font-size:.85rem;margin-top:.4rem;max-width:44rem}
code,pre{font:.82rem/1.45 ui-monospace,"DejaVu Sans Mono",monospace;background:var(--band);
border-radius:3px}
code{padding:.1em .3em;overflow-wrap:anywhere}
pre{padding:.7rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere}
nav{font-size:.9rem;columns:2;margin:1.2rem 0}nav ol{margin:0;padding-left:1.4rem;max-width:none}
details{margin:.8rem 0}summary{cursor:pointer;font-weight:600;font-size:.9rem}
.tag{display:inline-block;font-size:.75rem;font-weight:600;padding:.08em .55em;border-radius:1em;
border:1px solid;white-space:nowrap}
.yes{color:var(--yes);background:var(--yes-band)}.no{color:var(--no);background:var(--no-band)}
.open{color:var(--open);background:var(--open-band)}
@media print{body{font-size:10.5pt;max-width:none;margin:0}a{color:inherit;text-decoration:none}
h2,h3,caption{break-after:avoid}figure,tr{break-inside:avoid}.wide{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def text_html(text: str) -> str:
    """Plain text as HTML; what stands in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """A table of plain text."""
    cells = ["".join(f"<td>{text_html(cell)}</td>" for cell in row) for row in rows]
    return cells_html([f"<th>{escape(name)}</th>" for name in head], cells, title)


def cells_html(head: Sequence[str], rows: Sequence[str], title: str = "") -> str:
    """A table of cells that are HTML already: `head` of th, a string of cells a row."""
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    first = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>{caption}{first}<tbody>{body}</tbody></table></div>'


def lines_html(lines: Sequence[str]) -> str:
    """Sentences as an HTML list."""
    return "<ul>" + "".join(f"<li>{text_html(line)}</li>" for line in lines) + "</ul>"


def image_html(file: Path, name: str) -> str:
    """A PNG or SVG file as part of the page."""
    kind = "svg+xml" if file.suffix == ".svg" else file.suffix.removeprefix(".")
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{data}">'


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Writes a page atomically: title in plain text, parts in HTML."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_atomically(path, page)
    return path
