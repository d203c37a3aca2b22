"""Scaling laws from tables of runs: fits, intervals, model choice, designs and advice.

    from moe_ablm.scaling import read_runs, fit_law, load
    runs = read_runs(["runs.csv"])
    made = fit_law(runs, "chinchilla")
    made.predict(params=1e8, tokens=1e10)

Needs numpy and scipy (pyarrow for parquet, matplotlib for figures), never jax. Names are loaded
when they are first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "load": "result",
    "Fit": "result",
    "Interval": "result",
    "read_runs": "reading",
    "Reading": "reading",
    "Runs": "runs",
    "fit_law": "fit",
    "fit_parabolas": "parabola_fit",
    "fit_envelope": "envelope",
    "analyse": "selection",
    "Question": "selection",
    "bootstrap": "resampling",
    "profiles": "profile_likelihood",
    "compare": "selection",
    "check_design": "design",
    "advise": "advice",
    "next_runs": "ranking",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
