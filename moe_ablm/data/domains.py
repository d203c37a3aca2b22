"""V domains on amino-acid chains: regions, germline, CDR3 and genes, as arrays over many chains."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.align import ACCEPTED, CODE_OF_REASON, Placement, place, window
from moe_ablm.data.germline_scores import CODE_OF_BYTE, LETTER_OF_CODE, OTHER, j_table, v_table
from moe_ablm.data.junction import MAX_CDR3, Junction, find_junction

MAX_LENGTH = 2_000  # residues; what is longer is no antibody chain
ROWS_AT_ONCE = 512
OTHER_CHAIN = {"heavy": "light", "light": "heavy"}


@dataclass(frozen=True, eq=False)
class Domains:
    """Annotation of `n` chains as arrays; rows with `reason != ACCEPTED` are undefined."""

    reason: np.ndarray  # [n] uint8, index into REASONS
    start: np.ndarray  # [n] index in the chain of the first residue of the domain
    length: np.ndarray  # [n] residues of the domain
    cdr3_start: np.ndarray  # [n] index in the domain
    cdr3_length: np.ndarray  # [n]
    v_identity: np.ndarray  # [n] float64
    residues: np.ndarray  # [n, D] uint8 letters (ASCII), meaningless behind `length`
    germline: np.ndarray  # [n, D] uint8 letters
    cdr: np.ndarray  # [n, D] uint8 digits (ASCII)
    mutated: np.ndarray  # [n, D] uint8 digits
    v_call: np.ndarray  # [n] object: genes joined by "|"
    j_call: np.ndarray  # [n] object

    def take(self, rows: np.ndarray) -> "Domains":
        """The given rows, in that order."""
        return Domains(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def find_domains(flat: np.ndarray, offsets: np.ndarray, chain: str) -> Domains:
    """Annotates chains given as ASCII codes end to end (uint8) and offsets `[n + 1]`."""
    codes, lengths = CODE_OF_BYTE[flat], np.diff(offsets)
    # Rows of similar length share a block, so that one long chain does not widen all others.
    order = np.argsort(lengths, kind="stable")
    parts = []
    for first in range(0, max(len(order), 1), ROWS_AT_ONCE):
        rows = order[first : first + ROWS_AT_ONCE]
        cut = np.minimum(lengths[rows], MAX_LENGTH)
        padded = np.full((len(rows), int(cut.max(initial=1))), OTHER, np.uint8)
        inside = np.arange(padded.shape[1]) < cut[:, None]
        padded[inside] = codes[(offsets[:-1][rows, None] + np.arange(padded.shape[1]))[inside]]
        part = _annotate_block(padded, cut, chain)
        part.reason[lengths[rows] > MAX_LENGTH] = CODE_OF_REASON["too_long"]
        parts.append(part)
    return _concatenate(parts).take(np.argsort(order, kind="stable"))


def _concatenate(parts: list[Domains]) -> Domains:
    return Domains(
        *(np.concatenate([getattr(p, f) for p in parts]) for f in Domains.__dataclass_fields__)
    )


def _annotate_block(codes: np.ndarray, lengths: np.ndarray, chain: str) -> Domains:
    v, j = v_table(chain), j_table(chain)
    placement = place(codes, lengths, v, v_table(OTHER_CHAIN[chain]))
    after_c104 = placement.start + placement.c104 + 1
    junction = find_junction(codes, lengths, after_c104, placement.locus, j)
    domains = _assemble(codes, placement, junction)
    accepted = placement.reason == ACCEPTED
    cut_short = (lengths - after_c104 < MAX_CDR3) & ~junction.resembling
    for fault, reason in (
        (~junction.found & cut_short, "truncated_end"),
        (~junction.found & ~cut_short, "no_fr4"),
        (junction.found & (domains.residues == ord("-")).any(axis=1), "nonstandard_residue"),
    ):
        domains.reason[accepted & fault] = CODE_OF_REASON[reason]
    domains.v_call[:] = _calls(placement.best, v.genes)
    domains.j_call[:] = _calls(junction.best, j.genes)
    return domains


def _assemble(codes: np.ndarray, placement: Placement, junction: Junction) -> Domains:
    """Per-residue strings of the domains from where V and J were placed."""
    n, v_width = placement.germline.shape
    width = v_width + MAX_CDR3 + junction.fr4.shape[1]
    index = np.arange(width)
    cdr3_start = placement.c104 + 1
    cdr3_end = cdr3_start + junction.cdr3_length
    length = cdr3_end + junction.fr4_length
    inside = index < length[:, None]
    residues = np.where(inside, window(codes, placement.start, width), np.uint8(0))
    germline = window(junction.fr4, -cdr3_end, width)
    germline[:, :v_width] = np.where(
        index[:v_width] < cdr3_start[:, None], placement.germline, germline[:, :v_width]
    )
    aligned = germline != OTHER
    germline = np.where(aligned & inside, germline, residues)
    mutated = germline != residues
    cdr = np.zeros((n, width), np.uint8)
    cdr[:, :v_width] = placement.cdr
    cdr[(index >= cdr3_start[:, None]) & (index < cdr3_end[:, None])] = 3
    in_v = aligned & (index < cdr3_start[:, None])
    differing, total = (mutated & in_v).sum(axis=1), np.maximum(in_v.sum(axis=1), 1)
    return Domains(
        reason=placement.reason.copy(),
        start=placement.start,
        length=length,
        cdr3_start=cdr3_start,
        cdr3_length=junction.cdr3_length,
        v_identity=1.0 - differing / total,
        residues=LETTER_OF_CODE[residues],
        germline=LETTER_OF_CODE[germline],
        cdr=cdr + np.uint8(ord("0")),
        mutated=mutated.astype(np.uint8) + np.uint8(ord("0")),
        v_call=np.full(n, "", object),
        j_call=np.full(n, "", object),
    )


def _calls(best: np.ndarray, genes: Sequence[tuple[str, ...]]) -> list[str]:
    """The genes of the best germlines of each row `[n, G]`, in the table's order, joined by "|"."""
    names: dict[bytes, str] = {}
    calls = []
    for key in map(bytes, np.packbits(best, axis=1)):
        if key not in names:
            chosen = np.flatnonzero(np.unpackbits(np.frombuffer(key, np.uint8)))
            names[key] = "|".join(dict.fromkeys(gene for g in chosen for gene in genes[g]))
        calls.append(names[key])
    return calls
