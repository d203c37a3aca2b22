"""Chains that are written in nucleotides: told from proteins, and translated to V domains."""

import re
from collections.abc import Iterable, Sequence
from itertools import permutations, product

import numpy as np
import pyarrow as pa

from moe_ablm.data.dataset import flat
from moe_ablm.data.germline import encode_nucleotides, translate_codes
from moe_ablm.data.readers.columns import place_of
from moe_ablm.data.readers.options import AS_USUAL, Reading
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CHAINS

# A protein of more residues than that is never of A, C, G, T, N and U alone; of ambiguous
# nucleotides a read has few.
LONGEST_PROTEIN_OF_BASES = 30
_LEAST_BASES = 0.9
_BASES, _AMBIGUOUS = (np.zeros(256, bool) for _ in range(2))
_BASES[list(b"ACGTNUacgtnu")] = True
_AMBIGUOUS[list(b"ACGTNURYSWKMBDHVacgtnuryswkmbdhv-.")] = True
# Residues of an open reading frame that may hold a V domain; the shortest domains have 95.
_SHORTEST_FRAME = 80
_LONGEST_READ = 6000  # nucleotides; a longer one is a genome, not a transcript of a chain
_COMPLEMENT = str.maketrans("ACGT", "TGCA")
UNKNOWN = -1  # where the first codon of a read is
_POSITION = re.compile(r"[1-9]\d{0,8}(?:\.0+)?")


def are_nucleotides(sequences: pa.Array, *, said: bool = False) -> np.ndarray:
    """Which strings are nucleotides, bool `[rows]`: only letters of bases, and too many of them.

    Where the name of their column says so (`said`), letters of bases alone are enough.
    """
    letters, offsets = flat(sequences)
    if said:
        others = np.concatenate([[0], np.cumsum(~_AMBIGUOUS[letters])])[offsets]
        return (np.diff(offsets) > 0) & (np.diff(others) == 0)
    found = np.diff(offsets) > LONGEST_PROTEIN_OF_BASES
    left = np.flatnonzero(found)
    for i in range(LONGEST_PROTEIN_OF_BASES):  # proteins drop out within a few letters
        if not len(left):
            break
        left = left[_AMBIGUOUS[letters[offsets[left] + i]]]
    found[:] = False
    for row in left:
        sequence = letters[offsets[row] : offsets[row + 1]]
        found[row] = _AMBIGUOUS[sequence].all() and _BASES[sequence].mean() >= _LEAST_BASES
    return found


def translated(
    batch: pa.RecordBatch,
    columns: Iterable[str],
    report: Report,
    reading: Reading,
    chain: str | None = None,
    codon: str | None = None,
) -> pa.RecordBatch:
    """The batch with nucleotides translated; rows where that fails are rejected, with a reason.

    Args:
      batch: text columns, `_row` and `_line`.
      columns: those that may hold nucleotides; "sequence_aa_light" holds light chains, and so on.
      report: counts what is translated and what is rejected.
      reading: says by which germlines V domains are found.
      chain: name of a column that says for each row "heavy", "light" or "" (either).
      codon: name of a column of `first_codons`, which reads of nucleotides have.
    """
    good = np.ones(batch.num_rows, bool)
    for name in columns:
        if name not in batch.schema.names:
            continue
        here = are_nucleotides(batch[name], said=codon is not None) & good
        rows = np.flatnonzero(here)
        if not len(rows):
            continue
        texts = batch[name].to_pylist()
        wanted = batch[chain].to_pylist() if chain else [_chain_named(name)] * len(texts)
        begin = batch[codon].to_pylist() if codon else [UNKNOWN] * len(texts)
        found = v_domains(
            [texts[i] for i in rows],
            [wanted[i] for i in rows],
            [begin[i] for i in rows],
            germlines=reading.germlines,
        )
        for row, (domain, reason) in zip(rows.tolist(), found, strict=True):
            texts[row] = domain
            if reason:
                good[row] = False
                report.reject(f"nucleotides: {reason}", place_of(batch, row))
        done = int((here & good).sum())
        report.note("nucleotides translated to the V domain", place_of(batch, rows[0]), done)
        at = batch.schema.get_field_index(name)
        batch = batch.set_column(at, name, pa.array(texts, pa.string()))
    return batch if good.all() else batch.filter(pa.array(good))


def _chain_named(column: str) -> str:
    """The chain that a column holds alone, or ""."""
    return next((c for c in CHAINS if column.endswith(f"_{c}")), "")


def first_codons(
    reads: Sequence[str],
    aligned: Sequence[bool],
    sequence_starts: Sequence[str],
    germline_starts: Sequence[str],
) -> list[int]:
    """Where the first whole codon of the V gene begins in each read, gaps not counted.

    An aligned read with IMGT's gaps (dots) has its codons where IMGT has them. Otherwise the first
    aligned nucleotide of the germline tells, and of a whole read the first aligned one of its own.

    Args:
      reads: nucleotides.
      aligned: whether a read is cut to its alignment, as `sequence_alignment` is.
      sequence_starts: AIRR's `v_sequence_start`, from 1; "" where it is not known.
      germline_starts: AIRR's `v_germline_start`, from 1; "" where it is not known.

    Returns:
      An index from 0, or `UNKNOWN`.
    """
    codons = []
    for read, cut, *texts in zip(reads, aligned, sequence_starts, germline_starts, strict=True):
        start, germline = (int(float(t)) if _POSITION.fullmatch(t) else None for t in texts)
        if cut:
            start = len(read) - len(read.lstrip("-.Nn")) + 1
            if "." in read and (start > 1 or germline is None):
                germline = start
        if start is None or germline is None:
            codons.append(UNKNOWN)
            continue
        begin = start - 1 + (1 - germline) % 3
        codons.append(begin - sum(map(read[:begin].count, "-.")))
    return codons


def v_domains(
    reads: Sequence[str],
    chains: Sequence[str],
    codons: Sequence[int] | None = None,
    *,
    germlines: Sequence[str] = AS_USUAL.germlines,
) -> list[tuple[str, str]]:
    """The V domain of each read, or "" and the reason why there is none.

    It is looked for behind the first codon that is known, then in the open reading frames, first
    of the strand as it is given: the longest one is taken that is annotated as a V domain of its
    chain.

    Args:
      reads: nucleotides; gaps are removed, U is T.
      chains: "heavy", "light" or "" (either) for each.
      codons: where the first codon of each begins, or `UNKNOWN` (see `first_codons`).
      germlines: by which V domains are found, the first ones first.
    """
    clean = [read.upper().replace("U", "T").replace("-", "").replace(".", "") for read in reads]
    found = [("", "")] * len(clean)
    known = [i for i, codon in enumerate(codons or ()) if codon != UNKNOWN]
    in_frame = [_codons_of(clean[i][(codons or ())[i] :][:_LONGEST_READ]) for i in known]
    open_frame = [protein.partition("*")[0] for protein in in_frame]
    at_codons = _annotated(open_frame, [chains[i] for i in known], germlines)
    for i, result in zip(known, at_codons, strict=True):
        found[i] = result
    left = [i for i, (domain, reason) in enumerate(found) if not (domain or reason == _CUT)]
    for i, result in zip(left, _in_any_frame(clean, chains, left, germlines), strict=True):
        found[i] = result
    return found


def _in_any_frame(
    reads: Sequence[str], chains: Sequence[str], rows: Sequence[int], germlines: Sequence[str]
) -> list[tuple[str, str]]:
    """The domains, or the reasons, of some reads by their open reading frames."""
    reads, chains = [reads[i] for i in rows], [chains[i] for i in rows]
    found = _domains(reads, chains, germlines)
    left = [i for i, (domain, reason) in enumerate(found) if not domain and reason != _TOO_LONG]
    back = [reads[i].translate(_COMPLEMENT)[::-1] for i in left]
    turned = _domains(back, [chains[i] for i in left], germlines)
    for i, (domain, _) in zip(left, turned, strict=True):
        if domain:
            found[i] = domain, ""
    return found


_TOO_LONG = "too long"
_CUT = "truncated_start"  # behind its first codon: what is before is not of the V gene


def _domains(
    reads: Sequence[str], chains: Sequence[str], germlines: Sequence[str]
) -> list[tuple[str, str]]:
    frames = [_frames(read) if len(read) <= _LONGEST_READ else [] for read in reads]
    candidates = [
        sorted((p for f in three for p in f.split("*") if len(p) >= _SHORTEST_FRAME), key=len)[::-1]
        for three in frames
    ]
    annotated = iter(
        _annotated([c for some in candidates for c in some], _spread(candidates, chains), germlines)
    )
    found: list[tuple[str, str]] = []
    for some in candidates:
        results = [next(annotated) for _ in some]
        found.append((next((domain for domain, _ in results if domain), ""), ""))
    lost = [i for i, (domain, _) in enumerate(found) if not domain]
    whole = [[f.replace("*", "X") for f in frames[i]] for i in lost]
    mended = [_across_frames(three, germlines) for three in whole]
    kinds = [chains[i] for i in lost]
    told, joined = (
        iter(_annotated([f for some in group for f in some], _spread(group, kinds), germlines))
        for group in (whole, mended)
    )
    for i, three, some in zip(lost, whole, mended, strict=True):
        reasons = {next(told)[1] for _ in three}
        shifted = True in {bool(next(joined)[0]) for _ in some}
        found[i] = "", _why(reasons, shifted) if three else _TOO_LONG
    return found


def _across_frames(frames: Sequence[str], germlines: Sequence[str]) -> list[str]:
    """Proteins that begin in one frame and go on in another, where words of V genes say so."""
    from moe_ablm.data.germline_scores import encode, v_table, words

    tables = [v_table(chain, name) for name in germlines for chain in CHAINS]
    known = np.logical_or.reduce([table.has_word.any(axis=1) for table in tables])
    hits = [np.cumsum(known[words(encode(f))]) for f in frames if len(f) > _SHORTEST_FRAME]
    proteins = []
    for first, second in permutations(range(len(hits)), 2):
        n = min(len(hits[first]), len(hits[second]))
        cut = int((hits[first][:n] - hits[second][:n]).argmax())
        proteins.append(frames[first][:cut] + frames[second][cut:])
    return proteins


def _spread(groups: Sequence[Sequence[str]], chains: Sequence[str]) -> list[str]:
    return [chain for some, chain in zip(groups, chains, strict=True) for _ in some]


def _frames(read: str) -> list[str]:
    """Amino acids of the three frames of a strand."""
    return [_codons_of(read[start:]) for start in range(3)]


def _codons_of(read: str) -> str:
    """Amino acids of the whole codons of a read; "*" is a stop, "X" an unknown codon."""
    codes = encode_nucleotides(read)
    codons = codes[: len(codes) // 3 * 3]
    letters = translate_codes(np.maximum(codons, 0)).copy()
    letters[(codons.reshape(-1, 3) < 0).any(axis=1)] = ord("X")
    return letters.tobytes().decode()


def _annotated(
    frames: Sequence[str], chains: Sequence[str], germlines: Sequence[str]
) -> list[tuple[str, str]]:
    """(domain, "") of each frame that is a V domain of its chain, else ("", reason)."""
    from moe_ablm.data.annotate import annotate_chains  # parasail and the germline tables

    found: list[tuple[str, str]] = [("", "not_a_v_domain")] * len(frames)
    for name, chain in product(germlines, CHAINS):
        rows = [i for i, c in enumerate(chains) if c in (chain, "") and not found[i][0]]
        results = annotate_chains([frames[i] for i in rows], chain, name)
        for i, result in zip(rows, results, strict=True):
            if not isinstance(result, str):
                found[i] = result.sequence_aa, ""
            elif result not in ("not_a_v_domain", "wrong_chain") or chains[i]:
                found[i] = "", result
    return found


def _why(reasons: set[str], shifted: bool) -> str:
    """What is wrong with a read, from what the annotator says of its three frames.

    Args:
      reasons: of the frames.
      shifted: whether the beginning of one frame and the end of another make a V domain.
    """
    if "nonstandard_residue" in reasons:
        return "stop codon or unknown nucleotide in the V domain"
    if shifted:
        return "frameshift"
    return min(reasons - {"not_a_v_domain"} or {"no open reading frame is a V domain"})
