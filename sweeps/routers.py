"""Routers compared on real pairs: runs what is missing, then prints the table.

    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python sweeps/routers.py --data data/pairs --out runs/routers --seeds 3

A run that is complete is not run again; one that was interrupted goes on. `--print` lists the
commands instead, for a cluster's own scheduler; `--table` prints the table of what is there.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROWS = [
    ("dense", "interleaved"),
    ("top2", "interleaved"),
    ("top2", "consecutive"),
    ("top2-capacity", "interleaved"),
    ("top2-biased", "interleaved"),
    ("top-p", "interleaved"),
    ("expert-choice", "interleaved"),
    ("expert-choice", "consecutive"),
    ("soft", "interleaved"),
    ("soft", "consecutive"),
    ("soft-l2", "interleaved"),
    ("sequence", "interleaved"),
]
REGIONS = ("CDRH3", "CDRL3", "FRH1")


def workdir(out: Path, row: tuple[str, str], seed: int) -> Path:
    """Where a run lies."""
    return out / f"{'-'.join(row)}-seed{seed}"


def command(data: str, out: Path, row: tuple[str, str], seed: int, extra: list[str]) -> list[str]:
    """The command line of a run."""
    router, placement = row
    return [
        sys.executable, "-m", "moe_ablm.train",
        f"--config=configs/routers.py:router={router},placement={placement}",
        f"--config.seed={seed}", f"--config.data.path={data}",
        f"--workdir={workdir(out, row, seed)}", *extra,
    ]  # fmt: skip


def finished(path: Path) -> dict | None:
    """`run.json` of a complete run."""
    file = path / "run.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    return content if content.get("status") == "complete" else None


def last_router(path: Path) -> list[dict]:
    """Router statistics of each MoE layer in the last tenth of the updates."""
    lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    return [s for line in train[-len(train) // 10 :] for s in line.get("router", {}).values()]


def with_error(values: list[float], digits: int) -> str:
    """Mean and its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def table(out: Path, seeds: int) -> str:
    """A Markdown table, a line a row that has complete runs."""
    head = ["router", "placement", "seeds", "train loss", "validation", *REGIONS]
    head += ["load entropy", "dropped", "tokens/s", "memory MB", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 3) + "---|"]
    for row in ROWS:
        paths = [workdir(out, row, seed) for seed in range(seeds)]
        runs = [(run, path) for path in paths if (run := finished(path))]
        if runs:
            lines.append("| " + " | ".join([*row, *cells(runs)]) + " |")
    return "\n".join(lines)


def cells(runs: list[tuple[dict, Path]]) -> list[str]:
    """The columns of one row."""
    found = [run for run, _ in runs]
    routing = [stats for _, path in runs for stats in last_router(path)]
    verdicts = [run["stability"]["verdict"] for run in found]
    return [
        str(len(runs)),
        with_error([run["train_loss_final"] for run in found], 3),
        with_error([run["valid_loss_final"] for run in found], 3),
        *(with_error([run["valid_loss_by_region"][r] for run in found], 3) for r in REGIONS),
        f"{mean(s['entropy'] for s in routing):.3f}" if routing else "",
        f"{mean(s['dropped'] for s in routing):.1%}" if routing else "",
        f"{mean(run['tokens_per_second'] for run in found):,.0f}",
        f"{max(run['peak_memory'] for run in found) / 1e6:,.0f}",
        ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/pairs")
    parser.add_argument("--out", type=Path, default=Path("runs/routers"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="list the commands, run nothing")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    a, extra = parser.parse_known_args()
    if not a.table:
        for seed in range(a.seeds):
            for row in ROWS:
                line = command(a.data, a.out, row, seed, extra)
                if finished(workdir(a.out, row, seed)):
                    continue
                print(shlex.join(line), flush=True)
                if not a.print:
                    subprocess.run(line, check=True)
    if not a.print:
        print(table(a.out, a.seeds))


if __name__ == "__main__":
    main()
