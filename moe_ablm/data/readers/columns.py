"""Which columns of a table mean what: from a header to the study's column names."""

from collections.abc import Callable, Mapping, Sequence

from moe_ablm.data.readers.report import nearest
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
# Names under which published sets keep the two chains: the studies, classification sets, FLAb.
CHAIN_PAIRS = (
    ("sequence_aa_heavy", "sequence_aa_light"),
    ("h_sequence", "l_sequence"),
    ("heavy", "light"),
)
_IDS = ("sequence_id", "name", "id")
# What --columns may name, and the column it stands for.
GIVEN = {
    "heavy": "sequence_aa_heavy",
    "light": "sequence_aa_light",
    "id": "sequence_id",
    "donor": "donor",
    "label": "label",
    "cluster": "cluster",
}


def format_of_header(header: Sequence[str]) -> str | None:
    """Name of the table format that a header belongs to, or None when it is none of them."""
    names = set(header)
    if {"sequence_alignment_aa_heavy", "sequence_alignment_aa_light"} <= names:
        return "oas-paired"
    if any(set(pair) <= names for pair in CHAIN_PAIRS):
        return "table"
    if {"barcode", "contig_id", "chain", "fwr1", "cdr3"} <= names:
        return "10x"
    if {"v_call", "cell_id"} <= names and names & {"sequence_aa", "sequence_alignment_aa"}:
        return "airr"
    if {"v_call", "sequence_alignment_aa"} <= names:
        return "oas-unpaired"
    if {"v_call", "sequence_aa"} <= names:
        return "airr"
    if "sequence" in names and not names & {"v_call", "sequence_alignment"}:
        return "joined"
    return None


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
    if not {"heavy", "light"} & set(given):
        raise UserError(f"--columns {text}: name at least one chain (heavy=..., light=...)")
    return given


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
        chosen = {GIVEN[key]: column for key, column in given.items()}
        for key, column in given.items():
            if column not in header:
                near = nearest(column, header)
                raise UserError(
                    f"{source}: --columns {key}={column}: no such column; found {listed(header)}"
                    + (f"; did you mean {near}?" if near else "")
                )
    else:
        pair = next((p for p in CHAIN_PAIRS if set(p) <= set(header)), None)
        if pair is None:
            raise UserError(no_chains(header, source))
        chosen = dict(zip(CHAIN_PAIRS[0], pair, strict=True))
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
    return next(({"sequence_id": n} for n in _IDS if n in header), {})


def once(header: Sequence[str], column: str, source: str) -> None:
    """Raises UserError unless a column stands in the header exactly once."""
    if column not in header:
        raise UserError(f"{source}: no column {column}; found {listed(header)}")
    if header.count(column) != 1:
        raise UserError(
            f"{source}: column {column} occurs {header.count(column)} times in the header, "
            "expected once"
        )


def no_chains(header: Sequence[str], source: str) -> str:
    """The message for a table without recognisable chains."""
    amino_acids = {"sequence_alignment_aa", "sequence_aa"}
    if {"v_call", "sequence"} <= set(header) and not amino_acids & set(header):
        return (
            f"{source}: rearrangements without amino acids: no column sequence_alignment_aa and no "
            f"column sequence_aa; found {listed(header)}; translate them, or name the chains with "
            "--columns"
        )
    heavy, light = CHAIN_PAIRS[0]
    candidates = [name for name in header if name not in _IDS]
    missing = [c for c in (heavy, light) if c not in header]
    hints = []
    for column in missing:
        near = nearest(column, candidates)
        hints += [f"{column} (nearest: {near})" if near else column]
    guess = [nearest(column, candidates) for column in (heavy, light)]
    if guess[0] == guess[1]:  # one column cannot be both chains
        guess = [None, None]
    example = ",".join(f"{c}={n or 'COLUMN'}" for c, n in zip(CHAINS, guess, strict=True))
    return (
        f"{source}: no column {' and no column '.join(hints)}; found {listed(header)}; rename them "
        f"or name the chains with --columns {example}"
    )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Column names for a message: one line, cut after `most`."""
    shown = [repr(n) if len(n) <= 60 else repr(n[:60]) + "..." for n in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ("columns " + ", ".join(shown) + more) if shown else "no columns"
