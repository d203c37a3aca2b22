"""Collects a sweep into one parquet or CSV file: one row per cell, whatever its state.

    python -m sweeps.collect DIR --out runs.parquet
    python -m moe_ablm fit --input runs.parquet --law joint --out fit/

Columns: cell, fingerprint, state, step, note; params (active), total_params, tokens, unique_tokens,
corpus_tokens, flops, experts, router, seed, loss (validation, nats), loss_metric, as `fit` reads
them; lr, batch, weight_decay, dropout where all complete cells say them; loss_all, loss_novel,
loss_CHAIN (heavy, light_seen, light_unseen, ...), loss_REGION, valid_loss_best, train_loss_final
(laws of the gap read it), verdict, tokens_per_second; axis_NAME of the grid. A cell that is not
complete has no loss; its tokens and flops are the planned ones.

--loss chooses the column `loss`: novel is the loss on chains that no training antibody has, all the
loss on all chains; or name a chain. The default is novel where every complete cell has it (older
runs do not), else all.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from launch.state import COMPLETE, CellState, finite, read_summary, state_of
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError
from moe_ablm.files import replacing
from moe_ablm.scaling.run_directories import settings_of
from moe_ablm.scaling.runs import TUNED
from sweeps.planned import Planned, read_plan

CHAIN_LOSSES = tuple(
    f"{chain}{part}" for chain in ("heavy", "light") for part in ("", "_seen", "_unseen", "_novel")
)
LOSSES = ("novel", "all", *CHAIN_LOSSES)
WRITERS = {".parquet": pq.write_table, ".csv": csv.write_csv}


def row(p: Planned, state: CellState) -> dict[str, object]:
    """A cell as a row of the table, `loss` and `loss_metric` left out."""
    summary = (read_summary(p.cell) if state.name == COMPLETE else None) or {}  # may be gone since
    tokens = finite(summary.get("tokens_seen")) or p.cell.tokens
    flops = finite(summary.get("flops")) or p.cell.flops
    regions, chains, stability = (
        found if isinstance(found := summary.get(name), dict) else {}
        for name in ("valid_loss_by_region", "valid_loss_by_chain", "stability")
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
        "unique_tokens": unique_tokens(p, summary, tokens),
        "corpus_tokens": float(p.corpus_tokens),
        "flops": flops,
        "experts": p.experts,
        "router": "dense" if p.router == "none" else p.axes.get("router", p.router),
        "seed": p.seed,
        "loss_all": finite(summary.get("valid_loss_final")),
        "loss_novel": finite(summary.get("valid_loss_novel")),
        **{f"loss_{chain}": finite(chains.get(chain)) for chain in CHAIN_LOSSES},
        "valid_loss_best": finite(summary.get("valid_loss_best")),
        "train_loss_final": finite(summary.get("train_loss_final")),
        **{f"loss_{region}": finite(loss) for region, loss in regions.items()},
        "verdict": verdict if isinstance(verdict, str) else None,
        "tokens_per_second": finite(summary.get("tokens_per_second")),
        **{f"axis_{name}": value for name, value in p.axes.items()},
    }


def unique_tokens(p: Planned, summary: dict, tokens: float) -> float | None:
    """Tokens of the different chains that a run has seen; None where they were not counted.

    A complete run counts them itself. For older runs and incomplete ones the number is that of the
    training set, from the plan, and at most the tokens seen.
    """
    counted = finite(summary.get("unique_tokens")) if "corpus_tokens" in summary else None
    if counted is not None or p.unique_tokens is None:
        return counted
    return float(min(p.unique_tokens, tokens))


def collect(folder: Path, out: Path, loss: str | None = None) -> tuple[list[CellState], list[str]]:
    """Writes the table of a sweep, whole or not at all.

    Args:
      folder: of the sweep.
      out: the file.
      loss: one of `LOSSES`, which becomes the column `loss`; None: the default of `--loss`.

    Returns:
      The states of the cells, and notes for the reader of the table.

    Raises:
      UserError: the folder holds no readable plan, or `out` cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    _, cells = read_plan(folder)
    states = [state_of(p.cell, p.steps) for p in cells]
    rows = [row(p, s) for p, s in zip(cells, states, strict=True)]
    complete = [each for each in rows if each["state"] == COMPLETE]
    _add_settings(cells, rows, complete)
    notes = []
    if loss is None:
        lacking = sum(each["loss_novel"] is None for each in complete)
        loss = "all" if lacking else "novel"
        if lacking:
            notes.append(
                f"loss is that of all chains: {lacking} of {len(complete)} complete cells have none"
                " of novel chains"
            )
    notes += _novel_differ(cells, states) if loss.endswith("novel") else []
    notes += _counted_once(rows)
    for each in rows:
        each |= {"loss": each[f"loss_{loss}"], "loss_metric": loss}
    names = dict.fromkeys(name for each in rows for name in each)
    table = pa.table({name: [each.get(name) for each in rows] for name in names})
    write = WRITERS[suffix]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            write(table, temporary)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return states, notes


def _add_settings(cells: Sequence[Planned], rows: list[dict], complete: list[dict]) -> None:
    """Columns of what is tuned, where all complete cells say it: cells that differ are no seeds."""
    for p, each in zip(cells, rows, strict=True):
        each |= settings_of(p.cell.workdir / "config.json")
    for role in TUNED:
        if not all(role in each for each in complete):
            for each in rows:
                each.pop(role, None)


def _novel_differ(cells: Sequence[Planned], states: Sequence[CellState]) -> list[str]:
    """A note where the cells' losses are of different novel chains."""
    counts = set()
    for p, state in zip(cells, states, strict=True):
        summary = (read_summary(p.cell) if state.name == COMPLETE else None) or {}
        masked = (summary.get("evaluation") or {}).get("masked_by_chain")
        if isinstance(masked, dict):
            counts.add(tuple(masked.get(f"{c}_novel", 0) for c in ("heavy", "light")))
    if len(counts) < 2:
        return []
    least, most = min(map(sum, counts)), max(map(sum, counts))
    return [
        f"novel chains differ between the cells ({least:,} to {most:,} masked residues): their "
        "losses are of other chains; prepare the data with --split joint to compare them"
    ]


def _counted_once(rows: Sequence[dict]) -> list[str]:
    """Where a row lacks `unique_tokens`, takes all of them from `corpus_tokens`; returns a note."""
    if all(each["unique_tokens"] is not None for each in rows):
        return []
    for each in rows:
        each["unique_tokens"] = min(each["corpus_tokens"], each["tokens"])
    return [
        "unique_tokens counts a chain once per record, as corpus_tokens does: the plan is older "
        "than the count of different chains; the sweep's command with --launcher=print counts them"
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 1 where a cell failed or is damaged, or 2 for wrong input."""
    parser = Parser(
        prog="python -m sweeps.collect",
        description=__doc__,
    )
    parser.add_argument("dir", type=Path, help="the --out of a sweep")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet|FILE.csv")
    parser.add_argument("--loss", choices=LOSSES, help="which loss is the column `loss`")
    options = parser.parse_args(argv)

    def carry_out() -> int:
        states, notes = collect(options.dir, options.out, options.loss)
        count = Counter(state.name for state in states)
        counts = ", ".join(f"{n} {name}" for name, n in count.items())
        print(f"{options.out}: {len(states)} cells ({counts})")
        for note in notes:
            print(note)
        return int(bool(count["failed"] + count["damaged"]))

    return end(carry_out, "sweeps")


if __name__ == "__main__":
    sys.exit(main())
