"""The fate of every row of a source: nothing is dropped without being counted."""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_ablm.data.germline import HUMAN
from moe_ablm.errors import UserError, counted
from moe_ablm.files import require_local


@dataclass
class Report:
    """Counts for one source; readers write to it while they stream.

    `read == kept + joined + sum(rejected.values())` holds once the source has been prepared.

    Attributes:
      source: file name (or names) as the user gave it.
      on_bad_row: "fail" raises at the first malformed row, "skip" counts it and goes on.
      format: name of the format that was read.
      origin: what goes into the dataset's `source` column; the name of the file.
      germlines: by which chains are annotated.
      read: rows (records, contigs) found in the source.
      kept: antibodies written.
      joined: rows that became the second chain of a kept antibody.
      rejected: rows left out, by reason.
      notes: rows read with a change or with something to know, by remark; what follows in the
        chain of readers and annotation may reject them still.
      first: for each reason or remark, the place of its first row.
      examples: what was found there, for reasons that have something to tell.
      metadata: what the file says about itself (the first line of OAS files).
      files: name, bytes and SHA-256 of each file.
      progress: called with the number of (compressed) bytes consumed so far.
    """

    source: str
    on_bad_row: Literal["fail", "skip"] = "fail"
    format: str = ""
    origin: str = ""
    germlines: tuple[str, ...] = (HUMAN,)
    read: int = 0
    kept: int = 0
    joined: int = 0
    rejected: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    files: list[dict] = field(default_factory=list)
    progress: Callable[[int], None] = lambda consumed: None

    def __post_init__(self):
        self.origin = self.origin or self.source

    def bad_row(self, place: str, reason: str, detail: str) -> None:
        """Counts a malformed row under `reason`, or raises UserError with `place` and `detail`."""
        if self.on_bad_row == "fail":
            raise UserError(
                f"{self.source}: {place}: {detail}; mend the file, or leave such rows out with "
                "--on-bad-row=skip"
            )
        self.examples.setdefault(reason, detail)
        self.reject(reason, place)

    def reject(self, reason: str, place: str, rows: int = 1) -> None:
        """Counts well-formed rows that cannot be used (no antibody, not productive, ...)."""
        if rows:
            self.rejected[reason] += rows
            self.first.setdefault(reason, place)

    def settle(self, kept: int, rejected: int | None = None) -> None:
        """Raises RuntimeError where rows were lost, or counted twice: a fault of the program.

        Args:
          kept: antibodies that were delivered, or written.
          rejected: rows left out so far; None: all that are counted.
        """
        rejected = self.rejected.total() if rejected is None else rejected
        if self.read != kept + self.joined + rejected:
            raise RuntimeError(
                f"{self.source}: {self.read} rows read are not {kept} kept, {self.joined} joined "
                f"and {rejected} rejected: a fault of this program, nothing of the file's"
            )

    def note(self, remark: str, place: str, rows: int = 1) -> None:
        """Counts rows that are no rejects, but about which the user should know something."""
        if rows:
            self.notes[remark] += rows
            self.first.setdefault(remark, place)


def why_nothing(reports: Iterable[Report]) -> str:
    """Where all rows of the sources went, in one line, for an output that would be empty."""
    reasons = [
        f"{r.source}: {counted(r.read, 'row')} read"
        + "".join(f", {n} rejected: {why} (first: {r.first[why]})" for why, n in r.rejected.items())
        for r in reports
    ]
    return "; ".join(reasons) or "no sources"


def place(row: int, line: int = 0) -> str:
    """Where a row stands: counted from 1 without the header, with its line in a text file."""
    return f"row {row} (line {line})" if line else f"row {row}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of some names, or None when none is similar."""
    lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return lower[matches[0]] if matches else None


def existing_file(path: Path, flag: str = "--input") -> Path:
    """The path if it is a file that has bytes; a UserError says what it is otherwise."""
    require_local(path, flag)
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        stems = {name.partition(".")[0]: name for name in names}  # all names in .csv are alike
        near = nearest(path.name.partition(".")[0], stems)
        raise UserError(
            f"{flag} {path}: no such file"
            + (f"; did you mean {path.parent / stems[near]}?" if near else "")
        )
    if not path.is_file():
        raise UserError(f"{flag} {path}: not a file (a directory holds no single table)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: no permission to read it")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path}: the file is empty (0 bytes)")
    return path
