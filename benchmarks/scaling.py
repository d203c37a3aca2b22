"""Speed of the scaling-law fits: `python benchmarks/scaling.py [--data DIR] [--draws N]`.

Prints CPU seconds (all threads) and wall seconds beside the targets. Without the digitised
Chinchilla table it times 240 simulated runs of the same law.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_ablm.scaling import Reading, Runs, bootstrap, fit_law, profiles, read_runs
from moe_ablm.scaling.laws_dense import Chinchilla


def runs_to_time(data: Path) -> tuple[Runs, str]:
    path = data / "scaling" / "epoch_chinchilla" / "svg_extracted_data.csv"
    if path.is_file():
        columns = {"params": "Model Size", "flops": "Training FLOP"}
        return read_runs([path], Reading(columns=columns, drop_largest_losses=5)), "digitised"
    n, d = (
        a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 16), np.geomspace(5e8, 3e11, 15))
    )
    values = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
    loss = Chinchilla().predict(values, {"params": n, "tokens": d})
    loss *= np.exp(5e-3 * np.random.default_rng(0).standard_normal(n.size))
    return Runs(
        {"params": n, "tokens": d, "loss": loss}, tuple(map(str, range(n.size)))
    ), "simulated"


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def import_seconds(statement: str) -> tuple[float, float]:
    """The best of five fresh interpreters: CPU and wall."""
    code = (
        "import time; c, w = time.process_time(), time.perf_counter(); "
        f"{statement}; print(time.process_time() - c, time.perf_counter() - w)"
    )
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    times = np.array([[float(x) for x in f.stdout.split()] for f in found])
    return tuple(times.min(axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOE_ABLM_DATA", ".")))
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    runs, source = runs_to_time(args.data)
    table = Table(title=f"{len(runs)} {source} runs, law chinchilla")
    for name in ("what", "CPU s", "wall s", "target (wall)"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def row(what: str, cpu: float, wall: float, target: str = "") -> None:
        table.add_row(what, f"{cpu:.2f}", f"{wall:.2f}", target)

    for statement in ("import moe_ablm.scaling", "from moe_ablm.scaling import load, fit_law"):
        row(statement, *import_seconds(statement), "0.5")
    cpu, wall, made = timed(lambda: fit_law(runs, huber_delta=1e-3))
    row("first fit (scipy imported on the way)", cpu, wall, "1")
    cpu, wall, made = timed(lambda: fit_law(runs, huber_delta=1e-3))
    row("fit from the grid of starts", cpu, wall, "1")
    slowest, values = (0.0, 0.0), []
    for alpha, beta in np.random.default_rng(0).uniform(0.0, 2.0, (100, 2)):
        start = {"alpha": alpha, "beta": beta}
        cpu, wall, one = timed(lambda start=start: fit_law(runs, huber_delta=1e-3, start=start))
        slowest, values = max(slowest, (cpu, wall)), [*values, one.objective]
    row("slowest of 100 random starts", *slowest, "1")
    cpu, wall, walked = timed(lambda: profiles(made))
    row(f"{len(walked)} profiles", cpu, wall)
    cpu, wall, boot = timed(lambda: bootstrap(made, args.draws))
    row(f"{args.draws} bootstraps", cpu, wall, "30")
    console = Console(width=100)
    console.print(table)
    console.print(
        f"objective {made.objective:.13g}; of the 100 starts {np.ptp(values):.1e} apart; "
        f"{boot.converged.mean():.1%} of the bootstraps converged",
        highlight=False,
    )


if __name__ == "__main__":
    main()
