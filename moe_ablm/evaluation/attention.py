"""Cross-chain attention: do the residues of one chain look at the CDRs of the other?

The attention that a residue receives is the mean, over the residues of the other chain, of their
attention to it, averaged over the heads of a layer. Of it, `cdr_over_fr` is the mean over CDR
residues over the mean over FR residues, and `cdr_over_all` the share of all attention that CDRs
receive over their share of residues (Burbach & Briney 2024, Patterns 5:100967, figure 4A and
"Analysis of cross-chain attention", where it is 2.05 of ft-ESM and 1.44 of BALM-paired). Sums are
over all antibodies before they are divided. CDRs receive attention whatever the partner is. So the
same numbers are given for the same chains with random partners, and `native_over_random`, the
quotient of the two `cdr_over_fr`, is what native pairing adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.data.antibody import Antibody, tokens_of
from moe_ablm.data.readers import Reading, open_sources
from moe_ablm.data.readers.rows import header_of
from moe_ablm.data.regions import CDR3, CHAINS, FR4, REGIONS, region_names
from moe_ablm.errors import UserError, counted
from moe_ablm.evaluation.cohort import Annotated, Chain
from moe_ablm.evaluation.estimates import Number, Sample, derived, ratio
from moe_ablm.evaluation.outcome import Outcome, Picture, Skipped, Table
from moe_ablm.evaluation.subject import Subject, require_regions
from moe_ablm.inference.antibodies import LETTERS, read
from moe_ablm.inference.attention import CrossAttention, mean_attention, needs_both
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.heatmap import figure_path
from moe_ablm.inference.score import regions

TITLE = "Cross-chain attention"
# chains that receive it
DIRECTIONS = {"both": (0, 1), "light to heavy": (0,), "heavy to light": (1,)}
CDR, FR = (2, 4, 6), (1, 3, 5, 7)  # indices of REGIONS
NATIVE, RANDOM = "native", "random"
Formula = Callable[[np.ndarray], np.ndarray]  # of sums over antibodies
TABLES = (
    Table(
        "Attention to CDRs, relative to FRs and to all residues",
        ("cdr_over_fr", "cdr_over_all"),
        ("direction", "partner"),
    ),
    Table(
        "Attention to CDRs: native over random partners", ("native_over_random",), ("direction",)
    ),
    Table(
        "Attention to each CDR over that to all FRs", ("each_cdr_over_fr",), ("region",), "partner"
    ),
    Table(
        "Attention to each region over the mean of its chain",
        ("region_over_chain",),
        ("region",),
        "partner",
    ),
    Table(
        "Attention to cysteines over others", ("cysteine_over_other",), ("direction",), "partner"
    ),
    Table(
        "Share of attention that crosses chains", ("cross_chain_share",), ("direction",), "partner"
    ),
)


@dataclass(frozen=True)
class Settings:
    """Pairs drawn from the test split; layer, from 0 or, if negative, from the last one."""

    antibodies: int = 1000
    layer: int = -1


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Attention to CDRs, FRs, each region and cysteines, with native and with random partners."""
    members, notes = subject.antibodies(settings.antibodies, paired=True)
    require_regions(members)
    maps, map_notes = heat_maps(subject)
    engine, n = subject.engine, len(members)
    sums = {NATIVE: attention_sums(engine, members, np.arange(n), settings.layer)}
    if n > 1:
        drawn = random_partners(subject.generator("random partners"), n)
        sums[RANDOM] = attention_sums(engine, members, drawn, settings.layer)
        if missing := int((sums[RANDOM][:, 0, ..., 1].sum((1, 2)) == 0).sum()):
            notes.append(f"{missing:,} pairs with a random partner are too long: left out")
    else:
        notes.append("one pair only: no random partners")
    units = [a.unit for a in members]
    notes.append(f"{n:,} pairs")
    numbers = _numbers(units, sums)
    picture = Picture(
        "attention",
        "Attention to CDRs over that to frameworks, and of each region relative to the mean of its "
        "chain, with native and with random partners (95 % intervals)",
        lambda: draw_ratios(numbers),
    )
    return Outcome(_samples(units, sums), numbers, TABLES, [picture, *maps], [*notes, *map_notes])


def random_partners(rng: np.random.Generator, n: int) -> np.ndarray:
    """Whose light chain each heavy chain gets: a random cycle, int64 `[n]`; never its own."""
    cycle = rng.permutation(n)
    partner = np.empty(n, np.int64)
    partner[cycle] = np.roll(cycle, 1)
    return partner


def attention_sums(
    engine: Engine, members: Sequence[Annotated], partner: np.ndarray, layer: int
) -> np.ndarray:
    """What the chains of each antibody receive from their partners.

    Args:
      engine: the model.
      members: pairs.
      partner: int64 `[n]`, whose light chain each heavy one is with.
      layer: see `inference.attention`.

    Returns:
      float64 `[n, 2, 8, 2, 2]`: chain that receives, region, other residues or cysteines; sum of
      the attention received, residues. 0 where a pair is longer than the model was trained for.
    """
    pairs = [
        (i, j, Antibody(members[i].name, members[i].heavy.letters, members[j].light.letters))
        for i, j in enumerate(partner.tolist())
    ]
    model = engine.model
    pairs = [pair for pair in pairs if tokens_of(pair[2], model.layout) <= model.length]
    sums = np.zeros((len(members), len(CHAINS), len(REGIONS), 2, 2))
    for index, cross in mean_attention(engine, [antibody for *_, antibody in pairs], layer):
        heavy, light, _ = pairs[index]
        to_heavy, to_light = received(cross)
        sums[heavy, 0] = chain_sums(members[heavy].heavy, to_heavy)
        sums[light, 1] = chain_sums(members[light].light, to_light)
    return sums


def received(cross: CrossAttention) -> tuple[np.ndarray, np.ndarray]:
    """Attention that the residues of heavy and light chain receive, float64 `[n]` each."""
    to_heavy, to_light = cross.light_to_heavy, cross.heavy_to_light
    return to_heavy.mean(0, dtype=np.float64), to_light.mean(0, dtype=np.float64)


def chain_sums(chain: Chain, attention: np.ndarray) -> np.ndarray:
    """Attention and residues by region and by cysteine or not, float64 `[8, 2, 2]`."""
    cysteine = np.frombuffer(chain.letters.encode(), np.uint8) == ord("C")
    cell = chain.region.astype(int) * 2 + cysteine
    size = 2 * len(REGIONS)
    totals = np.bincount(cell, attention, size), np.bincount(cell, minlength=size)
    return np.stack(totals, axis=-1).reshape(len(REGIONS), 2, 2)


def attention_per_residue(
    sums: np.ndarray, chains: Sequence[int], regions: Sequence[int]
) -> np.ndarray:
    """Mean attention that residues of some chains and regions receive.

    Args:
      sums: `[..., 2, 8, 2, 2]`, see `attention_sums`.
      chains: that receive it.
      regions: indices of `REGIONS`.
    """
    part = sums[..., list(chains), :, :, :][..., list(regions), :, :].sum((-4, -3, -2))
    return ratio(part[..., 0], part[..., 1])


def cdr_over_fr(sums: np.ndarray, chains: Sequence[int]) -> np.ndarray:
    """Attention a residue of CDRs, over that a residue of FRs."""
    return ratio(*(attention_per_residue(sums, chains, regions) for regions in (CDR, FR)))


def cysteine_over_other(sums: np.ndarray, chains: Sequence[int]) -> np.ndarray:
    """Attention a cysteine, over that any other residue."""
    part = sums[..., list(chains), :, :, :].sum((-4, -3))
    other, cysteine = np.moveaxis(ratio(part[..., 0], part[..., 1]), -1, 0)
    return ratio(cysteine, other)


def _numbers(units: Sequence[str], sums: dict[str, np.ndarray]) -> list[Number]:
    numbers = []
    for partner, table in sums.items():
        for labels, formulas in _formulas():
            about = labels | {"partner": partner}
            numbers += [derived(m, units, table, f, about) for m, f in formulas.items()]
    if RANDOM not in sums:
        return numbers
    # of the same residues: without chains that have no random partner
    there = sums[RANDOM][..., 1].sum((2, 3))[..., None, None, None] > 0
    both = np.stack([sums[NATIVE] * there, sums[RANDOM]], axis=1)
    for direction, chains in DIRECTIONS.items():

        def gain(s: np.ndarray, chains: Sequence[int] = chains) -> np.ndarray:
            native, random = np.moveaxis(cdr_over_fr(s, chains), -1, 0)
            return ratio(native, random)

        numbers.append(derived("native_over_random", units, both, gain, {"direction": direction}))
    return numbers


def _formulas() -> list[tuple[dict[str, str], dict[str, Formula]]]:
    """(labels, functions of sums by metric), the same for native and random partners."""

    def over(chains: Sequence[int], regions: Sequence[int], *to: Sequence[int]) -> Formula:
        return lambda s: ratio(
            attention_per_residue(s, chains, regions), attention_per_residue(s, *to)
        )

    labelled: list[tuple[dict[str, str], dict[str, Formula]]] = []
    for direction, chains in DIRECTIONS.items():
        formulas: dict[str, Formula] = {
            "cdr_over_fr": partial(cdr_over_fr, chains=chains),
            "cdr_over_all": over(chains, CDR, chains, CDR + FR),
            "cysteine_over_other": partial(cysteine_over_other, chains=chains),
        }
        labelled.append(({"direction": direction}, formulas))
    for number, name in enumerate(region_names()):
        chain, region = (number // FR4,), (number % FR4 + 1,)
        formulas = {"region_over_chain": over(chain, region, chain, CDR + FR)}
        if region[0] in CDR:
            formulas["each_cdr_over_fr"] = over(chain, region, (0, 1), FR)
        labelled.append(({"region": name}, formulas))
    return labelled


def _samples(units: Sequence[str], sums: dict[str, np.ndarray]) -> list[Sample]:
    """Attention by region, and the share of a residue's attention that goes to the other chain."""
    samples = []
    for partner, table in sums.items():
        by_region = table.sum(3)
        parts = {name: by_region[:, i // FR4, i % FR4 + 1] for i, name in enumerate(region_names())}
        for name, some in (("CDR", CDR), ("FR", FR)):
            parts[name] = by_region[:, :, list(some)].sum((1, 2))
        samples += [
            Sample(
                "attention_per_residue",
                units,
                part[:, 0],
                part[:, 1],
                {"region": name, "partner": partner},
            )
            for name, part in parts.items()
        ]
        for chain, direction in enumerate(tuple(DIRECTIONS)[1:]):
            total, residues = by_region[:, chain].sum(1).T
            about = {"direction": direction, "partner": partner}
            samples.append(
                Sample(
                    "cross_chain_share", units, total, np.minimum(residues, 1), about, unit="share"
                )
            )
    return samples


COLOURS = {"native": "#33658a", "random": "#b7b7b7"}


def draw_ratios(numbers: Sequence[Number]) -> Figure:
    """CDR over FR by direction, and each region over the mean of its chain; by partner."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(1, 3))
    _bars(axes[0], [n for n in numbers if n.metric == "cdr_over_fr"], "direction")
    axes[0].set(ylabel="attention a CDR residue / an FR residue")
    _bars(axes[1], [n for n in numbers if n.metric == "region_over_chain"], "region")
    axes[1].set(ylabel="attention a residue / mean of the chain")
    axes[1].legend(title="partner")
    return figure


def _bars(axis: Axes, numbers: Sequence[Number], label: str) -> None:
    names = list(dict.fromkeys(n.labels[label] for n in numbers))
    partners = list(dict.fromkeys(n.labels["partner"] for n in numbers))
    width = 0.8 / len(partners)
    for i, partner in enumerate(partners):
        mine = [n for n in numbers if n.labels["partner"] == partner]
        x = np.array([names.index(n.labels[label]) for n in mine]) + (i + 0.5) * width - 0.4
        value, low, high = (
            np.array([getattr(n, k) for n in mine]) for k in ("value", "low", "high")
        )
        ends = np.nan_to_num(np.abs([value - low, high - value]))
        axis.bar(x, value, width, yerr=ends, color=COLOURS[partner], capsize=2, label=partner)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")


# columns of Thera-SAbDab
THERAPEUTIC = {"heavy": "Heavy Sequence", "light": "Light Sequence", "id": "Therapeutic"}
MOST = 12  # figures
BRIGHTEST = 0.995  # quantile of the weights at which the colours end


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention between the residues of an antibody; `regions [n]`: see `inference.score`."""

    antibody: Antibody
    attention: CrossAttention
    regions: np.ndarray


def heat_maps(subject: Subject) -> tuple[list[Picture], list[str]]:
    """A picture for each antibody of the files "therapeutic", and notes.

    Raises:
      UserError: a file cannot be read.
    """
    try:
        files = subject.files_of("therapeutic")
    except Skipped as skipped:
        return [], [f"no heat maps: {skipped}"]
    antibodies, notes = named_antibodies(subject, files)
    if len(antibodies) > MOST:
        notes.append(f"heat maps of the first {MOST} of {len(antibodies):,} named antibodies")
        antibodies = antibodies[:MOST]
    attention = dict(mean_attention(subject.engine, antibodies))
    cells = regions(antibodies) if antibodies else []
    pictures = []
    for number, (antibody, known) in enumerate(zip(antibodies, cells, strict=True)):
        if (known < 0).all():
            notes.append(f"{antibody.name}: no V domain was recognised: CDRs are not marked")
        drawn = AttentionMap(antibody, attention[number], known)
        name = f"heatmap-{figure_path(Path(), antibody).stem}"
        caption = f"{antibody.name}: cross-chain attention, mean over all layers and heads"
        pictures.append(Picture(name, caption, partial(draw_map, drawn)))
    return pictures, notes


def named_antibodies(subject: Subject, files: tuple[Path, ...]) -> tuple[list[Antibody], list[str]]:
    """Pairs of files that the readers know or with the columns of Thera-SAbDab, and notes.

    Raises:
      UserError: a file is none of those.
    """
    antibodies: list[Antibody] = []
    notes = []
    for path in files:
        known = set(THERAPEUTIC.values()) <= set(header_of(path))
        columns = THERAPEUTIC if known else None
        sources = open_sources(
            [str(path)], on_bad_row="skip", letters=LETTERS, reading=Reading(columns)
        )
        if sources[0].is_protein:
            raise UserError(
                f"--data therapeutic={path}: proteins; give antibodies with both chains"
            )
        model = subject.engine.model
        antibodies += read(sources, model.layout, model.length, needs_both)
        notes += [
            f"{path.name}: {counted(rows, 'row')} left out: {reason}"
            for reason, rows in sources[0].report.rejected.items()
        ]
    return antibodies, notes


def draw_map(drawn: AttentionMap) -> Figure:
    """Heavy residues down, light ones across; a panel a direction, CDRs between lines."""
    to_light, to_heavy = drawn.attention.heavy_to_light, drawn.attention.light_to_heavy.T
    heavy = len(drawn.antibody.heavy)
    ends = float(np.quantile([*to_light.ravel(), *to_heavy.ravel()], BRIGHTEST))
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, weights, title in (
        (axes[0], to_light, "heavy to light"),
        (axes[1], to_heavy, "light to heavy"),
    ):
        image = axis.imshow(weights, cmap="magma", vmin=0, vmax=ends, aspect="auto")
        axis.set(title=title, xlabel="light chain", ylabel="heavy chain")
        _mark(axis.set_yticks, axis.axhline, drawn.regions[:heavy])
        _mark(axis.set_xticks, axis.axvline, drawn.regions[heavy:])
        axis.tick_params(axis="x", rotation=45)
    figure.suptitle(drawn.antibody.name)
    figure.colorbar(image, ax=axes, label="attention (share of a residue's)", shrink=0.7)
    return figure


def _mark(ticks, line, regions: np.ndarray) -> None:
    """Names the CDRs of a chain and draws lines where they begin and end."""
    at, names = [], []
    for number in np.unique(regions[regions >= 0]).tolist():
        inside = np.flatnonzero(regions == number)
        if (number % FR4 + 1) % 2 == 0 and number % FR4 + 1 <= CDR3:
            at.append(inside.mean())
            names.append(region_names()[number])
            for edge in (inside[0] - 0.5, inside[-1] + 0.5):
                line(edge, color="white", linewidth=0.6, alpha=0.8)
    ticks(at, names)
