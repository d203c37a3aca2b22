"""Tables on the terminal."""

from collections.abc import Mapping

from rich.table import Table


def region_table(evaluation: dict) -> Table:
    """Loss and accuracy by region and chain.

    Args:
      evaluation: an "eval" line of `results.jsonl`.
    """
    table = Table(title=f"Validation loss {evaluation['loss']:.4f} (nats), by region", box=None)
    table.add_column("region")
    for chain in ("heavy", "light"):
        for column in ("loss", "accuracy", "masked"):
            table.add_column(f"{chain} {column}", justify="right")
    for region in ("FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4"):
        cells = []
        for chain in "HL":
            name = f"{region[:-1]}{chain}{region[-1]}"
            if name in evaluation["loss_by_region"]:
                cells += [
                    f"{evaluation['loss_by_region'][name]:.4f}",
                    f"{evaluation['accuracy_by_region'][name]:.3f}",
                    f"{evaluation['masked_by_region'][name]:,}",
                ]
            else:
                cells += ["-", "-", "0"]
        table.add_row(region, *cells)
    return table


def stability_lines(stability: Mapping) -> list[str]:
    """The verdict of the stability watch and its events, one a line, those not over last.

    Args:
      stability: of `run.json`: verdict, events, worst.
    """
    events = sorted(stability["events"], key=lambda e: (e["until"] is None, e["step"]))
    return [f"stability: {stability['verdict']}", *(f"  {_told(event)}" for event in events)]


def _told(event: Mapping) -> str:
    where = "loss" if event["layer"] is None else f"layer {event['layer']}"
    over = "not over" if event["until"] is None else f"over at step {event['until']}"
    return f"{where}: {event['what']} {event['value']:.4g} from step {event['step']}, {over}"
