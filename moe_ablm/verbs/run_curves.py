"""Several runs together: their curves over updates, tokens and FLOPs in one figure, and a table."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from moe_ablm.errors import UserError
from moe_ablm.files import require_local, shortened
from moe_ablm.results import read_evaluated

AXES = {"updates": "step", "tokens seen": "tokens_seen", "FLOPs": "flops"}
COLUMNS = ("run", "status", "step", "tokens_seen", "flops", "loss", "best_loss", "loss_CDRH3",
           "tokens_per_second")  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a run has reported.

    Attributes:
      name: of the run.
      status: of `run.json`; "running" where there is none yet.
      train, evaluations: lines of `results.jsonl`, each with "flops", the FLOPs spent until then.
    """

    name: str
    status: str
    train: list[dict]
    evaluations: list[dict]

    def row(self) -> dict:
        """The run in a line of the table, by `COLUMNS`; the loss is that of the validation set."""
        last, losses = self.evaluations[-1], [r["loss"] for r in self.evaluations]
        rates = [r["tokens_per_second"] for r in self.train if r["tokens_per_second"] > 0]
        return {
            "run": self.name,
            "status": self.status,
            "step": last["step"],
            "tokens_seen": last["tokens_seen"],
            "flops": last["flops"],
            "loss": last["loss"],
            "best_loss": min(losses),
            "loss_CDRH3": last["loss_by_region"].get("CDRH3", math.nan),
            "tokens_per_second": rates[-1] if rates else math.nan,
        }


def read_curves(runs: Sequence[Path]) -> list[Curve]:
    """The curves of runs, named by the parts of their paths that tell them apart.

    Raises:
      UserError: a run is given twice, has not evaluated yet, or is damaged.
    """
    names = names_of(places_of(runs))
    return [_read(run, name) for run, name in zip(runs, names, strict=True)]


def places_of(runs: Sequence[Path]) -> list[Path]:
    """Absolute paths of runs.

    Raises:
      UserError: a run is given twice.
    """
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        require_local(run, "--run")
        if places.count(place) > 1:
            raise UserError(f"--run {run}: this run is given twice")
    return places


def names_of(places: Sequence[Path]) -> list[str]:
    """Paths without the folders in which all of them are."""
    parts = [place.parts for place in places]
    shared = 0
    while len({p[shared] for p in parts}) == 1 and all(len(p) > shared + 1 for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _read(run: Path, name: str) -> Curve:
    records = read_evaluated(run)
    train = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    try:
        status, per_token = _finished(run / "run.json")
        if per_token is None:
            rates = [r for r in train if r["tokens_per_second"] > 0]
            last = rates[-1] if rates else None
            spent = last and last["model_flops_per_second"] / last["tokens_per_second"]
            per_token = spent if spent else math.nan
        for record in records:
            record["flops"] = record["tokens_seen"] * per_token
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run {run}: its results are damaged ({error!r})") from error
    return Curve(name, status, train, evaluations)


def _finished(file: Path) -> tuple[str, float | None]:
    """Status, and FLOPs of a token, which a run knows at its end."""
    if not file.exists():
        return "running", None
    content = json.loads(file.read_text())
    if not content.get("tokens_seen"):
        return content["status"], None
    return content["status"], content["flops"] / content["tokens_seen"]


def table(curves: Sequence[Curve]) -> Table:
    """A line a run."""
    shown = Table(title="validation loss of masked tokens (nats)")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("run", "status") else "right")
    for curve in curves:
        row = curve.row()
        shown.add_row(
            *(row["run"], row["status"], f"{row['step']:,}", f"{row['tokens_seen']:,}"),
            *(f"{row['flops']:.3g}", f"{row['loss']:.4f}", f"{row['best_loss']:.4f}"),
            *(f"{row['loss_CDRH3']:.4f}", f"{row['tokens_per_second']:,.0f}"),
        )
    return shown


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """The table with the digits of float32; empty where a value is not known."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for curve in curves:
            row = curve.row()
            writer.writerow(
                {
                    k: "" if isinstance(v, float) and math.isnan(v) else shortened(v)
                    for k, v in row.items()
                }
            )


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A panel each over updates, tokens and FLOPs; training loss pale, validation loss dotted."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axis, (label, key) in zip(panels, AXES.items(), strict=True):
        for number, curve in enumerate(curves):
            color = f"C{number % 10}"
            of_train, of_valid = (
                ([r[key] for r in records], [r["loss"] for r in records])
                for records in (curve.train, curve.evaluations)
            )
            axis.plot(*of_train, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(*of_valid, ".-", color=color, label=curve.name)
        axis.set(xlabel=label)
    panels[0].set(ylabel="masked-token loss (nats)")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=150)
