"""Coverage of 95 % intervals on simulated tables: `python benchmarks/coverage.py --law LAW`.

Each law is fitted to tables with known coefficients and noise; the share of intervals that hold
the truth is printed for every coefficient. `--out` keeps a line a table: the same command goes on
where one was stopped, by `--cpu-minutes` or otherwise, and files of several may be joined by `cat`.

    python benchmarks/coverage.py --law joint --tables 200 --cpu-minutes 20 --out coverage.jsonl
    python benchmarks/coverage.py --tables 0 --out coverage.jsonl          # the table so far

`--quick` starts each fit at the true exponents and counts the intervals of the standard error only,
a hundred times as fast: whether a low share of the others is chance or a fault of the error.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_ablm.scaling import Runs, bootstrap, fit_law, profiles
from moe_ablm.scaling.catalogue import saved_law
from moe_ablm.scaling.resampling import bootstrap_intervals
from moe_ablm.scaling.schedules import history, path_of, rates

Columns = dict[str, np.ndarray]
DENSE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
REPEATED = DENSE | {"P": 0.05, "delta": 0.6, "kappa": 0.7}
ROUTED = {"a[x]": -0.08, "b[x]": -0.12, "c[x]": 0.011, "d[x]": 1.1}
ROUTED |= {"E_start[x]": 2.0, "E_max_over_E_start[x]": 150.0}


def dense_grid() -> Columns:
    """64 runs, eight sizes and eight lengths."""
    n, d = np.meshgrid(np.geomspace(4e7, 1e10, 8), np.geomspace(5e8, 3e11, 8))
    return {"params": n.ravel(), "tokens": d.ravel()}


def checkpoint_grid() -> Columns:
    """30 runs of ten sizes, three seeds, with eight checkpoints each."""
    n = np.repeat(np.geomspace(4e7, 1e10, 10), 24)
    run = np.repeat([f"r{i:02d}" for i in range(30)], 8)
    return {"params": n, "tokens": np.tile(np.geomspace(1e9, 3e11, 8), 30), "run": run}


def repeated_grid() -> Columns:
    """96 runs: six sizes, four numbers of epochs, four data sizes."""
    n, u, k = np.meshgrid(
        np.geomspace(1e7, 3e9, 6), np.geomspace(1e9, 3e10, 4), [1.0, 5.0, 25.0, 80.0]
    )
    return {"params": n.ravel(), "unique_tokens": u.ravel(), "tokens": (u * k).ravel()}


def routed_grid() -> Columns:
    """75 runs: five sizes, five numbers of experts, three seeds."""
    n, e = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), [1.0, 4.0, 16.0, 64.0, 256.0])
    )
    n, e = np.tile(n, 3), np.tile(e, 3)
    return {"params": n, "experts": e, "router": np.where(e > 1, "x", "dense")}


def joint_grid() -> Columns:
    """216 runs: the repeated grid of three data sizes, dense and two numbers of experts."""
    n, u, k = np.meshgrid(
        np.geomspace(1e7, 3e9, 6), np.geomspace(1e9, 3e10, 3), [1.0, 5.0, 25.0, 80.0]
    )
    dense = {"params": n.ravel(), "unique_tokens": u.ravel(), "tokens": (u * k).ravel()}
    return routed({name: np.tile(v, 3) for name, v in dense.items()}, n.size)


def routed(columns: Columns, dense: int) -> Columns:
    """The first `dense` of the runs with one expert, as many with 8, and as many with 64."""
    experts = np.repeat([1.0, 8.0, 64.0], dense)
    return columns | {
        "experts": experts,
        "router": np.where(experts > 1, "x", "dense"),
        "total_params": columns["params"] * (1 + 0.5 * (experts - 1)),
    }


def granular_grid() -> Columns:
    """80 runs: five sizes, four lengths, four granularities."""
    n, d, g = np.meshgrid(
        np.geomspace(4e7, 1e10, 5), np.geomspace(1e9, 3e11, 4), [1.0, 2.0, 4.0, 16.0]
    )
    return {"params": n.ravel(), "tokens": d.ravel(), "granularity": g.ravel()}


def sparse_grid() -> Columns:
    """144 runs: six sizes, six lengths, four shares of idle experts."""
    n, d, s = np.meshgrid(
        np.geomspace(4e7, 1e10, 6), np.geomspace(1e9, 3e11, 6), [0.0, 0.5, 0.9, 0.97]
    )
    return {"params": n.ravel(), "tokens": d.ravel(), "sparsity": s.ravel()}


def experts_grid() -> Columns:
    """144 runs: six sizes, six lengths, dense and three numbers of experts."""
    n, d, e = np.meshgrid(
        np.geomspace(4e7, 1e10, 6), np.geomspace(1e9, 3e11, 6), [1.0, 4.0, 16.0, 64.0]
    )
    return {"params": n.ravel(), "tokens": d.ravel(), "experts": e.ravel()}


def optima_grid() -> Columns:
    """20 best losses: ten budgets from 3e18 to 1e21 FLOPs, dense and of one router."""
    return {
        "flops": np.tile(np.geomspace(3e18, 1e21, 10), 2),
        "router": np.repeat(["dense", "x"], 10),
    }


def gap_grid() -> Columns:
    """162 runs: three sizes, 1 to 60 epochs, dense and two numbers of experts, three settings."""
    n, u, k, e = np.meshgrid(
        np.geomspace(1e6, 1.6e7, 3), [1e6, 8e6], [1.0, 5.0, 60.0], [1.0, 8.0, 64.0]
    )
    out = {"params": n.ravel(), "unique_tokens": u.ravel(), "tokens": (u * k).ravel()}
    out["total_params"] = out["params"] * (1 + 0.5 * (e.ravel() - 1))
    return with_settings(out)


def with_settings(columns: Columns) -> Columns:
    """The runs without either covariate, with weight decay, and with dropout as well."""
    size = columns["params"].size
    out = {name: np.tile(v, 3) for name, v in columns.items()}
    out["weight_decay"] = np.repeat([0.0, 0.1, 0.1], size)
    return out | {"dropout": np.repeat([0.0, 0.0, 0.2], size)}


def regularised_grid() -> Columns:
    """108 runs: four sizes, three data sizes, 1 to 80 epochs, three settings."""
    n, u, k = np.meshgrid(np.geomspace(1e7, 3e9, 4), np.geomspace(1e9, 3e10, 3), [1.0, 10.0, 80.0])
    return with_settings(
        {"params": n.ravel(), "unique_tokens": u.ravel(), "tokens": (u * k).ravel()}
    )


def regularised_joint_grid() -> Columns:
    """324 runs: those of `regularised_grid`, dense and of two numbers of experts."""
    dense = regularised_grid()
    out = {name: np.tile(v, 3) for name, v in dense.items()}
    return routed(out, dense["params"].size)


def schedule_grid() -> Columns:
    """140 rows: 14 runs of one size, seven schedules in two lengths, ten checkpoints each."""
    courses = (
        ("cosine", 0.2),
        ("linear", 0.2),
        ("constant", 0.2),
        *(("wsd", share) for share in (0.05, 0.2, 0.4, 0.6)),
    )
    parts = []
    for i, ((schedule, share), steps) in enumerate(product(courses, (1500, 3000))):
        keys = {"schedule": schedule, "decay_share": share, "steps": steps}
        eta = rates(keys | {"lr": 1e-3, "warmup": 100})
        at = np.arange(1, 11) * steps // 10
        area, recent = path_of(eta)
        parts.append(
            {
                "run": np.full(at.size, f"r{i:02d}"),
                "params": np.full(at.size, 1e7),
                "tokens": 1e4 * at,
                "lr_area": area[at - 1],
                "lr_recent": recent[at - 1],
                "lr_history": history(eta, at),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def sized_schedule_grid() -> Columns:
    """700 rows: the runs of `schedule_grid` in five sizes."""
    one = schedule_grid()
    sizes = np.geomspace(1e6, 1e8, 5)
    out = {name: np.concatenate([v] * sizes.size) for name, v in one.items()}
    out["params"] = np.repeat(sizes, one["params"].size)
    out["run"] = np.char.add(np.char.add(out["run"], "-"), out["params"].astype(int).astype(str))
    return out


class Case(NamedTuple):
    """What is simulated; `between` and `within` are the sd of ln L of a run and of a row."""

    law: str
    design: Callable[[], Columns]
    truth: Mapping[str, float]
    routers: tuple[str, ...] = ()
    between: float = 0.0
    within: float = 2e-3
    in_every_curve: bool = False  # dense runs lie on the curve of the router
    covariates: tuple[str, ...] = ()

    @property
    def delta(self) -> float | None:
        """Huber's delta: the sd of a row; None, the default, where that is smaller."""
        return self.within if self.within > 1e-3 else None


BEST = {"L_inf": 1.8, "A": 2700.0, "alpha": 0.18, "gain[x]": 1.8}
OVERFIT = {"fresh": 0.97, "P": 0.004, "delta": 0.6, "kappa": 0.5, "tau": 0.0}
OVERFIT |= {"by_weight_decay": -5.0, "by_dropout": 0.0, "fresh_by_dropout": -0.3, "v[moe]": 0.0}
JOINT = REPEATED | {"mu": 0.3, "E_max": 200.0, "tau": 0.5, "v[x]": 0.3}
REGULARISED = {"by_weight_decay": -5.0, "by_dropout": -2.0}
BOTH = ("weight_decay", "dropout")
ERROR = "standard error"  # the only method of --quick
ANNEALED = {"E": 1.2, "A": 0.9, "alpha": 0.45, "B": 300.0, "C": 2.0, "beta": 0.6, "gamma": 0.6}
GRANULAR = {"c": 0.5, "g": 20.0, "a": 18.0, "b": 30.0, "gamma": 0.6, "alpha": 0.12, "beta": 0.15}
SPARSE = {"a": 200.0, "b": 900.0, "c": 0.3, "d": 40.0, "e": 1.2}
SPARSE |= {"alpha": 0.3, "beta": 0.32, "lambda": -0.7, "delta": 0.3, "gamma": 0.25}
EXPERTS = DENSE | {"delta": -0.3, "gamma": -0.01, "omega": 0.2, "zeta": 0.005, "E_max": 300.0}
RECENT = {"E": 1.2, "A": 0.9, "alpha": 0.45, "C": 200.0}
CASES = {
    "chinchilla": Case("chinchilla", dense_grid, DENSE),
    "chinchilla, checkpoints": Case(
        "chinchilla", checkpoint_grid, DENSE, between=4e-3, within=5e-4
    ),
    "compute": Case("compute", optima_grid, BEST, ("x",)),
    "data_constrained_b2": Case("data_constrained_b2", repeated_grid, REPEATED),
    "moe_clark": Case("moe_clark", routed_grid, ROUTED, ("x",), in_every_curve=True),
    "gap, covariates": Case("gap", gap_grid, OVERFIT, ("moe",), within=1e-2, covariates=BOTH),
    "joint": Case("joint", joint_grid, JOINT, ("x",)),
    "data_constrained_b2, covariates": Case(
        "data_constrained_b2", regularised_grid, REPEATED | REGULARISED, covariates=BOTH
    ),
    "joint, covariates": Case(
        "joint", regularised_joint_grid, JOINT | REGULARISED, ("x",), covariates=BOTH
    ),
    "multi_power": Case("multi_power", schedule_grid, ANNEALED, between=5e-4, within=5e-4),
    "annealing": Case("annealing", schedule_grid, RECENT, between=5e-4, within=5e-4),
    "annealing_sizes": Case(
        "annealing_sizes",
        sized_schedule_grid,
        RECENT | {"B": 30.0, "beta": 0.3},
        between=5e-4,
        within=5e-4,
    ),
    "compute_slopes": Case(
        "compute_slopes",
        optima_grid,
        {"L_inf": 1.8, "A": 2700.0, "alpha": 0.18, "A[x]": 2000.0, "alpha[x]": 0.175},
        ("x",),
    ),
    "data_constrained_b1": Case(
        "data_constrained_b1", repeated_grid, DENSE | {"R_D": 12.0, "R_N": 4.0}
    ),
    "data_constrained_b3": Case(
        "data_constrained_b3", repeated_grid, DENSE | {"P": 0.002, "delta": 1.0, "kappa": 1.0}
    ),
    "moe_granularity": Case("moe_granularity", granular_grid, GRANULAR),
    "moe_sparsity": Case("moe_sparsity", sparse_grid, SPARSE),
    "moe_experts": Case("moe_experts", experts_grid, EXPERTS),
}


def simulate(case: Case, seed: int) -> Runs:
    """A table of the case; runs err by themselves, and rows a little more."""
    columns = case.design()
    law = saved_law(case.law, case.routers, case.covariates)
    inputs = {k: v for k, v in columns.items() if k != "run"}
    if case.in_every_curve:
        inputs["router"] = np.full(columns["router"].size, case.routers[0])
    loss = law.predict(case.truth, inputs)
    rng = np.random.default_rng(seed)
    noise = case.within * rng.standard_normal(loss.size)
    if "run" in columns:
        run = np.unique(columns["run"], return_inverse=True)[1]
        noise = noise + case.between * rng.standard_normal(run.max() + 1)[run]
    loss = (loss + law.offset) * np.exp(noise) - law.offset
    if law.of_gap:
        columns = columns | {"train_loss": np.full(loss.size, 2.0)}
        loss = loss + columns["train_loss"]
    source = tuple(map(str, range(loss.size)))
    return Runs(columns | {"loss": loss}, source, covariates=case.covariates)


def inside(case: Case, seed: int, draws: int) -> dict[str, dict[str, bool]]:
    """Whether the truth is in each interval, by method and coefficient."""
    made = fit_law(simulate(case, seed), case.law, case.delta)
    found = {p.quantity.name: p.interval(0.95) for p in profiles(made)}
    drawn = bootstrap_intervals(made, bootstrap(made, draws, seed)) if draws else {}
    methods = {"profile": found, "bootstrap": {k: v[0] for k, v in drawn.items()}}
    return {
        method: {
            k: (i.low is None or i.low <= case.truth[k])
            and (i.high is None or case.truth[k] <= i.high)
            for k, i in intervals.items()
            if k in case.truth
        }
        for method, intervals in methods.items()
    }


def inside_errors(case: Case, seed: int) -> dict[str, dict[str, bool]]:
    """Whether the truth is within 1.96 standard errors, of the log of positive coefficients."""
    made = fit_law(simulate(case, seed), case.law, case.delta, start=case.truth)
    found = {}
    for p in made.law.parameters:
        if p.name in case.truth and p.name in made.standard_errors:
            value, true = made.coefficients[p.name], case.truth[p.name]
            error = made.standard_errors[p.name] / (value if p.log else 1.0)
            gap = np.log(true / value) if p.log else true - value
            found[p.name] = bool(abs(gap) <= 1.96 * error)
    return {ERROR: found}


def parser_of_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--law", action="append", choices=CASES, help="a row; default: all")
    parser.add_argument("--tables", type=int, default=200, help="of each law")
    parser.add_argument("--first", type=int, default=0, help="seed of the first table")
    parser.add_argument("--draws", type=int, default=400, help="of the bootstrap; 0: profiles only")
    about = "standard errors only, from the true exponents; into a file of its own"
    parser.add_argument("--quick", action="store_true", help=about)
    parser.add_argument("--cpu-minutes", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = parser_of_flags()
    args = parser.parse_args(argv)
    done = read(args.out)
    if args.tables and any((ERROR in found) != args.quick for found in done.values()):
        parser.error(f"--out {args.out} has tables with and without --quick: name another file")
    wanted = [
        (name, seed)
        for name in args.law or CASES
        for seed in range(args.first, args.first + args.tables)
        if (name, seed) not in done
    ]
    for i, (name, seed) in enumerate(wanted):
        if time.process_time() > 60 * args.cpu_minutes:
            print(f"stopped: {len(wanted) - i} of {len(wanted)} tables are left")
            break
        case = CASES[name]
        done[name, seed] = (
            inside_errors(case, seed) if args.quick else inside(case, seed, args.draws)
        )
        with args.out.open("a") as file:
            entry = {"case": name, "seed": seed, "inside": done[name, seed]}
            file.write(json.dumps(entry) + "\n")
    Console(width=120).print(table_of(done))


def read(path: Path) -> dict[tuple[str, int], dict]:
    """Tables that were done, by law and seed; a line that was cut off is taken off the file."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    entries = map(json.loads, whole.splitlines())
    return {(e["case"], e["seed"]): e["inside"] for e in entries}


def table_of(done: Mapping[tuple[str, int], dict]) -> Table:
    """A row a case and method: tables, and the share of intervals that hold each coefficient."""
    table = Table(title="95 % intervals that hold the truth, %")
    for name in ("law", "method", "tables", "coefficients"):
        table.add_column(name)
    for case in CASES:
        kept = [v for (name, _), v in done.items() if name == case]
        for method in dict.fromkeys(method for v in kept for method in v):
            names = dict.fromkeys(k for v in kept for k in v[method])
            shares = {k: [v[method][k] for v in kept if k in v[method]] for k in names}
            text = ", ".join(f"{k} {100 * np.mean(s):.1f}" for k, s in shares.items())
            table.add_row(case, method, str(len(kept)), Text(text))  # [x] is no markup
    return table


if __name__ == "__main__":
    main()
