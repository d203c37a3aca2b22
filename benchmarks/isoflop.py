"""Which sizes make an isoFLOP parabola: bias and error of its minimum on a known surface.

    python benchmarks/isoflop.py --tables 25

Six budgets of nine sizes, each twice the one before, from .19 to 48 times the best one, on
E + A N^-alpha + B D^-beta. Bias is the largest of the budgets without noise, the error the root
mean square of ln N* over budgets and tables. The last row but one is what law isoflop does.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.scaling.minima import LN10, OF_SIZES, Local, split

E, A, B, ALPHA, BETA = 2.5, 230_000.0, 3600.0, 0.66, 0.4
BUDGETS = 1e18 * 4.0 ** np.arange(6)
SHARES = 0.1875 * 2.0 ** np.arange(9)
NOISE = (0.002, 0.01)  # sd of ln L
VARIANTS = {
    "parabola, within a factor of 4, at least 5": Local(4.0, 5, 0.0),
    "shared skew, within 4, at least 5": Local(4.0, 5),
    "shared skew, within 8, at least 6 (law isoflop)": OF_SIZES,
    "shared skew, within 8, at least 7": Local(8.0, 7),
}


def surface() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Budgets, sizes and losses of all runs `[54]`; ln of the best size of each budget `[6]`."""
    scale = (ALPHA * A / (BETA * B)) * (BUDGETS / 6.0) ** BETA
    best = scale ** (1.0 / (ALPHA + BETA))
    flops = np.repeat(BUDGETS, SHARES.size)
    n = np.repeat(best, SHARES.size) * np.tile(SHARES, BUDGETS.size)
    loss = E + A * n**-ALPHA + B * (flops / 6.0 / n) ** -BETA
    return flops, n, loss, np.log(best)


def errors(local: Local, sd: float, seed: int) -> np.ndarray:
    """ln N* found less ln N* true of each budget, `[6]`; nan where there is no minimum."""
    flops, n, loss, best = surface()
    noisy = loss * np.exp(sd * np.random.default_rng(seed).standard_normal(loss.size))
    parabolas, _ = split(flops, n, noisy, "budget", local)
    skew = parabolas.skew(noisy)
    found = parabolas.minima(parabolas.coefficients(noisy, skew), skew)
    inside = np.abs(found - best) < np.log(SHARES[-1]) + LN10
    return np.where(inside, found, np.nan) - best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=25, help="simulated for each noise")
    args = parser.parse_args()
    table = Table(title=f"minima of isoFLOP parabolas, {args.tables} tables a noise")
    table.add_column("through the points of each budget")
    for name in (
        "noise-free N*",
        *(f"rms error of ln N*, sd {sd:g}" for sd in NOISE),
        "no minimum",
    ):
        table.add_column(name, justify="right")
    for name, local in VARIANTS.items():
        biases = errors(local, 0.0, 0)
        cells = [f"{np.expm1(biases[np.argmax(np.abs(biases))]):+.1%}"]
        lost = 0
        for sd in NOISE:
            every = np.concatenate([errors(local, sd, seed) for seed in range(args.tables)])
            cells.append(f"{np.sqrt(np.nanmean(every**2)):.3f}")
            lost += int(np.isnan(every).sum())
        table.add_row(name, *cells, str(lost))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
