"""Antibodies in, a dataset directory out: checked, annotated, clustered, split, with a card."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.dataset import SPLITS, DatasetWriter
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.intake import Decided, Intake, SplitRule
from moe_ablm.data.joint import KEPT, Joint
from moe_ablm.data.readers.check import check_batch
from moe_ablm.data.readers.columns import LINE, ROW
from moe_ablm.data.readers.report import Report, why_nothing
from moe_ablm.data.spill import scratch_beside
from moe_ablm.data.split import SHARES
from moe_ablm.errors import UserError


def prepare_batches(
    batches: Iterable[pa.RecordBatch],
    out: Path,
    *,
    source: str,
    licence: str,
    rule: SplitRule | None = None,
) -> dict:
    """Prepares one stream of annotated batches as a dataset directory.

    Args:
      batches: columns of the study; rows are checked, and one that is malformed raises UserError.
      out: directory to make; it must not exist.
      source: name of the origin, for the card and for rows without a `source`.
      licence: licence of the data, for the card.
      rule: how records are divided.

    Returns:
      The content of `dataset.json`.
    """
    report = Report(source, format="stream")
    return prepare([(report, _checked(batches, report))], Path(out), licence=licence, rule=rule)


def _checked(batches: Iterable[pa.RecordBatch], report: Report) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        rows = np.arange(report.read + 1, report.read + 1 + batch.num_rows)
        report.read += batch.num_rows
        batch = batch.append_column(ROW, pa.array(rows))
        yield check_batch(batch.append_column(LINE, pa.array(np.zeros_like(rows))), report)


def prepare(
    sources: Iterable[tuple[Report, Iterable[pa.RecordBatch]]],
    out: Path,
    *,
    licence: str,
    rule: SplitRule | None = None,
    deduplicate: bool = False,
) -> dict:
    """Prepares checked and annotated sources as one dataset directory.

    Args:
      sources: for each source its report and its batches (as `check_batch` leaves them).
      out: directory to make; it must not exist.
      licence: licence of the data, for the card.
      rule: how records are divided.
      deduplicate: leave out rows whose chains an earlier row has; otherwise they are noted.

    Returns:
      The content of `dataset.json`.

    Raises:
      UserError: `out` exists or is being written by another process; malformed rows; nothing is
        left to write; a donor-wise split of rows without donor.
    """
    rule = rule or SplitRule()
    require_new(out)
    with _room_on_disk(out), scratch_beside(out) as scratch:
        require_new(out)  # the process that held the lock before may have made it
        intake, reports = Intake(scratch, rule, deduplicate), []
        for report, batches in sources:
            reports.append(report)
            for batch in batches:
                if batch.num_rows:
                    intake.add(batch, report, len(reports) - 1)
        if not intake.count:
            raise UserError(f"no antibody is left to write to {out}: {why_nothing(reports)}")
        decided = intake.decide(reports)
        for report in reports:
            report.settle(report.kept)
        with DatasetWriter(out) as writer:
            for batch in intake.stored(decided):
                writer.add(batch)
            card = _card(reports, rule, licence, decided)
            if decided.copies and not deduplicate:
                card["warnings"].append(
                    f"{decided.copies:,} of {intake.count:,} rows have the chains of an earlier "
                    "row and count as often as they are there; --deduplicate leaves them out"
                )
            return writer.finish(card)


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"--out {out}: the disk is full; nothing was written") from error
        raise


def require_new(out: Path) -> None:
    """Raises UserError when something is at `out` already."""
    if out.exists():
        raise UserError(f"--out {out} exists already: choose another name or remove it")


_SPLIT_RULES = {
    "group": "90/5/5 by hash of V gene, J gene and CDRH3 length, which holds whole clonal clusters",
    "cluster": "90/5/5 by hash of a member of each clonal cluster",
    "donor": "by donor",
    "mmseqs": "90/5/5 by hash of a member of each MMseqs2 cluster",
    "joint": "held out by hash: small components of clonal clusters and identical chains, heavy or "
    "light; no chain is on two sides",
}


def _card(reports: list[Report], rule: SplitRule, licence: str, decided: Decided) -> dict:
    linked = f"same V gene, J gene, CDRH3 length; CDRH3 identity >= {rule.identity:g}, linked"
    if decided.trusted:
        linked = "column `cluster` of the sources"
    elif rule.by == "mmseqs":
        linked = f"MMseqs2 easy-cluster, identity >= {rule.identity:g}, coverage >= 0.8"
    return {
        "licence": licence,
        "split_rule": _SPLIT_RULES[rule.by],
        "fraction_rule": "hash of the sequences; quarter inside half inside full",
        "clusters": decided.clusters,
        "cluster_rule": linked,
        "nearest_train_cdrh3": decided.nearest,
        "warnings": _warnings(rule, decided),
        "sources": [_source_card(r) for r in reports],
    }


def _source_card(report: Report) -> dict:
    return {
        "name": report.origin,
        "format": report.format,
        "files": report.files,
        "read": report.read,
        "kept": report.kept,
        "joined": report.joined,
        "rejected": dict(report.rejected.most_common()),
        "notes": dict(report.notes.most_common()),
        "first": report.first,
        "metadata": report.metadata,
    } | ({} if report.germlines == (HUMAN,) else {"germlines": list(report.germlines)})


def _short_of(joint: Joint, held: np.ndarray, rows: int) -> list[str]:
    """A warning where too few rows have chains that train has not."""
    wanted = np.diff(SHARES).sum() * rows
    if joint.candidates * (1 - KEPT) >= wanted:
        return []
    return [
        f"--split joint: {held[1:].sum():,} rows are held out and not {wanted:,.0f}: only "
        f"{joint.candidates:,} of {rows:,} are in small components of clones and identical chains "
        f"({joint.giant:,} in the largest)"
    ]


def _warnings(rule: SplitRule, decided: Decided) -> list[str]:
    warnings = []
    held = np.bincount(decided.split[decided.keep], minlength=len(SPLITS))
    for name, rows in zip(SPLITS, held, strict=True):
        if rows == 0 and rule.by == "donor":
            warnings.append(f"the {name} split is empty: name its donors with --{name}-donors")
        elif rows == 0:
            warnings.append(f"the {name} split is empty: there are too few clonal groups")
    if decided.joint:
        rows = len(decided.joint.split)
        warnings += _short_of(decided.joint, held, rows)
    if decided.trusted and decided.divided and rule.by == "group":
        warnings.append(
            f"{decided.divided} clusters of the `cluster` column hold several V genes, J genes or "
            "CDRH3 lengths: each is kept whole, but adding sources may move it; --recluster avoids "
            "that"
        )
    if decided.divided and rule.by == "donor":
        warnings.append(f"{decided.divided} clusters hold several donors and may span the split")
    return warnings
