"""Which columns of a table mean what: from a header to the study's column names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from moe_ablm.data.readers.report import nearest, place
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError

# Columns that readers add: ROW counts from 1 without the header; LINE is 0 where there are none.
ROW, LINE = "_row", "_line"
ANY_CHAIN = "_any_chain"  # bool: the sequence under `heavy` may as well be a light chain
ROWS_PER_BATCH = 8192

# From a header to {column to deliver: column of the file}.
Choose = Callable[[Sequence[str]], Mapping[str, str]]

RESIDUE_STRINGS = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "gene_segment_mask_aa")
PER_CHAIN = ("sequence_aa", *RESIDUE_STRINGS, "v_gene", "j_gene", "v_call", "cdr3_aa")
ABOUT_THE_CELL = ("cluster", "donor", "source", "label")
STUDY_COLUMNS = (
    ("sequence_id",)
    + tuple(f"{name}_{chain}" for chain in CHAINS for name in (*PER_CHAIN, "v_identity_aa"))
    + ABOUT_THE_CELL
)
# Columns in which a word such as "none" may be a value: no word for "missing" is looked for there.
FLAGS = ("productive", "is_cell", "high_confidence", "full_length")
KEPT_AS_WRITTEN = frozenset(
    ("label", *FLAGS, *RESIDUE_STRINGS, ROW, LINE)
    + tuple(f"{name}_{chain}" for chain in CHAINS for name in (*RESIDUE_STRINGS, "productive"))
)
# Names under which published sets keep the two chains: the studies, classification sets, FLAb,
# CoV-AbDab, Thera-SAbDab, GDPa1, BD Rhapsody's table of cells. Case, spaces, - and _ do not matter.
CHAIN_PAIRS = (
    ("sequence_aa_heavy", "sequence_aa_light"),
    ("h_sequence", "l_sequence"),
    ("heavy", "light"),
    ("VHorVHH", "VL"),
    ("HeavySequence", "LightSequence"),
    ("VH", "VL"),
    ("VH_sequence", "VL_sequence"),
    ("vh_protein_sequence", "vl_protein_sequence"),
    ("heavy_chain", "light_chain"),
    ("BCR_Heavy_VDJ_Translation_Trimmed_Dominant", "BCR_Light_VDJ_Translation_Trimmed_Dominant"),
)
# A second antibody in a row: Thera-SAbDab's other arm of bispecific ones
OTHER_ARM = ("HeavySequence(ifbispec)", "LightSequence(ifbispec)")
# ... and single chains: FLAb's nanobodies
HEAVY_ALONE = ("VHH_sequence", "VHH")
_IDS = ("sequence_id", "name", "id", "therapeutic", "antibody", "cell_index", "barcode", "cell_id",
        "antibody_name")  # fmt: skip
AMINO_ACID_CHAINS = ("sequence_alignment_aa", "sequence_aa")
# AIRR's and Change-O's names, the V domain alone before the whole read
NUCLEOTIDE_CHAINS = (
    *("sequence_alignment", "sequence_imgt", "sequence_vdj", "sequence", "sequence_input"),
)
ALIGNED_CHAINS = NUCLEOTIDE_CHAINS[:3]
# where the alignment to the V gene begins, in the read and in the gene
V_STARTS = {
    "v_sequence_start": ("v_sequence_start", "v_seq_start"),
    "v_germline_start": ("v_germline_start", "v_germ_start_imgt", "v_germ_start_vdj"),
}
# What --columns may name, and the column it stands for.
GIVEN = {
    "heavy": "sequence_aa_heavy",
    "light": "sequence_aa_light",
    "sequence": "sequence",
    "id": "sequence_id",
    "cell": "cell",
    "locus": "locus",
    "umis": "umis",
    "reads": "reads",
    "donor": "donor",
    "label": "label",
    "cluster": "cluster",
}
_OF_SINGLE_CHAINS = ("cell", "locus", "umis", "reads")


def place_of(batch: pa.RecordBatch, row: int | np.integer) -> str:
    """Where a row of a reader's batch stands in its file."""
    return place(batch[ROW][int(row)].as_py(), batch[LINE][int(row)].as_py())


def _plain(name: str) -> str:
    return re.sub(r"[ _\-]", "", name.lower())


def column_named(header: Sequence[str], *names: str) -> str | None:
    """The column of a header that has the first of some names that is there, however spelled."""
    plain: dict[str, str] = {}
    for column in header:
        plain.setdefault(_plain(column), column)
    for name in names:
        if name in header:
            return name
        if _plain(name) in plain:
            return plain[_plain(name)]
    return None


def chain_columns(header: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns of heavy and light chains under the names of a published set."""
    for heavy, light in CHAIN_PAIRS:
        found = column_named(header, heavy), column_named(header, light)
        if all(found):
            return found
    for heavy, light in CHAIN_PAIRS:
        found = column_named(header, heavy), column_named(header, light)
        if any(found):
            return found
    return column_named(header, *HEAVY_ALONE), None


def format_of_header(header: Sequence[str]) -> str | None:
    """Name of the table format that a header belongs to, or None when it is none of them."""
    names = {name.lower() for name in header}
    if {"sequence_alignment_aa_heavy", "sequence_alignment_aa_light"} <= names:
        return "oas-paired"
    if all(chain_columns(header)):
        return "table"
    if {"barcode", "contig_id", "chain", "cdr3"} <= names:
        return "10x"
    acids = names & set(AMINO_ACID_CHAINS)
    if "v_call" in names and "cell_id" not in names and "sequence_alignment_aa" in acids:
        return "oas-unpaired"
    if names & {"v_call", "locus"} and acids:
        return "airr"
    if "v_call" in names and names & set(NUCLEOTIDE_CHAINS):
        return "airr"
    if "sequence" in names and not names & {"v_call", "sequence_alignment"}:
        return "joined"
    return "table" if any(chain_columns(header)) else None


def format_of_columns(given: Mapping[str, str]) -> str:
    """Name of the table format that the value of --columns asks for."""
    if "sequence" not in given:
        return "table"
    return "airr" if set(_OF_SINGLE_CHAINS) & set(given) else "joined"


def parse_columns(text: str | None) -> dict[str, str] | None:
    """`heavy=VH,light=VL,...` as given to --columns, to `{"heavy": "VH", ...}`."""
    if text is None:
        return None
    given = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not value or key not in GIVEN:
            raise UserError(
                f"--columns {text}: {part!r} is not of the form name=column with a name out of "
                f"{', '.join(GIVEN)}"
            )
        given[key] = value
    chains = {"heavy", "light"} & set(given)
    if not chains and "sequence" not in given:
        raise UserError(
            f"--columns {text}: name at least one chain (heavy=..., light=..., or sequence=...)"
        )
    alone = [key for key in _OF_SINGLE_CHAINS if key in given]
    if chains and ("sequence" in given or alone):
        wrong = alone[0] if alone else "sequence"
        raise UserError(
            f"--columns {text}: {wrong} is of tables with a row for each chain; name heavy and "
            "light, or sequence with cell, locus, umis, reads"
        )
    return given


def require_column(header: Sequence[str], column: str, source: str, flag: str) -> None:
    """UserError unless a table has the column once, under the very name that a flag gives."""
    if column not in header:
        near = nearest(column, header)
        raise UserError(
            f"{source}: {flag}{column}: no such column; found {listed(header)}"
            + (f"; did you mean {near}?" if near else "")
        )
    once(header, column, source)


def given_columns(header: Sequence[str], source: str, given: Mapping[str, str]) -> dict[str, str]:
    """{name within the readers: column} of what --columns names.

    Raises:
      UserError: no such column.
    """
    for key, column in given.items():
        require_column(header, column, source, f"--columns {key}=")
    return {GIVEN[key]: column for key, column in given.items()}


def study_mapping(
    header: Sequence[str], source: str, given: Mapping[str, str] | None
) -> dict[str, str]:
    """Maps the study's column names to the columns of a table.

    Args:
      header: the table's column names.
      source: the file's name, for messages.
      given: the value of --columns (keys of `GIVEN`), or None.

    Raises:
      UserError: a chain's column is not there (says which were found, and near names), or is twice.
    """
    if given is not None:
        chosen = given_columns(header, source, given)
    else:
        found = chain_columns(header)
        if not any(found):
            raise UserError(no_chains(header, source))
        pair = zip(CHAIN_PAIRS[0], found, strict=True)
        chosen = {name: column for name, column in pair if column}
    mapping = {name: name for name in STUDY_COLUMNS if name in header}
    for chain in CHAINS:  # --columns with one chain means one chain
        if f"sequence_aa_{chain}" not in chosen:
            mapping = {k: v for k, v in mapping.items() if not k.endswith(f"_{chain}")}
    mapping |= chosen
    if "sequence_id" not in mapping:
        mapping |= identifier_of(header)
    for column in mapping.values():
        once(header, column, source)
    return mapping


def identifier_of(header: Sequence[str]) -> dict[str, str]:
    """`{"sequence_id": column}` with the column that names the rows, or nothing."""
    found = column_named(header, *_IDS)
    return {"sequence_id": found} if found else {}


def once(header: Sequence[str], column: str, source: str) -> None:
    """Raises UserError unless a column stands in the header exactly once."""
    if column not in header:
        raise UserError(f"{source}: no column {column}; found {listed(header)}")
    if header.count(column) != 1:
        raise UserError(
            f"{source}: column {column} occurs {header.count(column)} times in the header, "
            "expected once"
        )


def no_chains(header: Sequence[str], source: str, holding: Iterable[str] = ()) -> str:
    """The message for a table without recognisable chains.

    Args:
      header: its columns.
      source: the file's name.
      holding: columns whose first rows hold amino-acid chains; only these are proposed.
    """
    heavy, light = CHAIN_PAIRS[0]
    candidates = [name for name in holding if name in header]
    missing = [c for c in (heavy, light) if c not in header]
    hints = []
    for column in missing:
        near = nearest(column, candidates)
        hints += [f"{column} (nearest: {near})" if near else column]
    guess = [nearest(column, candidates) for column in (heavy, light)]
    if guess[0] == guess[1]:  # one column cannot be both chains
        guess = [None, None]
    example = ",".join(f"{c}={n or 'COLUMN'}" for c, n in zip(CHAINS, guess, strict=True))
    held = f"; amino-acid chains stand in {listed(candidates)}" if candidates else ""
    return (
        f"{source}: no column {' and no column '.join(hints)}; found {listed(header)}{held}; "
        f"rename them or name the chains with --columns {example}, or sequence=COLUMN"
    )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Column names for a message: one line, cut after `most`."""
    shown = [repr(n) if len(n) <= 60 else repr(n[:60]) + "..." for n in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ("columns " + ", ".join(shown) + more) if shown else "no columns"
