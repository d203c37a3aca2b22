"""Whether a planned grid will tell tau = 0 from tau = 1, by simulation.

Losses of the joint law with tau 0 (over-fitting follows active parameters) or 1 (all of them) get
seed noise and are fitted again, with tau free and with tau held at the other value. The other value
is ruled out where the likelihood ratio exceeds the 95 % point of chi2 with one degree of freedom
(Wilks 1938) and tau lies on the right side. All data sets are rows of one batch of the solver.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table
from scipy.stats import beta, chi2

from moe_ablm.errors import UserError
from moe_ablm.scaling.catalogue import law_for
from moe_ablm.scaling.fit import Setup, prepare
from moe_ablm.scaling.laws_joint import TAU
from moe_ablm.scaling.runs import Runs
from moe_ablm.scaling.solver import Problem, minimise
from moe_ablm.scaling.tables import add_row

LEVEL = 0.95
DRAWS = 40
SEEDS = (1, 2, 3, 5, 10)
WANTED = 0.9
# what is assumed of the truth: exponents, and each term's mean share of the loss
EXPONENTS = {"alpha": 0.34, "beta": 0.37, "delta": 0.8, "kappa": 0.6, "mu": 0.2, "E_max": 64.0}
SHARES = {"E": 0.55, "A": 0.2, "B": 0.15, "P": 0.1}  # P: of runs that repeat their data
STARTS = (0.0, 1.0)  # of tau, where it is free
ITERATIONS = 60  # from near the truth; the likelihood ratio is settled long before


@dataclass(frozen=True)
class Power:
    """Of a grid with so many seeds and numbers of experts.

    `told[t]` is the share of draws of truth tau = t in which the other value was ruled out, with
    its 95 % interval (Clopper & Pearson 1934); `false_alarms[t]` that in which the truth was.
    """

    seeds: int
    experts: tuple[int, ...]
    runs: int
    draws: int
    told: Mapping[int, tuple[float, float, float]]
    false_alarms: Mapping[int, tuple[float, float, float]]

    @property
    def power(self) -> float:
        """The smaller of both shares."""
        return min(share for share, _, _ in self.told.values())


def power_table(
    runs: Runs,
    seed_sd: float,
    draws: int = DRAWS,
    seed: int = 0,
    seeds: Sequence[int] = SEEDS,
    wanted: float = WANTED,
) -> list[Power]:
    """Power for every number of seeds, with one, two ... numbers of experts of the grid.

    Args:
      runs: the grid, one row a cell, no losses needed. Its numbers of experts are taken from both
        ends: the largest first, then the smallest.
      seed_sd: of ln L between seeds.
      draws: simulated sets for each truth.
      seed: of the noise, which is the same for every row of the table.
      seeds: of every cell, increasing; more are not tried where fewer have the power `wanted`.

    Raises:
      UserError: a column is missing, no run has experts or repeats its data, or `draws` < 1.
    """
    if draws < 1:
        raise UserError(f"--power {draws}: expected at least one draw")
    runs.require([n for n in law_for("joint", _dense()).needs if n != "loss"], "joint")
    experts = np.asarray(runs["experts"], float)
    counts = [int(e) for e in np.unique(experts[experts > 1])]
    repeats = runs["tokens"] > runs["unique_tokens"] * (1 + 1e-6)
    extra = runs["total_params"] > runs["params"] * (1 + 1e-6)
    if not np.any(repeats & extra):
        raise UserError(
            "--power: no planned run with experts sees its data more than once, so that nothing "
            "depends on tau; add cells with fewer unique tokens than tokens"
        )
    order = [c for pair in zip(counts[::-1], counts, strict=True) for c in pair]
    order = list(dict.fromkeys(order))
    noise = np.random.default_rng(seed).standard_normal((2, draws, len(runs)))
    out = []
    for k in range(1, len(order) + 1):
        kept = (experts <= 1) | np.isin(experts, order[:k])
        if not np.any(kept & repeats & extra):
            continue
        grid = runs.take(kept)
        for s in seeds:
            out.append(_power(grid, seed_sd, s, tuple(sorted(order[:k])), noise[:, :, kept]))
            if out[-1].power >= wanted:
                break
    return out


def needed(table: Sequence[Power], wanted: float = WANTED) -> str:
    """What is enough, in a sentence: the fewest runs with which both truths are told."""
    enough = [p for p in table if p.power >= wanted]
    if not enough:
        best = max(table, key=lambda p: p.power)
        return (
            f"no grid tells tau = 0 from tau = 1 in {wanted:.0%} of the draws; the best, of "
            f"{best.runs} runs, does in {best.power:.0%}"
        )
    least = min(enough, key=lambda p: p.runs)
    counts = ", ".join(map(str, least.experts))
    return (
        f"{least.runs} runs are enough to tell tau = 0 from tau = 1 in {wanted:.0%} of the draws: "
        f"{least.seeds} seed{'s' * (least.seeds > 1)} of every cell, experts {counts}"
    )


def shown(table: Sequence[Power], seed_sd: float) -> Table:
    """A row for each number of seeds and experts; intervals of 95 % in brackets."""
    if not table:
        raise UserError("--power: no planned run with experts repeats its data")
    terms = ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items())
    title = (
        f"tau = 0 or 1: share of {table[0].draws} draws in which the wrong one is ruled out (seed "
        f"sd {seed_sd:g} in ln L; terms of the loss {terms})"
    )
    made = Table(title=title, title_justify="left")
    for name in ("experts", "seeds", "runs", "truth 0", "truth 1", "false alarms"):
        made.add_column(name, justify="left" if name == "experts" else "right")
    for p in table:
        cells = [", ".join(map(str, p.experts)), str(p.seeds), str(p.runs)]
        for of in (p.told[0], p.told[1], max(p.false_alarms.values())):
            cells.append("{:.0%} ({:.0%} .. {:.0%})".format(*of))
        add_row(made, *cells)
    return made


def _dense() -> dict[str, np.ndarray]:
    return {"params": np.ones(1), "experts": np.ones(1), "total_params": np.ones(1)}


def _power(
    grid: Runs, seed_sd: float, seeds: int, experts: tuple[int, ...], noise: np.ndarray
) -> Power:
    planned = Runs({**grid.columns, "loss": np.ones(len(grid))}, grid.source)
    law = law_for("joint", planned.columns)
    setup = prepare(law, planned, math.inf, law.defaults)
    # seeds of a cell are one observation of as many times the weight
    problem = replace(
        setup.problem,
        weights=np.full(len(grid), float(seeds)),
        prior_scale=seed_sd**2,
        low=np.where([p.linear for p in law.parameters], -40.0, setup.problem.low),
        high=np.where([p.linear for p in law.parameters], 40.0, setup.problem.high),
    )
    told: dict[int, tuple[float, float, float]] = {}
    alarms: dict[int, tuple[float, float, float]] = {}
    for truth in (0, 1):
        theta = _truth(setup, float(truth))
        log_loss = law.log_loss(theta[None], problem.x) + seed_sd / math.sqrt(seeds) * noise[truth]
        free, tau = _lowest(problem, theta, log_loss, None)
        for held, found in ((1 - truth, told), (truth, alarms)):
            at_held, _ = _lowest(problem, theta, log_loss, float(held))
            ratio = 2.0 * (at_held - free) / seed_sd**2
            side = tau > held if held == 0 else tau < held
            hits = int(((ratio > chi2.ppf(LEVEL, 1)) & side).sum())
            found[truth] = (hits / len(noise[truth]), *_interval(hits, len(noise[truth])))
    return Power(seeds, experts, len(grid) * seeds, noise.shape[1], told, alarms)


def _truth(setup: Setup, tau: float) -> np.ndarray:
    """Internal parameters at which losses are simulated, `[K]`; the mean loss is 1."""
    law, x = setup.law, setup.problem.x
    theta = setup.template.copy()
    for name, value in EXPONENTS.items():
        k = law.index(name)
        if setup.problem.free[k]:
            theta[k] = law.parameters[k].internal(value)
    theta[TAU] = tau
    linear = [k for k, p in enumerate(law.parameters) if p.linear]
    theta[linear] = 0.0
    for k, (log_term, _) in zip(linear, law.terms(theta[None], x), strict=True):
        seen = log_term[0][np.isfinite(log_term[0])]
        theta[k] = math.log(SHARES[law.names[k]]) - math.log(float(np.exp(seen).mean()))
    return theta


def _lowest(
    problem: Problem, truth: np.ndarray, log_loss: np.ndarray, held: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Objective and tau of the best fit of every row of `log_loss [B, n]`, tau held or free."""
    free = problem.free.copy()
    free[TAU] = held is None
    rows = replace(problem, log_loss=log_loss, free=free)
    values, taus = [], []
    for start in STARTS if held is None else (held,):
        theta = np.repeat(truth[None], len(log_loss), axis=0)
        theta[:, TAU] = start
        found = minimise(rows, theta, max_iterations=ITERATIONS)
        values.append(found.value)
        taus.append(found.theta[:, TAU])
    best = np.argmin(values, axis=0)
    row = np.arange(len(log_loss))
    return np.array(values)[best, row], np.array(taus)[best, row]


def _interval(hits: int, draws: int) -> tuple[float, float]:
    """Clopper & Pearson's interval of a share."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, draws - hits + 1))
    high = 1.0 if hits == draws else float(beta.ppf(1 - tail, hits + 1, draws - hits))
    return low, high
