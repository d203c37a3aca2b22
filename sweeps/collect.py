"""One parquet or CSV file of a sweep: a row a cell, whatever became of it.

    python -m sweeps.collect DIR --out runs.parquet
    python -m moe_ablm fit --input runs.parquet --law joint --out fit/

Columns: cell, fingerprint, state, step, note; params (active), total_params, tokens, unique_tokens,
flops, experts, router, seed, loss (validation, nats), as `fit` reads them; loss_REGION,
valid_loss_best, train_loss_final, verdict, tokens_per_second; axis_NAME of the grid. A cell that is
not complete has no loss, and tokens and flops as planned.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from launch.state import COMPLETE, State, finite, read_summary, state_of
from moe_ablm.errors import UserError
from moe_ablm.files import replacing
from sweeps.planned import Planned, read_plan

WRITERS = {".parquet": pq.write_table, ".csv": csv.write_csv}


def row(p: Planned, state: State) -> dict[str, object]:
    """A cell as a row of the table."""
    summary = (read_summary(p.cell) if state.name == COMPLETE else None) or {}  # may be gone since
    tokens = finite(summary.get("tokens_seen")) or p.cell.tokens
    flops = finite(summary.get("flops")) or p.cell.flops
    regions, stability = (
        found if isinstance(found := summary.get(name), dict) else {}
        for name in ("valid_loss_by_region", "stability")
    )
    verdict = stability.get("verdict")
    return {
        "cell": p.cell.name,
        "fingerprint": p.cell.fingerprint,
        "state": state.name,
        "step": state.step,
        "note": state.note,
        "params": p.params_active,
        "total_params": p.params_total,
        "tokens": float(tokens),
        # a run shorter than an epoch has seen no more than its tokens
        "unique_tokens": float(min(p.unique_tokens, tokens)),
        "flops": flops,
        "experts": p.experts,
        "router": "dense" if p.router == "none" else p.axes.get("router", p.router),
        "seed": p.seed,
        "loss": finite(summary.get("valid_loss_final")),
        "valid_loss_best": finite(summary.get("valid_loss_best")),
        "train_loss_final": finite(summary.get("train_loss_final")),
        **{f"loss_{region}": finite(loss) for region, loss in regions.items()},
        "verdict": verdict if isinstance(verdict, str) else None,
        "tokens_per_second": finite(summary.get("tokens_per_second")),
        **{f"axis_{name}": value for name, value in p.axes.items()},
    }


def collect(folder: Path, out: Path) -> list[State]:
    """Writes the table of a sweep, whole or not at all; returns the states of its cells.

    Raises:
      UserError: the folder holds no readable plan, or `out` cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    _, cells = read_plan(folder)
    states = [state_of(p.cell, p.steps) for p in cells]
    rows = [row(p, s) for p, s in zip(cells, states, strict=True)]
    names = dict.fromkeys(name for each in rows for name in each)
    table = pa.table({name: [each.get(name) for each in rows] for name in names})
    write = WRITERS[suffix]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            write(table, temporary)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return states


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 1 where a cell failed or is damaged, or 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", type=Path, help="the --out of a sweep")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet|FILE.csv")
    options = parser.parse_args(argv)
    try:
        states = collect(options.dir, options.out)
    except UserError as error:
        print(f"sweeps: {error}", file=sys.stderr)
        return 2
    count = Counter(state.name for state in states)
    counts = ", ".join(f"{n} {name}" for name, n in count.items())
    print(f"{options.out}: {len(states)} cells ({counts})")
    return int(bool(count["failed"] + count["damaged"]))


if __name__ == "__main__":
    sys.exit(main())
