"""How rows are related: clonal groups, donors, clusters, and how near test rows are to train."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import split as splits
from moe_ablm.data import tokenizer
from moe_ablm.data.dataset import SPLITS, flat
from moe_ablm.data.readers.columns import place_of
from moe_ablm.data.readers.report import Report
from moe_ablm.data.regions import CDR3, CHAINS
from moe_ablm.errors import UserError

_MMSEQS_COVERAGE = "0.8"
_LINES_AT_ONCE = 1 << 20  # bytes of MMseqs2's table

_SAMPLE = 1000  # CDRH3s of the test split
_COMPARED_AT_ONCE = 1 << 25  # bytes
LEVELS = (1.0, 0.9, 0.8)  # of identity


def as_ascii(strings: pa.Array) -> list[bytes]:
    """A string array as a list of bytes."""
    values, offsets = flat(strings)
    text = values.tobytes()
    ends = offsets.tolist()
    return [text[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def clonal_groups(
    stored: pa.RecordBatch, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Group and member hashes (uint64 `[rows]`) and CDRH3s of stored rows.

    A light chain alone has no CDRH3: its group is V gene, J gene and CDRL3. A row without
    annotation (a general protein) is a group of its own, named by its sequence.
    """
    heavy, light = (_cdr3(stored, chain) for chain in CHAINS)
    genes = [stored[f"{c}_{g}_gene"].to_pylist() for c in CHAINS for g in "vj"]
    group = splits.group_hashes(genes[0], genes[1], np.array([len(c) for c in heavy], np.int64))
    for i, (hv, lv) in enumerate(zip(genes[0], genes[2], strict=True)):
        if not hv:
            own = f"{lv}|{genes[3][i]}|{light[i].decode()}" if lv else f"record {key[i]}"
            group[i], heavy[i] = splits.hash64(own), b""
    member = np.array(
        [splits.hash64(f"{g}|{c.decode()}") for g, c in zip(group.tolist(), heavy, strict=True)],
        np.uint64,
    )
    return group, member, heavy


def _cdr3(stored: pa.RecordBatch, chain: str) -> list[bytes]:
    tokens, region = stored[f"{chain}_tokens"], stored[f"{chain}_region"]
    inside = np.asarray(region.values) == CDR3
    offsets = np.concatenate([[0], np.cumsum(inside)])[np.asarray(region.offsets)].tolist()
    letters = tokenizer.decode(np.asarray(tokens.values)[inside]).encode()
    return [letters[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def donor_draws(
    batch: pa.RecordBatch, report: Report, valid_donors: Sequence[str], test_donors: Sequence[str]
) -> np.ndarray:
    """The hashes that decide a donor-wise split (uint64 `[rows]`, for `split.split_of`).

    It is the hash of the row's donor; where donors are named for a split, they go there and all
    others to train.

    Raises:
      UserError: a row without donor.
    """
    names = batch["donor"].to_pylist() if "donor" in batch.schema.names else [""] * batch.num_rows
    if not all(names):
        raise UserError(
            f"{report.source}: {place_of(batch, names.index(''))}: no donor, which --split donor "
            "needs; add a column `donor`, or name it with --columns donor=COLUMN"
        )
    train, valid, test = (int((share - 0.01) * 2**64) for share in splits.SHARES)
    named = dict.fromkeys(valid_donors, valid) | dict.fromkeys(test_donors, test)
    other = (lambda name: train) if named else splits.hash64
    return np.array([named[n] if n in named else other(n) for n in names], np.uint64)


def is_labelled(batch: pa.RecordBatch) -> bool:
    """Whether every row has a cluster of its source's making."""
    if "cluster" not in batch.schema.names:
        return False
    column = batch["cluster"]
    return column.null_count == 0 and not pc.any(pc.equal(column.cast(pa.string()), "")).as_py()


def label_numbers(column: pa.Array) -> np.ndarray:
    """Cluster labels as int64: integers stay what they are, other text becomes a hash."""

    def number(text: str) -> int:
        if text.isdecimal() and len(text) <= 18 and str(int(text)) == text:
            return int(text)
        return splits.hash64(text, b"ablm-label") >> 1

    encoded = column.cast(pa.string()).dictionary_encode()
    values = np.array([number(v) for v in encoded.dictionary.to_pylist()], np.int64)
    return values[encoded.indices.to_numpy()]


def require_mmseqs() -> str:
    """Path of the `mmseqs` program; UserError where it is not on PATH."""
    program = shutil.which("mmseqs")
    if program is None:
        raise UserError(
            "--split mmseqs: no program `mmseqs` on PATH; install MMseqs2 "
            "(https://github.com/soedinglab/MMseqs2) or use --split group"
        )
    return program


def mmseqs_clusters(
    sequences: Iterable[bytes], identity: float, scratch: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Clusters sequences with `mmseqs easy-cluster` (Steinegger & Söding 2017).

    Not `easy-linclust`, though it is faster: of 3,000 heavy chains it left 2,972 clusters at 90 %
    identity where `easy-cluster` found 691, so near relatives would be on both sides of a split.

    Args:
      sequences: amino acids as ASCII; a sequence's row is its number, from 0.
      identity: `--min-seq-id`; coverage of both sequences is at least 0.8.
      scratch: directory for its files.

    Yields:
      `(row, representative)`, int64 `[n]` each: the row's cluster is named by a row.

    Raises:
      UserError: no `mmseqs`, or it failed (with the last line that it wrote).
    """
    program = require_mmseqs()
    fasta, prefix = scratch / "mmseqs.fasta", scratch / "mmseqs"
    with fasta.open("wb") as f:
        for row, sequence in enumerate(sequences):
            f.write(b">%d\n%s\n" % (row, sequence))
    command: list[str | Path] = [program, "easy-cluster", fasta, prefix, scratch / "mmseqs-tmp"]
    command += ["--min-seq-id", f"{identity:g}", "-c", _MMSEQS_COVERAGE, "--cov-mode", "0"]
    command += ["--threads", str(os.cpu_count() or 1), "-v", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"mmseqs easy-cluster failed with exit code {done.returncode}: {last}")
    with Path(f"{prefix}_cluster.tsv").open() as f:
        while lines := f.readlines(_LINES_AT_ONCE):
            pairs = np.array([line.split("\t") for line in lines], np.int64)
            yield pairs[:, 1], pairs[:, 0]


def nearest_train(parts: Callable[[], Iterable[pa.Table]], split: np.ndarray) -> dict | None:
    """Identity of test CDRH3s with the nearest training CDRH3 of the same length, any gene.

    Args:
      parts: gives tables with `row`, `member` (uint64, a hash of clonal group and CDRH3) and `cdr3`
        (binary, empty where there is none); called twice.
      split: split code of every row.

    Returns:
      `{"sampled": n, "median": identity, "share": {"1": .., "0.9": .., "0.8": ..}}`, shares of
      the sampled test CDRH3s that reach an identity; the sample is the at most 1,000 distinct ones
      of the least hash. None where test or train hold no CDRH3.
    """
    sample = _sample(parts, split)
    best = np.zeros(sum(len(s) for s in sample.values()))
    any_train = False
    for part in parts():
        train = part.filter(pa.array(_of_split(part, split, "train")))
        any_train = any_train or len(train) > 0
        at = 0
        for length, wanted in sample.items():
            known = _matrix(train["cdr3"], length)
            for start in range(len(wanted)):
                near = _best_identity(wanted[start], known)
                best[at + start] = max(best[at + start], near)
            at += len(wanted)
    if not len(best) or not any_train:
        return None
    return {
        "sampled": len(best),
        "median": round(float(np.median(best)), 4),
        "share": {f"{level:g}": round(float((best >= level - 1e-9).mean()), 4) for level in LEVELS},
    }


def _of_split(part: pa.Table, split: np.ndarray, name: str) -> np.ndarray:
    mine = split[part["row"].to_numpy()] == SPLITS.index(name)
    return mine & (pc.binary_length(part["cdr3"]).to_numpy() > 0)


def _sample(parts: Callable[[], Iterable[pa.Table]], split: np.ndarray) -> dict[int, np.ndarray]:
    """Distinct test CDRH3s by length, uint8 `[n, length]`."""
    members, cdr3s = np.zeros(0, np.uint64), np.zeros(0, object)
    for part in parts():
        test = part.filter(pa.array(_of_split(part, split, "test")))
        members = np.append(members, test["member"].to_numpy())
        cdr3s = np.append(cdr3s, np.array(test["cdr3"].to_pylist(), object))
        members, first = np.unique(members, return_index=True)
        members, cdr3s = members[:_SAMPLE], cdr3s[first][:_SAMPLE]
    lengths = sorted({len(c) for c in cdr3s})
    return {n: _matrix(pa.array([c for c in cdr3s if len(c) == n]), n) for n in lengths}


def _matrix(cdr3: pa.Array | pa.ChunkedArray, length: int) -> np.ndarray:
    mine = cdr3.filter(pc.equal(pc.binary_length(cdr3), length))
    return np.frombuffer(b"".join(mine.to_pylist()), np.uint8).reshape(-1, length)


def _best_identity(one: np.ndarray, known: np.ndarray) -> float:
    step = max(1, _COMPARED_AT_ONCE // len(one))
    best = 0
    for start in range(0, len(known), step):
        equal = (known[start : start + step] == one).sum(axis=1)
        best = max(best, int(equal.max(initial=0)))
    return best / len(one)
