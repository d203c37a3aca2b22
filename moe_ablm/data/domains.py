"""V domains on amino-acid chains: regions, germline, CDR3 and genes, as arrays over many chains.

The V gene is placed by `align`; what follows C104 is found here: the end of the CDR3, framework 4
and the J gene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_ablm.data.align import ACCEPTED, CODE_OF_REASON, MAX_MISSING, Placement, place, window
from moe_ablm.data.foreign import foreign
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.germline_scores import (
    CODE_OF_BYTE,
    LETTER_OF_CODE,
    OTHER,
    SCORE_SCALE,
    JTable,
    j_table,
    v_table,
)
from moe_ablm.data.regions import OTHER_CHAIN

MAX_LENGTH = 2_000  # residues; a longer sequence is no antibody chain
ROWS_AT_ONCE = 512

MIN_CDR3, MAX_CDR3 = 3, 50  # residues between C104 and W/F118
# Log-odds that a framework 4 must reach. The best place in a random tail or in a constant region
# stays below 5 nats; 1 in 10,000 real domains is below 6 (docs/annotation.md).
MIN_FR4_SCORE = 6 * SCORE_SCALE
NEARLY_AS_PROBABLE = 2 * SCORE_SCALE  # a J that is e^2 times less probable may be it, too
IMPOSSIBLE = np.int16(np.iinfo(np.int16).min)


@dataclass(frozen=True, eq=False)
class Junction:
    """The junction of each of `n` chains; only rows with `found` mean anything."""

    found: np.ndarray  # [n] bool
    resembling: np.ndarray  # [n] bool: something like a framework 4 is there, of any locus
    cdr3_length: np.ndarray  # [n]
    fr4_length: np.ndarray  # [n] residues of framework 4 that the chain has
    fr4: np.ndarray  # [n, 11] uint8 germline residues of framework 4, OTHER behind its end
    best: np.ndarray  # [n, J] bool: all that explain the chain as well, or nearly so
    named: np.ndarray  # [n] index of the most probable J


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
    imgt: np.ndarray  # [n, W] uint8: IMGT positions up to C104, 0 where a residue is inserted
    mutated: np.ndarray  # [n, D] uint8 digits
    v_call: np.ndarray  # [n] object: genes joined by "|"
    j_call: np.ndarray  # [n] object

    def take(self, rows: np.ndarray) -> "Domains":
        """The given rows, in that order."""
        return Domains(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def find_domains(
    flat: np.ndarray,
    offsets: np.ndarray,
    chain: str,
    *,
    unknown: bool = False,
    germlines: str = HUMAN,
) -> Domains:
    """Annotates chains given as ASCII codes end to end (uint8) and offsets `[n + 1]`.

    `unknown` allows letters that are no amino acid inside a domain; `germlines`: see
    `germline.load_germlines`.
    """
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
        part = _annotate_block(padded, cut, chain, unknown, germlines)
        part.reason[lengths[rows] > MAX_LENGTH] = CODE_OF_REASON["too_long"]
        parts.append(part)
    names = Domains.__dataclass_fields__
    sorted_by_length = Domains(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))
    return sorted_by_length.take(np.argsort(order, kind="stable"))


def _annotate_block(
    codes: np.ndarray, lengths: np.ndarray, chain: str, unknown: bool, germlines: str
) -> Domains:
    v, j = v_table(chain, germlines), j_table(chain, germlines)
    other = v_table(OTHER_CHAIN[chain], germlines)
    placement = place(codes, lengths, v, other, unknown=unknown)
    after_c104 = placement.start + placement.c104 + 1
    junction = find_junction(codes, lengths, after_c104, placement.locus, j)
    domains = _assemble(codes, placement, junction)
    accepted = placement.reason == ACCEPTED
    cut_short = (lengths - after_c104 < MAX_CDR3) & ~junction.resembling
    nonstandard = False if unknown else (domains.residues == ord("-")).any(axis=1)
    for fault, reason in (
        (~junction.found & cut_short, "truncated_end"),
        (~junction.found & ~cut_short, "no_fr4"),
        (junction.found & nonstandard, "nonstandard_residue"),
    ):
        domains.reason[accepted & fault] = CODE_OF_REASON[reason]
    _name_ultralong(codes, lengths, after_c104, placement, domains, j)
    for row in np.flatnonzero(domains.reason == CODE_OF_REASON["not_a_v_domain"]):
        text = LETTER_OF_CODE[codes[row, : lengths[row]]].tobytes().decode()
        domains.reason[row] = CODE_OF_REASON[foreign(text) or "not_a_v_domain"]
    domains.v_call[:] = _calls(placement.best, v.genes, placement.best.argmax(axis=1))
    domains.j_call[:] = _calls(junction.best, j.genes, junction.named)
    return domains


def _name_ultralong(
    codes: np.ndarray,
    lengths: np.ndarray,
    after_c104: np.ndarray,
    placement: Placement,
    domains: Domains,
    table: JTable,
) -> None:
    """Names CDR3s beyond `MAX_CDR3`, as cattle have them, where a framework 4 follows."""
    without = [CODE_OF_REASON[reason] for reason in ("truncated_end", "no_fr4")]
    rows = np.flatnonzero((placement.reason == ACCEPTED) & np.isin(domains.reason, without))
    if not len(rows):
        return
    behind = after_c104[rows] + MAX_CDR3 - MIN_CDR3
    junction = find_junction(codes[rows], lengths[rows], behind, placement.locus[rows], table)
    domains.reason[rows[junction.found]] = CODE_OF_REASON["ultralong_cdr3"]


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
        imgt=placement.imgt,
        mutated=mutated.astype(np.uint8) + np.uint8(ord("0")),
        v_call=np.full(n, "", object),
        j_call=np.full(n, "", object),
    )


def _calls(best: np.ndarray, genes: Sequence[tuple[str, ...]], first: np.ndarray) -> list[str]:
    """The genes of the best germlines of each row `[n, G]` joined by "|": `first` `[n]`, then the
    others in the table's order."""
    names: dict[tuple[bytes, int], str] = {}
    calls = []
    for key in zip(map(bytes, np.packbits(best, axis=1)), first.tolist(), strict=True):
        if key not in names:
            chosen = np.flatnonzero(np.unpackbits(np.frombuffer(key[0], np.uint8))).tolist()
            order = [key[1], *chosen] if chosen else []
            names[key] = "|".join(dict.fromkeys(gene for g in order for gene in genes[g]))
        calls.append(names[key])
    return calls


def find_junction(
    codes: np.ndarray,
    lengths: np.ndarray,
    after_c104: np.ndarray,
    locus: np.ndarray,
    table: JTable,
) -> Junction:
    """The best framework 4 behind C104, and the J alleles that may have made it and the CDR3's end.

    The J that is named is the most probable one, usage and trimming included; beside it stand all
    that explain the chain as well, and all whose probability is within `NEARLY_AS_PROBABLE` of
    its. Mutations in framework 4 make one J of another (IGKJ1 and 2 differ in two residues), which
    nucleotides tell and amino acids do not.

    Args:
      codes: residue codes `[n, L]`, OTHER behind the end of a chain.
      lengths: `[n]`.
      after_c104: `[n]` index of the residue after C104.
      locus: `[n]` locus of the V gene (index into LOCI): a kappa V is joined to a kappa J.
      table: J alleles of the chain.
    """
    n, rows = len(codes), np.arange(len(codes))
    width = len(table.fr4_scores)
    tail = window(codes, after_c104, MAX_CDR3 + 1 + width)
    room = np.maximum(lengths - after_c104, 0)
    scores = np.zeros((n, MAX_CDR3 + 1, len(table.genes)), np.int16)
    for i, by_code in enumerate(table.fr4_scores):
        scores += by_code[tail[:, i : i + MAX_CDR3 + 1]]
    cdr3_lengths = np.arange(MAX_CDR3 + 1)
    fits = cdr3_lengths[:, None] + table.fr4_length - MAX_MISSING <= room[:, None, None]
    fits &= cdr3_lengths[:, None] >= MIN_CDR3
    resembling = np.where(fits, scores, IMPOSSIBLE).max(axis=(1, 2)) >= 0
    fits &= table.locus == locus[:, None, None]
    scores = np.where(fits, scores, IMPOSSIBLE)
    cdr3_length = scores.max(axis=2).argmax(axis=1)
    at_best = scores[rows, cdr3_length].astype(np.int32)
    found = at_best.max(axis=1) >= MIN_FR4_SCORE
    explained, trimmed = _cdr3_scores(tail, cdr3_length, table)
    with_cdr3 = at_best + explained
    probable = at_best + trimmed + table.prior
    j = probable.argmax(axis=1)
    fr4_length = np.minimum(table.fr4_length[j], room - cdr3_length)
    ends_here = cdr3_length + fr4_length == room
    found &= ends_here | _ends_alike(window(tail, cdr3_length, width), table.fr4[j], fr4_length)
    return Junction(
        found=found,
        resembling=resembling,
        cdr3_length=cdr3_length,
        fr4_length=fr4_length,
        fr4=table.fr4[j],
        best=(with_cdr3 >= with_cdr3[rows, j][:, None])
        | (probable >= probable[rows, j][:, None] - NEARLY_AS_PROBABLE),
        named=j,
    )


def _ends_alike(seen: np.ndarray, germline: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether one of the last four residues of framework 4 is as in the germline.

    In a longer chain none of them is where the framework was cut short and a constant region
    follows.
    """
    index = np.arange(seen.shape[1])
    last = (index < length[:, None]) & (index >= length[:, None] - 4)
    return ((seen == germline) & last).any(axis=1)


def _cdr3_scores(
    tail: np.ndarray, cdr3_length: np.ndarray, table: JTable
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds `[n, J]` of the CDR3's end under each J, trimmed where that explains it best; and
    the same with the probability that it is trimmed there.

    A J may be trimmed within a codon: then its nucleotides still say something of that residue.
    """
    before, _, alleles = table.cdr3_scores.shape
    total = np.zeros((len(tail), alleles), np.int32)
    explained, probable = np.zeros_like(total), np.full_like(total, IMPOSSIBLE)
    for k in range(before + 1):
        at = cdr3_length - 1 - k
        code = np.where(at >= 0, tail[np.arange(len(tail)), np.maximum(at, 0)], OTHER)
        cut = total + table.cut_scores[k, code]
        np.maximum(explained, total, out=explained)
        np.maximum(explained, cut, out=explained)
        np.maximum(probable, total + table.whole_prior[k], out=probable)
        np.maximum(probable, cut + table.cut_prior[k], out=probable)
        if k < before:
            total += table.cdr3_scores[k, code]
    return explained, probable
