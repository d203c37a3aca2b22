"""The report of an intake: rows by source and reason, with the first of each, HTML or JSON."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_ablm.data.readers import Report
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.page import table_html, write_page

ENDINGS = (".html", ".json")


def add_report_argument(parser: argparse.ArgumentParser) -> None:
    """The flag `--report`."""
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help=".html or .json: rows by source and reason, with an example of each",
    )


def require_report(path: Path | None) -> None:
    """Raises UserError where a report cannot have this name, before anything is read."""
    if path is None:
        return
    if path.suffix not in ENDINGS:
        raise UserError(f"--report {path}: expected a name that ends in {' or '.join(ENDINGS)}")
    if path.exists():
        raise UserError(f"--report {path} exists already: choose another name or remove it")


def write_report(path: Path | None, reports: Sequence[Report]) -> None:
    """Writes what became of the rows of all sources; nothing where `path` is None.

    Raises:
      UserError: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(path, {"sources": [content_of(report) for report in reports]})
        else:
            parts = ["<h1>Intake</h1>", *map(_section, reports)]
            write_page(path, "Intake", parts)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--report {path} cannot be written: {reason}") from error


def content_of(report: Report) -> dict[str, Any]:
    """A source's counts and reasons as plain JSON."""

    def rows(kind: str) -> list[dict[str, Any]]:
        counts = getattr(report, kind).most_common()
        return [
            {"reason": reason, "rows": n, "first": report.first[reason]}
            | ({"example": report.examples[reason]} if reason in report.examples else {})
            for reason, n in counts
        ]

    return {
        "source": report.source,
        "format": report.format,
        "read": report.read,
        "kept": report.kept,
        "joined": report.joined,
        "rejected": rows("rejected"),
        "notes": rows("notes"),
    }


def _section(report: Report) -> str:
    found = content_of(report)
    rejected = sum(row["rows"] for row in found["rejected"])
    sums = [
        ["read", f"{report.read:,}", "", ""],
        ["kept", f"{report.kept:,}", "", ""],
        ["joined to a kept one", f"{report.joined:,}", "", ""],
        ["rejected", f"{rejected:,}", "", ""],
    ]
    reasons = [
        [f"{kind}: {row['reason']}", f"{row['rows']:,}", row["first"], row.get("example", "")]
        for kind, rows in (("rejected", found["rejected"]), ("note", found["notes"]))
        for row in rows
    ]
    title = f"{report.source} ({report.format})"
    return table_html(["", "rows", "first", "example"], [*sums, *reasons], title)
