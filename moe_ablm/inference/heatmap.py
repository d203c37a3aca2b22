"""A scan as a heat map: amino acids by positions, one panel per chain."""

import hashlib
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.files import replacing

ORDER = "AVILMGPCSTNQDEHKRFWY"  # of rows, by chemistry: aliphatic, small, polar, charged, aromatic
LONGEST_NAME = 80  # letters of the antibody's name in a file name


def figure_path(directory: Path, antibody: Antibody) -> Path:
    """File name from the antibody's id and a hash of its chains; no id can leave the directory."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", antibody.name)[:LONGEST_NAME]
    digest = hashlib.sha256(f"{antibody.heavy}|{antibody.light}".encode()).hexdigest()
    return directory / f"{name}-{digest[:8]}.png"


def draw_scan(antibody: Antibody, scores: np.ndarray, method: str, path: Path) -> None:
    """Draws `scores [residues, 20]` of `scan.scan`; dots mark the wild type, grey missing scores.

    The file is written atomically.
    """
    chains = antibody.chains()
    limit = max(float(np.nanmax(np.abs(scores), initial=0.0)), 1e-6)
    width = 2 + 0.11 * max(len(letters) for _, letters in chains)
    figure = Figure(figsize=(width, 3.2 * len(chains)), layout="constrained")
    axes = figure.subplots(len(chains), 1, squeeze=False)
    parts = np.split(scores, np.cumsum([len(letters) for _, letters in chains])[:-1])
    for axis, (chain, letters), part in zip(axes[:, 0], chains, parts, strict=True):
        image = part[:, [AMINO_ACIDS.index(letter) for letter in ORDER]].T
        colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.8")
        drawn = axis.imshow(image, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        wild = [(i, ORDER.index(letter)) for i, letter in enumerate(letters) if letter in ORDER]
        if wild:
            axis.plot(*np.array(wild).T, "k.", markersize=2)
        axis.set_yticks(range(len(ORDER)), ORDER, fontsize=6)
        ticks = range(9, len(letters), 10)
        axis.set_xticks(ticks, [i + 1 for i in ticks], fontsize=7)
        axis.set(title=f"{antibody.name}, {chain}", xlabel="position", ylabel="mutant")
    figure.colorbar(drawn, ax=axes, label=f"log-odds, {method}", shrink=0.7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
