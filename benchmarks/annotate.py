"""Accuracy, rejections and rate of the annotator; docs/annotation.md shows what it prints.

    python benchmarks/annotate.py [--pairs N] [--oas FILE.csv.gz ...] [--proteins FILE.fasta]

Rates are chains a second of CPU time, not of wall time: they are comparable on a busy machine.
"""

import argparse
import csv
import gzip
import multiprocessing
import resource
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from moe_ablm.data import align
from moe_ablm.data.annotate import ChainAnnotation, annotate_batch, annotate_chains
from moe_ablm.data.germline_scores import AMINO_ACIDS, BACKGROUND
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.simulate import simulate

LEADER = {"heavy": "MEFGLSWVFLVALLRGVQC", "light": "MDMRVPAQLLGLLLLWLSGARC"}
CONSTANT = {
    "heavy": "ASTKGPSVFPLAPSSKSTSGGTAALGCLVKDYFPEPVTVSWNSGALTSGVHTFPAVLQSSGLYSLSSVVTVPSS",
    "IGK": "RTVAAPSVFIFPPSDEQLKSGTASVVCLLNNFYPREAKVQWKVDNALQSGNSQESVTEQDSKDSTYSLSSTLTL",
    "IGL": "GQPKAAPSVTLFPPSSEELQANKATLVCLISDFYPGAVTVAWKADSSPVKAGVETTTPSKQSNNKYAASSYLSL",
}
CONSOLE = Console(width=130)


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        cells = (f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row)
        table.add_row(*cells)
    CONSOLE.print(table)


def with_indel(
    sequence: str, mask: str, germline: str, rng: np.random.Generator
) -> tuple[str, str, str]:
    """One insertion or deletion of 1-4 residues inside CDR1 or CDR2 (whichever has room)."""
    number = rng.choice(["1", "2"])
    start, stop = mask.index(number), mask.rindex(number) + 1
    size = int(rng.integers(1, 5))
    if rng.random() < 0.5 or stop - start < size + 3:
        at = int(rng.integers(start + 1, stop))
        new = "".join(rng.choice(list("GSYTNDA"), size))
        return (
            sequence[:at] + new + sequence[at:],
            mask[:at] + number * size + mask[at:],
            germline[:at] + new + germline[at:],
        )
    at = int(rng.integers(start + 1, stop - size))
    return tuple(text[:at] + text[at + size :] for text in (sequence, mask, germline))


def accuracy_row(
    truth: dict[str, list], chain: str, label: str, indels: bool
) -> tuple[list, list[str]]:
    """A row of shares of right answers among the accepted chains, and their names."""
    sequences, masks, germlines = (
        truth[f"{n}_{chain}"] for n in ("sequence_aa", "cdr_mask_aa", "germline_aa")
    )
    if indels:
        rng = np.random.default_rng(7)
        changed = [with_indel(*row, rng) for row in zip(sequences, masks, germlines, strict=True)]
        sequences, masks, germlines = zip(*changed, strict=True)
    right: dict[str, list] = {}
    accepted = 0
    for i, found in enumerate(annotate_chains(sequences, chain)):
        if not isinstance(found, ChainAnnotation):
            continue
        accepted += 1
        end = masks[i].index("3")
        v, j = truth[f"v_gene_{chain}"][i], truth[f"j_gene_{chain}"][i]
        answers = {
            "V gene": v in found.v_call.split("|"),
            "V named first": v == found.v_gene,
            "genes named": len(found.v_call.split("|")),
            "CDR1": _is(found.cdr_mask_aa, masks[i], "1"),
            "CDR2": _is(found.cdr_mask_aa, masks[i], "2"),
            "CDR3": _is(found.cdr_mask_aa, masks[i], "3"),
            "germline V": found.germline_aa[:end] == germlines[i][:end],
            "J gene": j in found.j_call.split("|"),
        }
        for name, value in answers.items():
            right.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in right.items()}
    return [f"{chain}{label}", len(sequences), accepted, *means.values()], list(means)


def _is(found: str, true: str, number: str) -> bool:
    where = [i for i, letter in enumerate(found) if letter == number]
    return where == [i for i, letter in enumerate(true) if letter == number]


def accuracy(truth: dict[str, list]) -> None:
    rows = []
    for indels, label in ((False, ""), (True, ", with an indel")):
        for chain in CHAINS:
            row, names = accuracy_row(truth, chain, label, indels)
            rows.append(row)
    print_table("simulated truth", ["chains", "n", "accepted", *names], rows)


def by_mutations(truth: dict[str, list]) -> None:
    rows = []
    for chain in CHAINS:
        masks, germlines = truth[f"cdr_mask_aa_{chain}"], truth[f"germline_aa_{chain}"]
        ends = [mask.index("3") for mask in masks]
        load = np.array(
            [
                m[:e].count("1")
                for m, e in zip(truth[f"nongermline_mask_aa_{chain}"], ends, strict=True)
            ]
        )
        found = annotate_chains(truth[f"sequence_aa_{chain}"], chain)
        whole = np.array([isinstance(f, ChainAnnotation) for f in found])
        exact = np.array(
            [
                ok and f.germline_aa[:e] == g[:e]
                for ok, f, g, e in zip(whole, found, germlines, ends, strict=True)
            ]
        )
        for low, high in ((0, 0), (1, 4), (5, 9), (10, 19), (20, 99)):
            chosen = (load >= low) & (load <= high) & whole
            if chosen.any():
                rows.append(
                    [f"{chain}, {low}-{high}", int(chosen.sum()), float(exact[chosen].mean())]
                )
    print_table("germline V exact, by amino-acid mutations of V", ["mutations", "n", "share"], rows)


def oas(path: Path) -> None:
    with gzip.open(path, "rt", newline="") as file:
        lines = file.readlines()
    rows = list(csv.DictReader(lines[1:] if lines[0].startswith(("{", '"{')) else lines))
    table = []
    for chain in CHAINS:
        found = annotate_chains([row[f"sequence_alignment_aa_{chain}"] for row in rows], chain)
        answers = [
            agreement(row, f, chain)
            for row, f in zip(rows, found, strict=True)
            if isinstance(f, ChainAnnotation)
        ]
        shares = {name: float(np.mean([a[name] for a in answers])) for name in answers[0]}
        table.append([chain, len(rows), len(answers), *shares.values()])
    header = ["chain", "n", "accepted", *shares]
    print_table(f"agreement with the columns of {path.name}", header, table)


def agreement(row: dict[str, str], found: ChainAnnotation, chain: str) -> dict[str, bool]:
    """Whether an annotation says the same as a row of OAS; J and V without their alleles."""
    v, j = (row[f"{segment}_call_{chain}"].split("*")[0] for segment in "vj")
    residues = list(zip(found.sequence_aa, found.cdr_mask_aa, strict=True))
    cdrs = {number: "".join(a for a, m in residues if m == number) for number in "123"}
    return {
        "V gene": v in found.v_call.split("|"),
        "V named first": v == found.v_gene,
        **{f"CDR{n}": row[f"cdr{n}_aa_{chain}"] == cdr for n, cdr in cdrs.items()},
        "J gene": j in found.j_call.split("|"),
    }


def negatives(truth: dict[str, list], chain: str, n: int) -> dict[str, list[str]]:
    """What must not be accepted as a V domain of the chain."""
    rng = np.random.default_rng(3)
    own = truth[f"sequence_aa_{chain}"][:n]
    other = truth[f"sequence_aa_{CHAINS[chain == 'heavy']}"][:n]
    letters = list(AMINO_ACIDS)
    cuts = rng.integers(5, 60, n)
    at = [int(rng.integers(len(s))) for s in own]
    return {
        "random proteins": [
            "".join(rng.choice(letters, size, p=BACKGROUND)) for size in rng.integers(50, 600, n)
        ],
        "residues of a V domain, shuffled": ["".join(rng.permutation(list(s))) for s in own],
        "V domain backwards": [s[::-1] for s in own],
        "the other chain": other,
        "half of each chain": [a[:50] + b[50:] for a, b in zip(own, other, strict=True)],
        "5-59 residues cut from the start": [s[c:] for s, c in zip(own, cuts, strict=True)],
        "5-59 residues cut from the end": [s[:-c] for s, c in zip(own, cuts, strict=True)],
        "30 residues cut from the middle": [s[:40] + s[70:] for s in own],
        "X in the domain": [s[:i] + "X" + s[i + 1 :] for s, i in zip(own, at, strict=True)],
        "stop in the domain": [s[:i] + "*" + s[i + 1 :] for s, i in zip(own, at, strict=True)],
    }


def rejections(truth: dict[str, list], n: int, proteins: Path | None) -> None:
    rows = []
    for chain in CHAINS:
        cases = negatives(truth, chain, n)
        if proteins is not None:
            records = proteins.read_text().split(">")[1:]
            cases[proteins.name] = ["".join(r.split("\n")[1:]).strip() for r in records]
        for name, sequences in cases.items():
            found = annotate_chains(sequences, chain)
            reasons = Counter(getattr(f, "reason", "accepted") for f in found)
            accepted = reasons.pop("accepted", 0)
            most = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
            rows.append([f"{chain}: {name}", len(sequences), accepted, most])
    print_table("false accepts", ["what", "n", "accepted", "rejected as"], rows)


def cpu_seconds(batch: pa.RecordBatch) -> float:
    """CPU time of this process for one batch; the germline tables are built before."""
    annotate_batch(batch.slice(0, 8))
    start = time.process_time()
    annotate_batch(batch)
    return time.process_time() - start


def rates(batch: pa.RecordBatch) -> None:
    light = batch["sequence_aa_light"].to_pylist()
    heavy = batch["sequence_aa_heavy"].to_pylist()
    bare = pa.record_batch({"sequence_aa_heavy": heavy, "sequence_aa_light": light})
    longer = pa.record_batch(
        {
            "sequence_aa_heavy": [LEADER["heavy"] + s + CONSTANT["heavy"] for s in heavy],
            "sequence_aa_light": [
                LEADER["light"] + s + CONSTANT[gene[:3]]
                for s, gene in zip(light, batch["v_gene_light"].to_pylist(), strict=True)
            ],
        }
    )
    chains, rows = 2 * batch.num_rows, []
    for name, table in (
        ("V domains", bare),
        ("with leader and constant region", longer),
        ("annotated already (trusted)", batch),
    ):
        rows.append([name, f"{chains / cpu_seconds(table):,.0f}"])
    ungapped, align._place_ungapped = (
        align._place_ungapped,
        lambda codes, *_: np.zeros(len(codes), bool),
    )
    some = bare.slice(0, batch.num_rows // 8)
    rows.append(["every chain aligned with gaps", f"{2 * some.num_rows / cpu_seconds(some):,.0f}"])
    align._place_ungapped = ungapped
    spawn = multiprocessing.get_context("spawn")
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            seconds = list(pool.map(cpu_seconds, [bare] * processes))
        rate = processes * chains / sum(seconds)
        rows.append([f"V domains, {processes} processes at once", f"{rate:,.0f}"])
    print_table("rate", ["what", "chains/s of CPU time"], rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, truth and all: {peak:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20_000, help="simulated pairs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--oas", type=Path, action="append", default=[], metavar="FILE.csv.gz")
    parser.add_argument("--proteins", type=Path, metavar="FILE.fasta", help="more negatives")
    args = parser.parse_args()
    table = pa.Table.from_batches(list(simulate(args.pairs, args.seed))).combine_chunks()
    truth = table.to_pydict()
    accuracy(truth)
    by_mutations(truth)
    for path in args.oas:
        oas(path)
    rejections(truth, min(args.pairs, 2_000), args.proteins)
    rates(table.slice(0, 8192).to_batches()[0])


if __name__ == "__main__":
    main()
