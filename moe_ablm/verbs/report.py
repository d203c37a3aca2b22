"""`python -m moe_ablm report --run DIR`: the table and figures of a run, from its results alone.

With `--run` several times: all of them in one figure and one table (`run_curves`).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console

from moe_ablm import config as configs
from moe_ablm import outcome
from moe_ablm.data.regions import CHAINS, REGIONS
from moe_ablm.errors import UserError
from moe_ablm.files import all_or_none
from moe_ablm.model import flops
from moe_ablm.progress import region_table, stability_lines
from moe_ablm.results import read_evaluated
from moe_ablm.verbs.writing import out_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        required=True,
        help="work directory of a run; repeatable: curves of all in one figure",
    )
    parser.add_argument(
        "--out",
        type=out_directory,
        help="where figures go (default: RUN/figures; of several runs it must be given)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="a table, drawn anew until all runs have ended; figures then, if --out is given",
    )


def run(args: argparse.Namespace) -> None:
    """Prints how the run stands, its newest evaluation and stability; draws loss and routing.

    Of several runs: a line each, and their curves.
    """
    if args.watch:
        from moe_ablm.verbs.watch import watch

        watch(args.run)
        if args.out is None:
            return
    if len(args.run) > 1:
        _together(args.run, args.out)
    else:
        _alone(args.run[0], args.out)


def _together(runs: list[Path], out: Path | None) -> None:
    from moe_ablm.verbs import run_curves  # matplotlib

    if out is None:
        raise UserError("--out is missing: of several runs, say where the figure is to go")
    found = run_curves.read_curves(runs)
    with all_or_none(out) as directory:
        run_curves.draw(found, directory / "curves.png")
        run_curves.write_csv(found, directory / "runs.csv")
    Console().print(run_curves.table(found))
    print(f"curves: {out / 'curves.png'}, table: {out / 'runs.csv'}")


def _alone(run: Path, out: Path | None) -> None:
    records = read_evaluated(run)
    evaluations = [r for r in records if r["kind"] == "eval"]
    print(standing(run, records))
    Console().print(region_table(evaluations[-1]))
    print("\n".join(_stability(run / "run.json")))
    out = out or run / "figures"
    routed = evaluations[-1].get("routed")
    with all_or_none(out) as directory:
        draw_loss(records, directory / "loss.png")
        if routed:
            draw_routing(routed, directory / "routing.png")
    print(f"loss curve: {out / 'loss.png'}")
    if routed:
        print(f"expert by region: {out / 'routing.png'}")


def standing(run: Path, records: list[dict]) -> str:
    """Size, step and status of a run, in a line.

    Args:
      run: its work directory.
      records: lines of its `results.jsonl`, at least one.
    """
    parts = []
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        spec = configs.encoder_of_run(config["model"])
        total, active = flops.params_total(spec), flops.params_active(spec)
        some = f", {active:,} active" if active < total else ""
        parts.append(f"{config['model']['size']} ({total:,} parameters{some})")
        steps = config["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        steps = None  # the results tell the rest
    step = records[-1]["step"]
    try:
        summary = json.loads((run / "run.json").read_text())
        status = summary["status"]
        step = max(step, int(summary.get("step", 0)))  # it was saved there, between two lines
    except FileNotFoundError:
        status = "not ended: running, or interrupted"
    except (OSError, ValueError, KeyError, TypeError):
        status = "unknown"  # said where stability is
    parts.append(f"step {step:,}" + (f" of {steps:,}" if steps else ""))
    if status == outcome.COMPLETE and steps and step < steps:
        status += ", ended by train.patience"
    if status == outcome.STOPPED:
        status += ": the same command resumes it"
    return f"{run}: {', '.join(parts)}, {status}"


def _stability(file: Path) -> list[str]:
    """What `run.json` says of stability."""
    if not file.exists():
        return ["stability: not known before the run ends"]
    try:
        content = json.loads(file.read_text())
        if content["status"] == outcome.DIVERGED:
            return [f"stability: diverged ({content['error']})"]
        return stability_lines(content["stability"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}): train again with the same command; it is made anew"
        ) from error


SHOWN = ("CDRH3", "FRH3", "CDRL3", "FRL3")
PARTS = {
    "heavy": "heavy chains",
    "light_seen": "light chains seen in training",
    "light_unseen": "other light chains",
}


def draw_loss(records: list[dict], path: Path) -> None:
    """Training loss, validation loss, and that of some regions and chains, over tokens seen.

    Args:
      records: lines of `results.jsonl`, at least one of kind "eval".
      path: PNG to write.
    """
    train = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(_of(train, "tokens_seen"), _of(train, "loss"), color="0.75", label="training")
    x = _of(evaluations, "tokens_seen")
    axis.plot(x, _of(evaluations, "loss"), "k.-", label="validation")
    for name in SHOWN:
        y = [r["loss_by_region"].get(name, np.nan) for r in evaluations]
        axis.plot(x, y, ".--", label=f"validation, {name}")
    for name, label in PARTS.items():
        y = [r.get("loss_by_chain", {}).get(name, np.nan) for r in evaluations]
        if np.isfinite(y).any():
            axis.plot(x, y, ".:", label=f"validation, {label}")
    axis.set(xlabel="tokens seen", ylabel="masked-token loss (nats)", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=150)


def _of(records: list[dict], key: str) -> list[float]:
    return [r[key] for r in records]


def draw_routing(routed: dict[str, list], path: Path) -> None:
    """Heat map, one panel a MoE layer: how much more than its share each expert takes of a region.

    Args:
      routed: `{layer: [E][cells]}` counts of an "eval" line, cells as in `training.losses`; of
        soft-MoE sums of shares, no whole numbers.
      path: PNG to write.

    Colour is log2 of (share of the region's assignments that go to the expert) over (share of all
    assignments that go to it): 0 is no preference.
    """
    from matplotlib.figure import Figure

    counts = {layer: np.asarray(table, float) for layer, table in routed.items()}
    cells = [c * len(REGIONS) + r for c in range(len(CHAINS)) for r in range(1, len(REGIONS))]
    names = [f"{CHAINS[c // 8][0].upper()} {REGIONS[c % 8]}" for c in cells]
    experts = len(next(iter(counts.values())))
    # a file has at most 2^16 pixels a side: rows of many experts are lower, and not all numbered
    height = 0.6 + min(0.28 * experts, 6.0)
    figure = Figure(figsize=(8, 1.2 + len(counts) * height), layout="constrained")
    axes = figure.subplots(len(counts), 1, squeeze=False)
    for axis, (layer, table) in zip(axes[:, 0], counts.items(), strict=True):
        image = axis.imshow(_enrichment(table[:, cells]), cmap="RdBu_r", vmin=-3, vmax=3)
        axis.set_aspect("auto")
        axis.set_xticks(range(len(cells)), names, rotation=60, ha="right")
        axis.set_yticks(range(0, experts, math.ceil(experts / 32)))
        axis.set(title=f"layer {layer}", ylabel="expert")
    figure.colorbar(image, ax=axes, location="top", shrink=0.5, label="log2 enrichment")
    figure.savefig(path, dpi=150)


def _enrichment(table: np.ndarray) -> np.ndarray:
    """Counts `[E, regions]` -> log2 ratio of observed to independent routing, `[E, regions]`."""
    total = max(table.sum(), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / total
    return np.log2((table + 0.5) / (expected + 0.5))
