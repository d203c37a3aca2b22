"""Laws of whole curves on public ones: fitted to three schedules, held against six others.

The curves are those of Luo et al. 2025 (https://github.com/thu-yao-01-luo/MultiPowerLaw, folder
loss_curve_repo), of models of 25, 100 and 400 M parameters. As in the paper the laws are fitted to
three schedules of at most 24,000 updates; the others have other shapes or 72,000 updates.

    git clone https://github.com/thu-yao-01-luo/MultiPowerLaw curves
    python benchmarks/schedules.py --curves curves/loss_curve_repo
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.scaling import Runs, fit_law
from moe_ablm.scaling.schedules import history, path_of

PEAK, END, WARMUP = 3e-4, 3e-5, 2160
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
HELD_OUT = (
    *("wsdcon_3", "wsdcon_18", "wsd_20000_24000", "wsdld_20000_24000"),
    *("constant_72000", "cosine_72000"),
)
# src/config.py of their repository: L0, A, alpha, B, C, beta, gamma
NAMES = ("E", "A", "alpha", "B", "C", "beta", "gamma")
PUBLISHED = {
    25: (3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    100: (2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    400: (2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}


def schedule(name: str) -> np.ndarray:
    """Rates of every update of a curve, the warm-up from 0 included, as their code has them."""
    kind, *numbers = name.split("_")
    steps = 16000 if kind == "wsdcon" else int(numbers[-1])
    after = np.arange(steps - WARMUP)
    if kind == "cosine":
        rest = END + 0.5 * (PEAK - END) * (1 + np.cos(np.pi * after / after.size))
    else:
        rest = np.full(after.size, PEAK)
    if kind == "wsdcon":
        rest[8000 - WARMUP :] = int(numbers[0]) * 1e-5
    if kind in ("wsd", "wsdld"):
        share = np.arange(steps - int(numbers[0])) / (steps - int(numbers[0]))
        linear = PEAK + (END - PEAK) * share
        rest[int(numbers[0]) - WARMUP :] = (
            linear if kind == "wsdld" else PEAK ** (1 - share) * END**share
        )
    return np.concatenate([np.linspace(0, PEAK, WARMUP), rest])


def read(folder: Path, size: int, name: str) -> dict[str, np.ndarray]:
    """Columns of one curve."""
    path = folder / f"csv_{size}" / f"{name}.csv"
    step, _, loss = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
    eta = schedule(name)
    known = step < eta.size
    at = step[known].astype(int) + 1  # their update 0 has a rate, too
    # recent rates start at the peak: the warm-up counts as such in law annealing
    recent = path_of(np.maximum(eta, np.where(np.arange(eta.size) < WARMUP, PEAK, 0.0)))[1]
    return {
        "run": np.full(at.size, name),
        "params": np.full(at.size, size * 1e6),
        "lr_area": np.cumsum(eta)[at - 1],
        "lr_recent": recent[at - 1],
        "lr_history": history(eta, at),
        "loss": loss[known],
    }


def joined(curves: list[dict[str, np.ndarray]]) -> Runs:
    columns = {k: np.concatenate([c[k] for c in curves]) for k in curves[0]}
    return Runs(columns, tuple(map(str, columns["run"])))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, required=True, help="loss_curve_repo")
    folder = parser.parse_args(argv).curves
    table = Table(title="mean |error| of the loss, % of it")
    for name in ("parameters", "law", "fitted", *HELD_OUT, "held out"):
        table.add_column(name, justify="left" if name == "law" else "right")
    for size, values in PUBLISHED.items():
        curves = {name: read(folder, size, name) for name in (*FITTED, *HELD_OUT)}
        runs = joined([curves[name] for name in FITTED])
        fits = {law: fit_law(runs, law, 1e-3) for law in ("annealing", "multi_power")}
        laws = {law: (made.law, made.coefficients) for law, made in fits.items()}
        laws["multi_power as published"] = (
            fits["multi_power"].law,
            dict(zip(NAMES, values, strict=True)),
        )
        for law, (equation, coefficients) in laws.items():
            missed = {
                name: 100 * np.mean(np.abs(equation.predict(coefficients, c) / c["loss"] - 1))
                for name, c in curves.items()
            }
            cells = [np.mean([missed[n] for n in FITTED]), *(missed[n] for n in HELD_OUT)]
            cells.append(np.mean([missed[n] for n in HELD_OUT]))
            table.add_row(f"{size}M", law, *(f"{c:.3f}" for c in cells))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
