"""`python -m moe_ablm describe`: a dataset's card in words, its antibodies in pictures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.data.dataset import FRACTIONS, SPLITS, Dataset
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.summary import IDENTITY_BINS, LONGEST_CDR3, Summary, summarise
from moe_ablm.errors import counted
from moe_ablm.files import all_or_none
from moe_ablm.verbs.writing import out_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GENES_SHOWN = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="a dataset")
    parser.add_argument(
        "--out",
        type=out_directory,
        metavar="DIR",
        help="directory of the figures (default: INPUT/figures)",
    )


def run(args: argparse.Namespace) -> None:
    dataset = Dataset(args.input)
    summary = summarise(dataset)
    console = Console(markup=False, emoji=False)
    console.print(_card(dataset))
    console.print(_counts(dataset.card))
    console.print(_chains(summary))
    console.print(_seen(summary))
    for warning in dataset.card.get("warnings", []):
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    for path in draw(summary, args.out or args.input / "figures"):
        print(path)


def _card(dataset: Dataset) -> Table:
    card = dataset.card
    table = Table(title=str(dataset.path), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    size = sum(s["bytes"] for s in card["shards"])
    shards = counted(len(card["shards"]), "shard")
    lines = {
        "rows": f"{card['rows']:,} in {shards}, {size / 2**20:,.0f} MiB",
        "sha256": card["sha256"],
        "licence": card.get("licence", "not stated"),
        "split": card.get("split_rule", "not stated"),
        "clusters": f"{card.get('clusters', 0):,} ({card.get('cluster_rule', 'not stated')})",
        "tokens": ", ".join(f"{n:,} residues in {c} chains" for c, n in card["residues"].items()),
    }
    if card.get("nearest_train_cdrh3"):
        near = card["nearest_train_cdrh3"]
        shares = ", ".join(f">= {level}: {share:.1%}" for level, share in near["share"].items())
        lines["nearest train CDRH3 of test"] = (
            f"median identity {near['median']:.3f}; {shares} (of {near['sampled']:,})"
        )
    for source in card.get("sources", []):
        counts = {name: source[name] for name in ("read", "kept", "joined") if source[name]}
        counts |= {f"rejected: {why}": rows for why, rows in source["rejected"].items()}
        counts |= {f"note: {why}": rows for why, rows in source["notes"].items()}
        lines[f"source {source['name']} ({source['format']})"] = "\n".join(
            f"{rows:,} {name}" for name, rows in counts.items()
        )
    for name, text in lines.items():
        table.add_row(name, text)
    return table


def _counts(card: dict) -> Table:
    table = Table(title="rows", title_justify="left")
    table.add_column("split")
    fractions = list(card["fractions"][SPLITS[0]])
    for fraction in fractions:
        table.add_column(fraction, justify="right")
    table.add_column("share", justify="right")
    for split in SPLITS:
        counts = [f"{card['fractions'][split][f]:,}" for f in fractions]
        table.add_row(split, *counts, f"{card['splits'][split] / card['rows']:.1%}")
    return table


def _chains(summary: Summary) -> Table:
    table = Table(title="chains", title_justify="left")
    table.add_column("")
    for chain in CHAINS:
        table.add_column(chain, justify="right")
    table.add_row("rows", *(f"{summary.chains[c]:,}" for c in CHAINS))
    table.add_row("different ones in train", *(f"{summary.different[c]:,}" for c in CHAINS))
    for name, label, form in (
        ("cdr3_length", "CDR3 length, mean", ".2f"),
        ("v_identity", "V identity, mean", ".4f"),
        ("unmutated", "unmutated V", ".1%"),
    ):
        means = [summary.means.get(c, {}).get(name) for c in CHAINS]
        table.add_row(label, *("-" if f is None else f"{f:{form}}" for f in means))
    top = [
        ", ".join(f"{g} {n / max(1, v.total()):.1%}" for g, n in v.most_common(3))
        for v in (summary.v_genes[c] for c in CHAINS)
    ]
    table.add_row("most used V", *top)
    return table


def _seen(summary: Summary) -> Table:
    table = Table(title="held-out chains that train has, too", title_justify="left")
    columns = {f: f"in {f}" for f in FRACTIONS} | {"unmutated": "unmutated ones, in full"}
    for heading in ("split", "chain"):
        table.add_column(heading)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for (split, chain), shares in summary.seen.items():
        cells = [f"{shares[c]:.1%}" if c in shares else "-" for c in columns]
        table.add_row(split, chain, *cells)
    return table


def draw(summary: Summary, out: Path) -> list[Path]:
    """Draws CDRH3 length by split, V gene usage and V identity by chain as PNG files into `out`."""
    figures = {
        "cdrh3_length": _draw_lengths(summary),
        "v_usage": _draw_genes(summary),
        "v_identity": _draw_identity(summary),
    }
    with all_or_none(out) as directory:
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")
    return [out / f"{name}.png" for name in figures]


def _draw_lengths(summary: Summary) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, counts in zip(SPLITS, summary.cdrh3_length, strict=True):
        if counts.sum():
            axes.step(np.arange(len(counts)), counts / counts.sum(), where="mid", label=name)
            axes.legend(frameon=False)
    axes.set(xlabel="CDRH3 length (residues)", ylabel="share of heavy chains")
    ticks = range(0, LONGEST_CDR3 + 1, 10)  # the last bin has the rest
    axes.set_xticks(ticks, [*map(str, ticks[:-1]), f"{LONGEST_CDR3} or more"])
    return figure


def _draw_genes(summary: Summary) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6))
    for axes, chain in zip(figure.subplots(1, 2), CHAINS, strict=True):
        genes = summary.v_genes[chain]
        top = genes.most_common(_GENES_SHOWN)[::-1]
        axes.barh([g or "none" for g, _ in top], [n / genes.total() for _, n in top])
        axes.set(xlabel=f"share of {chain} chains", title=f"V genes, {chain}")
        axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    return figure


def _draw_identity(summary: Summary) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for chain in CHAINS:
        counts = summary.identity[chain]
        if counts.sum():
            axes.stairs(counts / counts.sum(), IDENTITY_BINS, label=chain)
            axes.legend(frameon=False)
    axes.set(
        xlabel="V identity with germline (amino acids)", ylabel="share of chains", yscale="log"
    )
    first, *ticks = IDENTITY_BINS[::5]  # the first bin has the rest
    names = [f"below {IDENTITY_BINS[1]:.2f}", *(f"{tick:.2f}" for tick in ticks)]
    axes.set_xticks([first, *ticks], names)
    return figure
