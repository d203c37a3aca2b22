"""Parabolas through groups of runs, and their minima.

Each parabola is linear least squares on the loss. Local ones count the sizes near their minimum and
share a skew: they are parabolas in x, a power of the size. A parabola through three points is
exact. It need not have a minimum.
"""

from dataclasses import dataclass

import numpy as np

from moe_ablm.errors import UserError

RECENTRED = 3  # times that its window moves to the minimum found
FREEDOM_OF_SKEW = 4  # residual degrees of freedom from which on a skew is fitted
LN10 = np.log(10.0)


def warp(z: np.ndarray, skew: float | np.ndarray, middle: float) -> np.ndarray:
    """x of log10 sizes z: `middle` + (exp(t (z - middle)) - 1) / t, t = skew ln 10; z at skew 0."""
    t = np.where(skew == 0.0, 1.0, skew) * LN10
    return np.where(skew == 0.0, z, middle + np.expm1(t * (z - middle)) / t)


def unwarp(x: np.ndarray, skew: float | np.ndarray, middle: float) -> np.ndarray:
    """log10 sizes of x, the inverse of `warp`; nan where there is none."""
    t = np.where(skew == 0.0, 1.0, skew) * LN10
    inside = t * (x - middle)
    known = np.log1p(np.where(inside > -1.0, inside, 0.0)) / t + middle
    return np.where(skew == 0.0, x, np.where(inside > -1.0, known, np.nan))


@dataclass(frozen=True)
class Local:
    """What counts near a minimum: values up to a factor from it, at least so many, and the skew."""

    factor: float = 8.0
    fewest: int = 6
    most_skew: float = 0.6  # |beta - alpha| / 3 of published laws is < .2

    @property
    def skews(self) -> np.ndarray:
        """The skews that are tried, `[s]`."""
        count = round(self.most_skew / 0.005)
        return np.round(np.linspace(-self.most_skew, self.most_skew, 2 * count + 1), 3)


OF_SIZES = Local()


@dataclass(frozen=True)
class Parabola:
    """One group: its runs, their log10 sizes `[m]` and weights, residual degrees of freedom."""

    size: float
    members: np.ndarray
    z: np.ndarray
    weights: np.ndarray

    @property
    def key(self) -> str:
        return f"{self.size:.15g}"

    @property
    def freedom(self) -> int:
        return self.z.size - 3

    def basis(self, skew: float | np.ndarray, middle: float) -> np.ndarray:
        """x^2, x, 1 `[..., m, 3]` at skews `[...]`."""
        x = warp(self.z, np.asarray(skew)[..., None], middle)
        return np.stack([x**2, x, np.ones_like(x)], axis=-1)

    def solve(self, skew: float | np.ndarray, middle: float) -> np.ndarray:
        """What turns losses into coefficients of the weighted parabola, `[..., 3, m]`."""
        root = np.sqrt(self.weights)
        return np.linalg.pinv(self.basis(skew, middle) * root[:, None]) * root


@dataclass(frozen=True)
class Parabolas:
    """Groups `G` that share a skew, of log10 sizes around `middle`."""

    parts: tuple[Parabola, ...]
    middle: float = 0.0
    skewed: bool = False  # there are enough runs to fit a skew
    local: Local = OF_SIZES  # skews that are tried

    @property
    def freedom(self) -> int:
        """Residual degrees of freedom of all."""
        return sum(p.freedom for p in self.parts) - int(self.skewed)

    def skew(self, loss: np.ndarray) -> np.ndarray:
        """The skew `[...]` with the least sum of weighted squares for losses `[..., n]`."""
        if not self.skewed:
            return np.zeros(loss.shape[:-1])
        skews = self.local.skews
        explained = np.zeros((*loss.shape[:-1], skews.size))
        for p in self.parts:
            root = np.sqrt(p.weights)
            # a constant is in the basis, and without it less is cancelled
            mine = (loss[..., p.members] - loss[..., p.members].mean(axis=-1, keepdims=True)) * root
            q = np.linalg.qr(p.basis(skews, self.middle) * root[:, None])[0]  # [skews, m, 3]
            explained += np.square(np.einsum("...m,smk->...sk", mine, q, optimize=True)).sum(-1)
        return skews[np.argmax(explained, axis=-1)]

    def coefficients(self, loss: np.ndarray, skew: np.ndarray) -> np.ndarray:
        """(a, b, c) of each parabola for losses `[..., n]` at skews `[...]`: `[..., G, 3]`."""
        values, which = np.unique(skew, return_inverse=True)
        which = which.reshape(np.shape(skew))
        rows = [
            (p.solve(values, self.middle)[which] @ loss[..., p.members, None])[..., 0]
            for p in self.parts
        ]
        return np.stack(rows, axis=-2)

    def fitted(self, loss: np.ndarray, skew: float) -> np.ndarray:
        """The losses `[n]` on the parabolas; as they are where no parabola has the run."""
        out = loss.copy()
        for p in self.parts:
            basis = p.basis(skew, self.middle)
            out[p.members] = basis @ (p.solve(skew, self.middle) @ loss[p.members])
        return out

    def lowest(self, abc: np.ndarray) -> np.ndarray:
        """The loss at the minimum of each parabola `[..., G]`; nan where it is not convex."""
        a, b, c = (abc[..., k] for k in range(3))
        return np.where(a > 0, c - b**2 / (4.0 * np.where(a > 0, a, 1.0)), np.nan)

    def minima(self, abc: np.ndarray, skew: np.ndarray) -> np.ndarray:
        """ln N* of each parabola `[..., G]` at skews `[...]`; nan where it is not convex."""
        a, b = abc[..., 0], abc[..., 1]
        x = np.where(a > 0, -b / (2.0 * np.where(a > 0, a, 1.0)), np.nan)
        return unwarp(x, skew[..., None], self.middle) * LN10


def split(
    groups: np.ndarray, sizes: np.ndarray, loss: np.ndarray, name: str, local: Local | None
) -> tuple[Parabolas, list[str]]:
    """Parabolas of the groups `[n]` with at least three sizes `[n]`, and notes on the others.

    Raises:
      UserError: no group has three sizes.
    """
    parts: list[Parabola] = []
    notes: list[str] = []
    for size in np.unique(groups):
        members = np.flatnonzero(groups == size)
        z = np.log10(sizes[members])
        if np.unique(z).size < 3:
            notes.append(
                f"{name} {size:.15g}: {np.unique(z).size} sizes, and a parabola needs three; "
                "left out"
            )
            continue
        near, weights = np.arange(z.size), np.ones(z.size)
        if local:
            near, weights = window(z, loss[members], local)
            if near.size < z.size:
                notes.append(
                    f"{name} {size:.15g}: {near.size} of {z.size} runs near the minimum count"
                )
        parts.append(Parabola(float(size), members[near], z[near], weights))
    if not parts:
        raise UserError(f"no {name} with three model sizes; a parabola needs three")
    if not local:
        return Parabolas(tuple(parts)), notes
    middle = float(np.mean(np.concatenate([p.z for p in parts])))
    spare = sum(np.unique(p.z).size - 3 for p in parts)
    return Parabolas(tuple(parts), middle, spare >= FREEDOM_OF_SKEW, local), notes


def window(z: np.ndarray, loss: np.ndarray, local: Local) -> tuple[np.ndarray, np.ndarray]:
    """Runs near the minimum of loss over log10 sizes `[m]`, and their tricube weights."""
    sizes = np.unique(z)
    middle = np.array([loss[z == s].mean() for s in sizes])
    at = sizes[np.argmin(middle)]
    for _ in range(RECENTRED):
        gap = np.abs(z - at)
        fewest = np.sort(np.abs(sizes - at))[min(local.fewest, sizes.size) - 1]
        reach = max(np.log10(local.factor), fewest)
        near = np.flatnonzero(gap <= reach + 1e-9)
        weights = (1.0 - (gap[near] / (1.5 * reach)) ** 3) ** 3
        a, b, _ = Parabola(0.0, near, z[near], weights).solve(0.0, 0.0) @ loss[near]
        if a <= 0.0:
            break
        at = float(np.clip(-b / (2.0 * a), sizes[0], sizes[-1]))
    return near, weights


def line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercept and slope of y on x along the last axis; nan where an entry is nan."""
    mean_x, mean_y = x.mean(axis=-1, keepdims=True), y.mean(axis=-1, keepdims=True)
    slope = ((x - mean_x) * (y - mean_y)).sum(axis=-1) / ((x - mean_x) ** 2).sum(axis=-1)
    return mean_y[..., 0] - slope * mean_x[..., 0], slope
