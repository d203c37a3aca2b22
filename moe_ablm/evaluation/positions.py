"""Cross-entropy and accuracy of every residue with it alone masked, by region, chain and state.

Each position of held-out antibodies is masked in turn (Salazar et al. 2020, eq. 1). The
cross-entropy is minus the log-probability of the residue that is there, over all tokens; accuracy
is the share of residues that are the most probable token. Shown by FR and CDR, by chain, for
germline and mutated residues, by gene segment, for chains that training has and has not, and for
chains without and with mutations (Burbach & Briney 2024, Figure 1: the median of a region in each
antibody). Naturalness of an antibody is 1 / pseudo-perplexity.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ablm.data.regions import CDR3, CHAINS, REGIONS, SEGMENTS, region_names
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.estimates import DRAWS, Number, Sample, interval, resampled
from moe_ablm.evaluation.exact import Likelihoods, exact_likelihoods
from moe_ablm.evaluation.outcome import Outcome, Picture, Table
from moe_ablm.evaluation.subject import Subject

TITLE = "Per position"
STATES = ("unmutated", "mutated")  # of a chain: no residue of V or J is mutated, or at least one


@dataclass(frozen=True)
class Settings:
    """Antibodies drawn from the test split; each costs a pass over every one of its residues."""

    antibodies: int = 300


@dataclass(frozen=True, eq=False)
class Residues:
    """What is known of all residues, antibody by antibody, heavy chain first; arrays `[n]`.

    Attributes:
      owner: int64, number of the antibody.
      chain: index in `CHAINS`.
      region: index in `region_names`, -1 where not known.
      kind: "germline", "mutated", "CDR3" (whose mutations are not annotated), or "".
      segment: code of `SEGMENTS`.
      state: of the residue's chain, of `STATES`, or "" where it is not known.
    """

    owner: np.ndarray
    chain: np.ndarray
    region: np.ndarray
    kind: np.ndarray
    segment: np.ndarray
    state: np.ndarray


def evaluate(subject: Subject, settings: Settings) -> Outcome:
    """Means by group with every antibody's part, medians by region, and letter-value plots."""
    everyone, notes = subject.antibodies(settings.antibodies)
    likelihoods, rate = exact_likelihoods(subject, everyone)
    residues = known_of(everyone)
    notes += [rate, *_lacking(residues)]
    units = [a.unit for a in everyone]
    samples = naturalness(units, residues, likelihoods)
    for labels, inside in groups(residues):
        samples += _samples(units, residues.owner, likelihoods, labels, inside)
    seen, note = subject.seen(everyone)
    notes.append(note)
    for labels, inside in seen_groups(residues, seen):
        samples += _samples(units, residues.owner, likelihoods, labels, inside)
    medians = region_medians(units, residues, likelihoods)
    pictures = []
    if medians:
        if not has_seaborn():
            notes.append(
                "box plots instead of letter-value plots: seaborn is missing "
                "(pip install 'moe_ablm[eval]')"
            )
        pictures = [Picture("medians", _CAPTION, lambda: _drawn(medians))]
    numbers = [
        median_number("median_cross_entropy", [units[i] for i in owners], values, labels, "nats")
        for labels, owners, values in medians
    ]
    return Outcome(samples, numbers, TABLES, pictures, notes)


TABLES = (
    Table("Cross-entropy (nats) by region", ("cross_entropy",), ("region",), "chains"),
    Table("Accuracy by region", ("accuracy",), ("region",), "chains"),
    Table(
        "Median over antibodies of the region's median cross-entropy (nats)",
        ("median_cross_entropy",),
        ("region",),
        "chains",
    ),
    Table("Germline and mutated residues", ("cross_entropy", "accuracy"), ("chain", "residues")),
    Table(
        "Likelihood at mutated residues, of the residue that is there and of the germline's",
        ("likelihood", "germline_likelihood"),
        ("chain",),
        where=(("residues", "mutated"),),
    ),
    Table(
        "Chains that training has (seen) and has not",
        ("cross_entropy", "accuracy"),
        ("chain", "training"),
    ),
    Table("By gene segment", ("cross_entropy", "accuracy"), ("chain", "segment")),
    Table("Naturalness, 1 / pseudo-perplexity", ("naturalness",), ("antibodies",)),
)
_CAPTION = (
    "Median cross-entropy of each region in each antibody with every position masked in turn, for "
    "chains without a mutation of V or J and with at least one."
)


def known_of(everyone: Sequence[Annotated]) -> Residues:
    """All residues of antibodies.

    Without a region a chain was not annotated: neither is its state known, nor the kind of its
    residues. Where no chain at all is mutated, the germline is taken as not known.
    """
    owner = np.repeat(np.arange(len(everyone)), [a.antibody.residues for a in everyone])
    chains = [(name, chain) for a in everyone for name, chain in a.chains()]
    lengths = [len(chain) for _, chain in chains]
    codes = [np.concatenate([a.along(c) for a in everyone]) for c in ("region", "segment")]
    mutated = np.concatenate([a.along("mutated") for a in everyone]) > 0
    states = ["" if not c.region.any() else STATES[c.mutations > 0] for _, c in chains]
    kind = np.select(
        [codes[0] == 0, codes[0] == CDR3, mutated], ["", "CDR3", "mutated"], "germline"
    )
    state = np.repeat(states, lengths)
    if not mutated.any():
        kind, state = np.full_like(kind, ""), np.full_like(state, "")
    return Residues(
        owner,
        np.repeat([CHAINS.index(name) for name, _ in chains], lengths),
        np.concatenate([a.region_index() for a in everyone]),
        kind,
        codes[1],
        state,
    )


def _lacking(residues: Residues) -> Iterator[str]:
    for number, chain in enumerate(CHAINS):
        if not (residues.chain == number).any():
            yield f"no {chain} chains: left out"
    if not (residues.region >= 0).any():
        yield "the dataset has no regions: left out (prepare it with annotation)"
    if not (residues.state != "").any():
        yield (
            "no residue is mutated: the dataset has no germline (prepare it with annotation), or "
            "its antibodies are all unmutated; mutations are left out"
        )
    if not residues.segment.any():
        yield "gene segments are not known (they are of simulated antibodies): left out"


def groups(residues: Residues) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """(labels, mask `[n]`) of all groups of residues."""
    yield {"region": "all", "chains": "all"}, np.ones(len(residues.owner), bool)
    states = {"all": np.ones(len(residues.owner), bool)}
    states |= {state: residues.state == state for state in STATES}
    for number, region in enumerate(region_names()):
        for state, inside in states.items():
            yield {"region": region, "chains": state}, inside & (residues.region == number)
    for number, chain in enumerate(CHAINS):
        own = residues.chain == number
        yield {"chain": chain, "residues": "all"}, own
        for kind in ("germline", "mutated", REGIONS[CDR3]):
            yield {"chain": chain, "residues": kind}, own & (residues.kind == kind)
        for code, segment in enumerate(SEGMENTS[1:], start=1):
            yield {"chain": chain, "segment": segment}, own & (residues.segment == code)


def seen_groups(
    residues: Residues, seen: np.ndarray
) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """(labels, mask `[n]`) of the residues of chains that are seen, bool `[antibodies, 2]`."""
    its = seen[residues.owner, residues.chain]
    for number, chain in enumerate(CHAINS):
        own = residues.chain == number
        yield {"chain": chain, "training": "seen"}, own & its
        yield {"chain": chain, "training": "unseen"}, own & ~its


def _samples(
    units: Sequence[str],
    owner: np.ndarray,
    likelihoods: Likelihoods,
    labels: Mapping[str, str],
    inside: np.ndarray,
) -> list[Sample]:
    """Means over the residues of a group; none where it is empty."""
    values = {"cross_entropy": -likelihoods.log_likelihood, "accuracy": likelihoods.right}
    if labels.get("residues") == "mutated":
        values["likelihood"] = np.exp(likelihoods.log_likelihood)
        values["germline_likelihood"] = np.exp(likelihoods.germline)
    at, n = owner[inside], len(units)
    weight = np.bincount(at, minlength=n).astype(float)
    return [
        Sample(
            metric,
            units,
            np.bincount(at, per_residue[inside], n),
            weight,
            labels,
            unit="nats" if metric == "cross_entropy" else "share",
        )
        for metric, per_residue in values.items()
        if len(at)
    ]


def naturalness(units: Sequence[str], residues: Residues, likelihoods: Likelihoods) -> list[Sample]:
    """Mean of exp(mean log-likelihood of an antibody), of all, and without and with mutations."""
    n = len(units)
    sums = np.bincount(residues.owner, likelihoods.log_likelihood, n)
    natural = np.exp(sums / np.bincount(residues.owner, minlength=n))
    mutated = np.bincount(residues.owner, residues.kind == "mutated", n) > 0
    unknown = np.bincount(residues.owner, residues.state == "", n) > 0
    members = {"all": np.ones(n, bool)}
    members |= {"unmutated": ~mutated & ~unknown, "mutated": mutated & ~unknown}
    return [
        Sample(
            "naturalness",
            units,
            np.where(inside, natural, 0),
            inside.astype(float),
            {"antibodies": name},
            unit="share",
        )
        for name, inside in members.items()
        if inside.any()
    ]


def region_medians(
    units: Sequence[str], residues: Residues, likelihoods: Likelihoods
) -> list[tuple[dict[str, str], np.ndarray, np.ndarray]]:
    """(labels, antibodies, the median cross-entropy of each) by region and state of the chain."""
    states = [state for state in STATES if (residues.state == state).any()]
    groups = []
    for state in states or [""]:
        for number, region in enumerate(region_names()):
            inside = (residues.region == number) & (residues.state == state)
            if inside.any():
                owners, values = group_medians(
                    residues.owner[inside], -likelihoods.log_likelihood[inside]
                )
                groups.append(({"region": region, "chains": state or "all"}, owners, values))
    return groups


def _drawn(medians: Sequence[tuple[dict[str, str], np.ndarray, np.ndarray]]) -> Figure:
    named = {labels["region"] for labels, *_ in medians}
    regions = [name for name in region_names() if name in named]
    panels: dict[str, dict[str, np.ndarray]] = {}
    for labels, _, values in medians:
        empty = dict.fromkeys(regions, np.zeros(0))
        panels.setdefault(f"{labels['chains']} chains", empty)[labels["region"]] = values
    return letter_values(panels, "median cross-entropy (nats)")


def group_medians(groups: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups that have values (ascending), and the median of each.

    Args:
      groups: int `[n]`.
      values: float `[n]`.
    """
    order = np.lexsort((values, groups))
    names, first, count = np.unique(groups[order], return_index=True, return_counts=True)
    ordered = values[order]
    return names, (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2


def median_number(
    metric: str,
    units: Sequence[str],
    values: np.ndarray,
    labels: Mapping[str, str],
    unit: str,
    draws: int = DRAWS,
) -> Number:
    """Median over antibodies, with an interval by drawing their clonal clusters again.

    Args:
      metric, labels, unit: as of `Number`.
      units: clonal cluster of each antibody.
      values: float `[n]`, one an antibody.
      draws: of the bootstrap.
    """
    index, counts = resampled(units, draws)
    order = np.argsort(values, kind="stable")
    # every draw repeats values: the median is the middle one, or the mean of the two middle
    ends = counts.astype(np.int32)[:, index[order]].cumsum(1)
    middle = [
        (ends > rank[:, None]).argmax(1) for rank in ((ends[:, -1] - 1) // 2, ends[:, -1] // 2)
    ]
    low, high = interval(values[order][np.stack(middle)].mean(0))
    return Number(metric, float(np.median(values)), labels, low, high, len(values), unit)


def letter_values(panels: Mapping[str, Mapping[str, np.ndarray]], axis_label: str) -> Figure:
    """Letter-value plots, or box plots where seaborn is missing.

    Args:
      panels: `{title: {name: values}}`, a panel each; names are the same in all.
      axis_label: with unit.
    """
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)
    for axis, (title, groups) in zip(axes[:, 0], panels.items(), strict=True):
        _draw(axis, groups)
        axis.set(title=title, ylabel=axis_label)
    axes[0, 0].set_ylim(0, None)  # of all panels; set before all are drawn it would be the first's
    return figure


def has_seaborn() -> bool:
    """Whether letter-value plots can be drawn."""
    return importlib.util.find_spec("seaborn") is not None


def _draw(axis: Axes, groups: Mapping[str, np.ndarray]) -> None:
    names = list(groups)
    if not has_seaborn():
        axis.boxplot([groups[name] for name in names], sym=".", manage_ticks=False)
        axis.set_xticks(range(1, len(names) + 1), names)
        return
    import seaborn

    group = np.repeat(names, [len(groups[name]) for name in names])
    values = np.concatenate([groups[name] for name in names])
    colours = ["#4477aa" if "H" in name else "#cc6677" for name in names]
    seaborn.boxenplot(
        x=group, y=values, order=names, hue=group, hue_order=names, palette=colours, ax=axis,
        legend=False, flier_kws={"s": 4},
    )  # fmt: skip
    axis.set_xlabel("")
