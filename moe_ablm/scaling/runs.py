"""A checked table of runs: columns by role, cells of one config, clusters of one run."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.inputs import INPUTS

# settings that are tuned: runs that differ are no seeds
TUNED = ("lr", "batch", "weight_decay", "dropout")
MODEL = ("params", "total_params", "experts", "granularity", "sparsity", "router")
SAME_TOKENS = 2e-3  # seeds of one config differ by less: their sequences have other lengths


@dataclass(frozen=True)
class Runs:
    """`n` runs: columns by role, each `[n]`, in natural units (counts, nats).

    `covariates` are settings that laws know: they tell configs apart, and none of them is the best.
    """

    columns: Mapping[str, np.ndarray]
    source: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    data_unit: str = "tokens"
    covariates: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def __getitem__(self, role: str) -> np.ndarray:
        return self.columns[role]

    def digest(self) -> str:
        """SHA-256 of the columns: two fits of the same rows have the same."""
        made = hashlib.sha256()
        for role in sorted(self.columns):
            made.update(f"{role}\0".encode())
            made.update("\0".join(map(str, self.columns[role].tolist())).encode())
        return made.hexdigest()

    def take(self, index: np.ndarray) -> "Runs":
        """The runs at `index` (integers or a mask)."""
        index = np.arange(len(self))[index]
        columns = {k: v[index] for k, v in self.columns.items()}
        source = tuple(self.source[i] for i in index)
        return replace(self, columns=columns, source=source)

    def inputs(self) -> dict[str, np.ndarray]:
        """The columns that a prediction may depend on."""
        return {k: v for k, v in self.columns.items() if k in INPUTS}

    def cells(self) -> np.ndarray:
        """An integer per run, equal for runs of one config (replicates), `[n]`.

        The model is the same to the digit. Tokens seen and unique are counted from sequences and
        differ a little between seeds: they are the same within .2 %. FLOPs stand in for tokens
        where these are not known.
        """
        same = np.zeros(len(self), int)
        for role in (*MODEL, *self.covariates):
            if role in self.columns:
                values = np.unique(self.columns[role], return_inverse=True)[1].reshape(-1)
                same = numbered(same * (values.max() + 1) + values)
        seen = "tokens" if "tokens" in self.columns else "flops"
        for role in (seen, "unique_tokens"):
            if role in self.columns:
                same = within(same, np.log(self.columns[role].astype(float)))
        return same

    def clusters(self) -> np.ndarray | None:
        """The run of each row `[n]`, counted from 0; None where every row is a run of its own."""
        if "run" not in self.columns:
            return None
        run = np.unique(self.columns["run"], return_inverse=True)[1].reshape(-1)
        return None if run.max() + 1 == len(self) else run

    def linked_cells(self) -> np.ndarray:
        """An integer per run, equal for rows whose runs share a cell, `[n]`.

        Left out of a fit together: a checkpoint tells the loss of the next one of its run, and of
        the same checkpoint of another seed. Without checkpoints these are the cells.
        """
        cells, run = self.cells(), self.clusters()
        return cells if run is None else _linked(run, cells)

    def flops(self) -> np.ndarray:
        """FLOPs of each run: as given, else 6 N D."""
        if "flops" in self.columns:
            return self.columns["flops"]
        return 6.0 * self.columns["params"] * self.columns["tokens"]

    def require(self, names: Sequence[str], law: str) -> None:
        """Raises UserError where the law needs a column that the table lacks."""
        missing = [n for n in names if n not in self.columns]
        if missing:
            raise UserError(
                f"law {law} needs the column '{missing[0]}' and the input has "
                f"{', '.join(self.columns)}; map it with --columns {missing[0]}=NAME"
            )


def numbered(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def within(same: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Parts of the groups `same` whose values lie within `SAME_TOKENS` of their smallest."""
    order = np.lexsort((value, same))
    out = np.empty(same.size, int)
    label, first, before = -1, np.inf, -1
    for i in order:
        if same[i] != before or value[i] - first > SAME_TOKENS:
            label, first, before = label + 1, value[i], same[i]
        out[i] = label
    return out


def _linked(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Connected components `[n]` of rows that share a label of either kind."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    left, right = one.max() + 1, other.max() + 1
    edges = coo_matrix((np.ones(one.size), (one, left + other)), shape=(left + right,) * 2)
    return connected_components(edges, directed=False)[1][one]


def best_settings(runs: Runs) -> Runs:
    """The runs of each cell's best setting of what is tuned and no covariate; the others dropped.

    Runs of one cell that differ in these are not replicates: their spread is that of the tuning.
    Best is the setting with the lowest mean loss over its runs.
    """
    tuned = [role for role in TUNED if role in runs and role not in runs.covariates]
    if not tuned or "loss" not in runs:
        return runs
    cells = runs.cells()
    setting = np.zeros(len(runs), int)
    for role in tuned:
        values = numbered(runs[role])
        setting = numbered(setting * (values.max() + 1) + values)
    pair = numbered(cells * (setting.max() + 1) + setting)
    mean = (np.bincount(pair, np.log(runs["loss"])) / np.bincount(pair))[pair]
    lowest = np.full(cells.max() + 1, np.inf)
    np.minimum.at(lowest, cells, mean)
    keep = mean <= lowest[cells]
    if keep.all():
        return runs
    named = ", ".join(tuned)
    reason = f"not the best {named} of its cell"
    tried = np.unique(np.stack([cells, setting]), axis=1)[0]
    note = (
        f"{tried.size} settings of {named} in {np.unique(cells).size} cells: the best of each cell "
        "counts; the lowest of several noisy losses is a little low"
    )
    kept = runs.take(keep)
    gone = tuple((runs.source[i], reason) for i in np.flatnonzero(~keep))
    return replace(kept, dropped=(*runs.dropped, *gone), notes=(*runs.notes, note))
