"""Chains that are written in nucleotides: told from proteins, and translated to V domains."""

from collections.abc import Iterable, Sequence
from itertools import permutations

import numpy as np
import pyarrow as pa

from moe_ablm.data.dataset import flat
from moe_ablm.data.germline import encode_nucleotides, translate_codes
from moe_ablm.data.readers.columns import place_of
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


def are_nucleotides(sequences: pa.Array) -> np.ndarray:
    """Which strings are nucleotides, bool `[rows]`: only letters of bases, and too many of them."""
    letters, offsets = flat(sequences)
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
    batch: pa.RecordBatch, columns: Iterable[str], report: Report, chain: str | None = None
) -> pa.RecordBatch:
    """The batch with nucleotides translated; rows where that fails are rejected, with a reason.

    Args:
      batch: text columns, `_row` and `_line`.
      columns: those that may hold nucleotides; "sequence_aa_light" holds light chains, and so on.
      report: counts what is translated and what is rejected.
      chain: name of a column that says for each row "heavy", "light" or "" (either).
    """
    good = np.ones(batch.num_rows, bool)
    for name in columns:
        if name not in batch.schema.names:
            continue
        here = are_nucleotides(batch[name]) & good
        rows = np.flatnonzero(here)
        if not len(rows):
            continue
        texts = batch[name].to_pylist()
        wanted = batch[chain].to_pylist() if chain else [_chain_named(name)] * len(texts)
        found = v_domains([texts[i] for i in rows], [wanted[i] for i in rows])
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


def v_domains(reads: Sequence[str], chains: Sequence[str]) -> list[tuple[str, str]]:
    """The V domain of each read, or "" and the reason why there is none.

    Of the open reading frames of a read, first of the strand as it is given, the longest one is
    taken that is annotated as a V domain of its chain.

    Args:
      reads: nucleotides; gaps are removed, U is T.
      chains: "heavy", "light" or "" (either) for each.
    """
    clean = [read.upper().replace("U", "T").replace("-", "").replace(".", "") for read in reads]
    found = _domains(clean, chains)
    left = [i for i, (domain, reason) in enumerate(found) if not domain and reason != _TOO_LONG]
    back = [clean[i].translate(_COMPLEMENT)[::-1] for i in left]
    for i, (domain, _) in zip(left, _domains(back, [chains[i] for i in left]), strict=True):
        if domain:
            found[i] = domain, ""
    return found


_TOO_LONG = "too long"


def _domains(reads: Sequence[str], chains: Sequence[str]) -> list[tuple[str, str]]:
    frames = [_frames(read) if len(read) <= _LONGEST_READ else [] for read in reads]
    candidates = [
        sorted((p for f in three for p in f.split("*") if len(p) >= _SHORTEST_FRAME), key=len)[::-1]
        for three in frames
    ]
    annotated = iter(
        _annotated([c for some in candidates for c in some], _spread(candidates, chains))
    )
    found: list[tuple[str, str]] = []
    for some in candidates:
        results = [next(annotated) for _ in some]
        found.append((next((domain for domain, _ in results if domain), ""), ""))
    lost = [i for i, (domain, _) in enumerate(found) if not domain]
    whole = [[f.replace("*", "X") for f in frames[i]] for i in lost]
    mended = [_across_frames(three) for three in whole]
    kinds = [chains[i] for i in lost]
    told = iter(_annotated([f for three in whole for f in three], _spread(whole, kinds)))
    joined = iter(_annotated([f for some in mended for f in some], _spread(mended, kinds)))
    for i, three, some in zip(lost, whole, mended, strict=True):
        reasons = {next(told)[1] for _ in three}
        shifted = True in {bool(next(joined)[0]) for _ in some}
        found[i] = "", _why(reasons, shifted) if three else _TOO_LONG
    return found


def _across_frames(frames: Sequence[str]) -> list[str]:
    """Proteins that begin in one frame and go on in another, where words of V genes say so."""
    from moe_ablm.data.germline_scores import encode, v_table, words

    known = np.logical_or.reduce([v_table(chain).has_word.any(axis=1) for chain in CHAINS])
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
    """Amino acids of the three frames of a strand; "*" is a stop, "X" an unknown codon."""
    codes = encode_nucleotides(read)
    frames = []
    for start in range(3):
        codons = codes[start : start + (len(codes) - start) // 3 * 3]
        letters = translate_codes(np.maximum(codons, 0)).copy()
        letters[(codons.reshape(-1, 3) < 0).any(axis=1)] = ord("X")
        frames.append(letters.tobytes().decode())
    return frames


def _annotated(frames: Sequence[str], chains: Sequence[str]) -> list[tuple[str, str]]:
    """(domain, "") of each frame that is a V domain of its chain, else ("", reason)."""
    from moe_ablm.data.annotate import annotate_chains  # parasail and the germline tables

    found: list[tuple[str, str]] = [("", "not_a_v_domain")] * len(frames)
    for chain in CHAINS:
        rows = [i for i, c in enumerate(chains) if c in (chain, "") and not found[i][0]]
        for i, result in zip(rows, annotate_chains([frames[i] for i in rows], chain), strict=True):
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
