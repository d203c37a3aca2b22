"""Time and memory of `prepare` on simulated pairs.

    python benchmarks/prepare.py --work DIR [--pairs 250000 1000000] [--bare 20000 40000]

For each number of pairs a file is simulated into DIR (kept, and used again by the next run) and
prepared in a process of its own. `--pairs` are annotated parquet files, `--bare` are gzipped CSV
files with nothing but the sequences, which `prepare` annotates. Peak memory is the largest sum of
the resident sets of the process and its workers, looked at ten times a second; it should not grow
with the rows.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from moe_ablm.data.simulate import simulate

BARE = ["sequence_id", "sequence_aa_heavy", "sequence_aa_light"]


@dataclass
class Cost:
    """What a command took: seconds of wall clock and of CPU, mebibytes resident at most."""

    wall: float
    cpu: float
    peak: float


def source(work: Path, pairs: int, bare: bool) -> Path:
    """A file of simulated pairs; made when it is not there."""
    path = work / (f"bare-{pairs}.csv.gz" if bare else f"pairs-{pairs}.parquet")
    if path.exists():
        return path
    partial = path.with_name(f".partial-{path.name}")
    batches = simulate(pairs, seed=1)
    if bare:
        with pa.CompressedOutputStream(str(partial), "gzip") as f:
            first = next(batches).select(BARE)
            with pacsv.CSVWriter(f, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch.select(BARE))
    else:
        first = next(batches)
        with pq.ParquetWriter(partial, first.schema, compression="zstd") as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
    partial.rename(path)
    return path


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def resident(pid: int) -> float:
    """Mebibytes resident in a process and its descendants; 0 when it has ended."""
    total = 0
    try:
        for member in family(pid):
            fields = Path(f"/proc/{member}/statm").read_text().split()
            total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total / 2**20


def measure(command: list[str]) -> Cost:
    """Runs a command to its end."""
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return Cost(time.monotonic() - started, cpu, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="*", default=[250_000, 1_000_000])
    parser.add_argument("--bare", type=int, nargs="*", default=[20_000, 40_000])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{'source':24} {'rows':>10} {'wall s':>8} {'CPU s':>8} {'rows/CPU s':>11} {'MiB':>7}")
    for pairs, bare in [(n, False) for n in args.pairs] + [(n, True) for n in args.bare]:
        path, out = source(args.work, pairs, bare), args.work / "dataset"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "moe_ablm", "prepare", "--input", str(path)]
        cost = measure([*command, "--out", str(out)])
        print(
            f"{path.name:24} {pairs:10,} {cost.wall:8.1f} {cost.cpu:8.1f} "
            f"{pairs / cost.cpu:11,.0f} {cost.peak:7.0f}",
            flush=True,
        )
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
