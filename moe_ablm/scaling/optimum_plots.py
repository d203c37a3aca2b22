"""The figure of N_opt and D_opt against training compute: of isoFLOP minima, of a surface."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from moe_ablm.scaling.parabola_fit import ParabolaFit
from moe_ablm.scaling.resampling import Bootstrap
from moe_ablm.scaling.result import SmoothFit

REACH = 1e3  # times beyond the runs that an optimum is drawn


def optimum_of_budgets(made: ParabolaFit) -> Figure:
    """N_opt and D_opt of each budget against C, with their bars and lines."""
    figure, panels = _optimum_panels()
    stars, lines = (("N_star", "slope"), ("D_star", "slope_tokens")), ("", "_tokens")
    for axes, (star, slope), line in zip(panels, stars, lines, strict=True):
        found = {k: v for k, v in made.derived.items() if k.startswith(star)}
        for name, value in found.items():
            axes.plot(budget := float(name[7:-1]), value, "o", ms=4, color="C0")
            ends = made.intervals.get(name, ())
            for low, high in [(i.low, i.high) for i in ends if i.low and i.high]:
                axes.plot([budget, budget], [low, high], "-", lw=1, color="C0")
        budgets = np.array([float(name[7:-1]) for name in found])
        if slope in made.coefficients and found:
            reach = np.geomspace(budgets.min() / 1.5, budgets.max() * 1.5, 50)
            at = made.coefficients["intercept" + line] + made.coefficients[slope] * np.log(reach)
            label = f"C^{made.coefficients[slope]:.3g}"
            axes.plot(reach, np.exp(at), "r-", lw=1.3, label=label)
            axes.legend(fontsize=7)
        if found:  # an open bar would take the axis with it
            values = np.array(list(found.values()))
            axes.set_ylim(values.min() / 4, values.max() * 4)
    return figure


def optimum_of_surface(made: SmoothFit, boot: Bootstrap | None) -> Figure | None:
    """N_opt and D_opt of a surface against C, with the band of the bootstrap draws.

    None where the law derives no best size from a compute. What lies more than `REACH` times
    beyond the runs, as of draws with exponents near 0, is not drawn: the axis would show it alone.
    """
    if _optimum(made, "N_opt", 1.0) is None:
        return None
    figure, panels = _optimum_panels()
    flops = np.geomspace(made.runs.flops().min(), made.runs.flops().max(), 30)
    draws = made.theta[None] if boot is None else boot.usable[:1000]
    for axes, name, role in zip(panels, ("N_opt", "D_opt"), ("params", "tokens"), strict=True):
        found = [f for c in flops if (f := _optimum(made, name, c))]
        logs = np.array([[f(made.theta[None])[0], *_ends(f(draws))] for f in found])
        ran = np.log(made.runs[role])
        low, high = ran.min() - np.log(REACH), ran.max() + np.log(REACH)
        line = np.where((logs[:, 0] > low) & (logs[:, 0] < high), logs[:, 0], np.nan)
        axes.plot(flops, np.exp(line), "r-", lw=1.3)
        if boot is not None:
            ends = np.exp(np.clip(logs[:, 1:], low, high))
            axes.fill_between(flops, ends[:, 0], ends[:, 1], color="r", alpha=0.18, lw=0)
    return figure


def _optimum(made: SmoothFit, name: str, flops: float) -> Callable[[np.ndarray], np.ndarray] | None:
    """The log of a derived quantity at a compute, as a function of the coefficients."""
    derived = made.law.derived(made.centre, {"flops": flops})
    return next((q.function for q in derived if q.name == name), None)


def _ends(values: np.ndarray) -> np.ndarray:
    return np.nanpercentile(values, [2.5, 97.5])


def _optimum_panels() -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(7.0, 3.2))
    panels = figure.subplots(1, 2)
    for axes, label in zip(panels, ("N_opt (parameters)", "D_opt (tokens)"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel=label)
    return figure, panels
