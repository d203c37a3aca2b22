"""Heat maps of cross-chain attention of named antibodies, over all layers and heads."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers import open_sources
from moe_ablm.data.readers.rows import header_of
from moe_ablm.data.regions import CDR3, FR4, region_names
from moe_ablm.errors import UserError
from moe_ablm.evaluation.outcome import Picture, Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.antibodies import LETTERS, read
from moe_ablm.inference.attention import CrossAttention, mean_attention, needs_both
from moe_ablm.inference.heatmap import figure_path
from moe_ablm.inference.score import regions

# columns of Thera-SAbDab
THERAPEUTIC = {"heavy": "Heavy Sequence", "light": "Light Sequence", "id": "Therapeutic"}
MOST = 12  # figures
BRIGHTEST = 0.995  # quantile of the weights at which the colours end


@dataclass(frozen=True, eq=False)
class Map:
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
        drawn = Map(antibody, attention[number], known)
        name = f"heatmap-{figure_path(Path(), antibody).stem}"
        caption = f"{antibody.name}: cross-chain attention, mean over all layers and heads"
        pictures.append(Picture(name, caption, lambda drawn=drawn: draw_map(drawn)))
    return pictures, notes


def named_antibodies(subject: Subject, files: tuple[Path, ...]) -> tuple[list[Antibody], list[str]]:
    """Pairs of files that the readers know or with the columns of Thera-SAbDab, and notes.

    Raises:
      UserError: a file is none of those.
    """
    antibodies, notes = [], []
    for path in files:
        known = set(THERAPEUTIC.values()) <= set(header_of(path))
        columns = THERAPEUTIC if known else None
        sources = open_sources([str(path)], columns=columns, on_bad_row="skip", letters=LETTERS)
        if sources[0].is_protein:
            raise UserError(
                f"--data therapeutic={path}: proteins; give antibodies with both chains"
            )
        model = subject.engine.model
        antibodies += read(sources, model.layout, model.length, needs_both)
        notes += [
            f"{path.name}: {rows:,} rows left out: {reason}"
            for reason, rows in sources[0].report.rejected.items()
        ]
    return antibodies, notes


def draw_map(drawn: Map) -> Figure:
    """Heavy residues down, light ones across; a panel a direction, CDRs between lines."""
    to_light, to_heavy = drawn.attention.heavy_to_light, drawn.attention.light_to_heavy.T
    heavy = len(drawn.antibody.heavy)
    ends = float(np.quantile([*to_light.ravel(), *to_heavy.ravel()], BRIGHTEST))
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
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
