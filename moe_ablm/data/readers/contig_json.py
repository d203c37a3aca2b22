"""10x `*_contig_annotations.json` (Cell Ranger) as the batches that its CSV gives."""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moe_ablm.data.readers.columns import LINE, ROW, ROWS_PER_BATCH
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.readers.stream import open_bytes
from moe_ablm.errors import UserError

REGIONS = ("fwr1", "cdr1", "fwr2", "cdr2", "fwr3", "cdr3", "fwr4")
_COUNTS = {"umis": "umi_count", "reads": "read_count"}
_FLAGS = ("productive", "is_cell", "high_confidence", "full_length")
_SEGMENT = {"v_call": "L-REGION+V-REGION", "c_call": "C-REGION"}
_ARRAY = re.compile(rb"\s*\[\s*[{\]]")
_LARGEST = 2 << 30  # bytes when decompressed: JSON is held as a whole


def is_contig_json(path: Path) -> bool:
    """Whether a file, plain or gzip, begins as an array of contigs does."""
    raw, stream = open_bytes(path)
    with raw, stream:
        try:
            return bool(_ARRAY.match(stream.read(64)))
        except (EOFError, zlib.error, OSError):
            return False  # whoever reads it says what is wrong


def read_contigs(path: Path, report: Report) -> Iterator[pa.RecordBatch]:
    """A row for each contig; what a contig does not say is "".

    Raises:
      UserError: no JSON array of contigs, or too large.
    """
    raw, stream = open_bytes(path)
    try:
        with raw, stream:
            text = stream.read(_LARGEST + 1)
        contigs = json.loads(text) if len(text) <= _LARGEST else None
    except (EOFError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error}): give the contig annotations as CSV") from error
    if not isinstance(contigs, list) or not all(isinstance(c, dict) for c in contigs):
        raise UserError(
            f"{path}: expected Cell Ranger's array of contigs in less than 2 GiB: give the contig "
            "annotations as CSV"
        )
    report.progress(path.stat().st_size)
    for first in range(0, len(contigs), ROWS_PER_BATCH):
        rows = []
        for contig in contigs[first : first + ROWS_PER_BATCH]:
            report.read += 1
            if "barcode" not in contig or "contig_name" not in contig:
                detail = "a contig without barcode and contig_name"
                report.bad_row(place(report.read), "no contig", detail)
            else:
                rows.append(_row(contig) | {ROW: report.read, LINE: 0})
        if rows:
            yield pa.RecordBatch.from_pylist(rows)
    if not contigs:
        raise UserError(f"{path}: no contig")


def _row(contig: dict) -> dict:
    row = {"barcode": _text(contig["barcode"]), "contig_id": _text(contig["contig_name"])}
    for name in REGIONS:
        region = contig.get(name)
        if isinstance(region, dict):
            region = region.get("aa_seq")
        row[name] = _text(region)
    row |= {name: _text(contig.get(key)) for name, key in _COUNTS.items()}
    # null is what the CSV calls None: it could not be told; a flag that is not there says nothing
    flags = {name: contig.get(name, "") for name in _FLAGS}
    row |= {name: "None" if value is None else _text(value) for name, value in flags.items()}
    segments = contig.get("annotations")
    features = [
        part["feature"]
        for part in (segments if isinstance(segments, list) else [])
        if isinstance(part, dict) and isinstance(part.get("feature"), dict)
    ]
    for name, kind in _SEGMENT.items():
        genes = [f.get("gene_name") for f in features if f.get("region_type") == kind]
        row[name] = _text(genes[0] if genes else None)
    chains = [_text(f.get("chain")) for f in features]
    row["chain"] = next((chain for chain in chains if chain), "")
    return row


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | int | float | bool) else ""
