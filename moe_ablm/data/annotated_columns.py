"""Columns of an annotated table for one chain: what is there is kept, what lacks is computed."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import tokenizer
from moe_ablm.data.align import ACCEPTED, REASONS
from moe_ablm.data.dataset import flat
from moe_ablm.data.domains import Domains, find_domains
from moe_ablm.errors import UserError

# A chain that has these is not annotated again; its CDR3 and its identity follow from them.
NEEDED = ("germline_aa", "cdr_mask_aa", "nongermline_mask_aa", "v_gene", "j_gene")
CALLS = ("v_call", "j_call")
SEGMENTS = "gene_segment_mask_aa"  # kept where it is there, never computed
RESIDUE_COLUMNS = (*NEEDED[:3], SEGMENTS)
DISAGREE = "columns_disagree"


def annotate_columns(
    batch: pa.RecordBatch, chain: str, *, reannotate: bool
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Annotates one chain of every row.

    Args:
      batch: may have any of the columns of the annotated table.
      chain: "heavy" or "light".
      reannotate: do as if the annotation that is there were not.

    Returns:
      Columns by their name without the chain, and for each row the reason (object `[rows]`) why
      it is not annotated: "", one of `REASONS`, or "columns_disagree" where a string has another
      length than the sequence or a given CDR3 is not where the CDR3 is. The values of rows with
      a reason mean nothing.
    """
    n = batch.num_rows
    sequence = pc.ascii_upper(texts(batch, f"sequence_aa_{chain}"))
    names = (SEGMENTS,) if reannotate else (*NEEDED, SEGMENTS, *CALLS, "cdr3_aa")
    given = {name: texts(batch, f"{name}_{chain}") for name in names}
    none = pa.array([""] * n, pa.string())
    given = {name: given.get(name, none) for name in (*NEEDED, SEGMENTS, *CALLS, "cdr3_aa")}
    complete = np.logical_and.reduce([length_of(given[name]) > 0 for name in NEEDED])
    reason = _faults(sequence, given, complete)
    rows = np.flatnonzero((length_of(sequence) > 0) & ~complete & (reason == ""))
    domains = find_domains(*flat(sequence.take(pa.array(rows))), chain)
    reason[rows] = np.array(REASONS, object)[domains.reason]
    accepted = np.flatnonzero(domains.reason == ACCEPTED)
    rows, domains = rows[accepted], domains.take(accepted)
    columns = _residue_columns(sequence, given, reason, rows, domains)
    columns |= _gene_columns(given, rows, domains)
    columns |= _cdr3_and_identity(columns)
    computed = np.full(n, np.nan)
    computed[rows] = domains.v_identity
    identity = np.where(np.isnan(computed), columns["v_identity_aa"], computed)
    if not reannotate:
        known = numbers(batch, f"v_identity_aa_{chain}")
        identity = np.where(np.isnan(known), identity, known)
    columns["v_identity_aa"] = pa.array(identity, mask=np.isnan(identity))
    contradicts = (length_of(given["cdr3_aa"]) > 0) & (reason == "")
    contradicts &= pc.not_equal(given["cdr3_aa"], columns["cdr3_aa"]).to_numpy(zero_copy_only=False)
    reason[contradicts] = DISAGREE
    if f"{SEGMENTS}_{chain}" not in batch.schema.names:
        del columns[SEGMENTS]
    return columns, reason


def texts(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column as strings, "" where it is null or not there; raises UserError for other types."""
    if name not in batch.schema.names:
        return pa.array([""] * batch.num_rows, pa.string())
    kind = batch[name].type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"annotate: column {name} holds {kind}; expected strings")
    return pc.fill_null(batch[name].cast(pa.string()), "")


def numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as float64 `[rows]`, NaN where it is null, empty or not there."""
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    column = batch[name]
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, column)
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise UserError(f"annotate: column {name}: expected numbers ({error})") from error


def length_of(strings: pa.Array) -> np.ndarray:
    """Bytes of each string, int64 `[rows]`."""
    return np.diff(flat(strings)[1])


def _faults(sequence: pa.Array, given: dict[str, pa.Array], complete: np.ndarray) -> np.ndarray:
    """Why rows cannot be used as they are given (object `[rows]`)."""
    reason = np.full(len(sequence), "", object)
    letters, offsets = flat(sequence)
    lengths = np.diff(offsets)
    wrong = np.searchsorted(offsets, np.flatnonzero(tokenizer.invalid(letters)), "right") - 1
    reason[wrong[complete[wrong]]] = "nonstandard_residue"  # others: the annotator's decision
    for name in RESIDUE_COLUMNS:
        length = length_of(given[name])
        reason[(length > 0) & (length != lengths)] = DISAGREE
    return reason


def _strings(values: np.ndarray, counts: np.ndarray) -> pa.Array:
    """Strings of `counts` `[rows]` ASCII letters each, from the letters end to end."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.StringArray.from_buffers(len(counts), *buffers[1:])


def _either(first: pa.Array, second: pa.Array) -> pa.Array:
    """The first string of each row, the second where that is empty."""
    return pc.if_else(pc.equal(first, ""), second, first)


def _cut(strings: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.Array:
    """Letters `start` to `stop` `[rows]` of each string."""
    letters, offsets = flat(strings)
    lengths = np.diff(offsets)
    index = np.arange(len(letters)) - np.repeat(offsets[:-1], lengths)
    inside = (index >= np.repeat(start, lengths)) & (index < np.repeat(stop, lengths))
    return _strings(letters[inside], np.clip(stop, None, lengths) - np.clip(start, None, lengths))


def _residue_columns(
    sequence: pa.Array,
    given: dict[str, pa.Array],
    reason: np.ndarray,
    rows: np.ndarray,
    domains: Domains,
) -> dict[str, pa.Array]:
    """Per-residue strings, cut to the domain; all empty where a row has a reason."""
    start, stop = np.zeros(len(sequence), np.int64), length_of(sequence)
    stop[reason != ""] = 0
    start[rows], stop[rows] = domains.start, domains.start + domains.length
    columns = {"sequence_aa": _cut(sequence, start, stop)}
    counts = np.zeros(len(sequence), np.int64)
    counts[rows] = domains.length
    inside = np.arange(domains.residues.shape[1]) < domains.length[:, None]
    for name, computed in (("germline_aa", domains.germline), ("cdr_mask_aa", domains.cdr)):
        spread = _strings(computed[inside], counts)
        columns[name] = _either(_cut(given[name], start, stop), spread)
    letters, offsets = flat(columns["sequence_aa"])
    differs = (letters != flat(columns["germline_aa"])[0]).astype(np.uint8) + np.uint8(ord("0"))
    derived = _strings(differs, np.diff(offsets))
    columns["nongermline_mask_aa"] = _either(
        _cut(given["nongermline_mask_aa"], start, stop), derived
    )
    columns[SEGMENTS] = _cut(given[SEGMENTS], start, stop)
    return columns


def _gene_columns(
    given: dict[str, pa.Array], rows: np.ndarray, domains: Domains
) -> dict[str, pa.Array]:
    columns = {}
    for segment, calls in (("v", domains.v_call), ("j", domains.j_call)):
        call = np.full(len(given["v_gene"]), "", object)
        call[rows] = calls
        gene = [text.partition("|")[0] for text in call]
        known = given[f"{segment}_gene"]
        columns[f"{segment}_gene"] = _either(known, pa.array(gene, pa.string()))
        computed = _either(known, pa.array(call, pa.string()))
        columns[f"{segment}_call"] = _either(given[f"{segment}_call"], computed)
    return columns


def _cdr3_and_identity(columns: dict[str, pa.Array]) -> dict[str, pa.Array | np.ndarray]:
    """CDR3 and V identity (NaN where there is no residue before a CDR3) as the masks say."""
    letters, offsets = flat(columns["sequence_aa"])
    n, row = len(offsets) - 1, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    in_cdr3 = flat(columns["cdr_mask_aa"])[0] == ord("3")
    mutated = flat(columns["nongermline_mask_aa"])[0] == ord("1")
    seen = np.concatenate([[0], np.cumsum(in_cdr3)])
    before = seen[1:] == seen[offsets[:-1]][row]
    before &= (seen[offsets[1:]] > seen[offsets[:-1]])[row]
    total = np.bincount(row[before], minlength=n)
    differing = np.bincount(row[before & mutated], minlength=n)
    with np.errstate(invalid="ignore"):
        identity = 1.0 - differing / total
    cdr3 = _strings(letters[in_cdr3], np.bincount(row[in_cdr3], minlength=n))
    return {"cdr3_aa": cdr3, "v_identity_aa": identity}
