"""The figure of laws of the train-valid gap."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from moe_ablm.scaling.compute_plots import MARKERS

if TYPE_CHECKING:
    from moe_ablm.scaling.selection import Analysis


def gap_against_repeats(analysis: "Analysis") -> Figure:
    """Gaps against epochs, and against what the law predicts; a marker a kind of model."""
    fit = analysis.fit
    runs = fit.runs
    observed = runs["loss"] - fit.law.offset
    epochs = np.maximum(runs["tokens"] / runs["unique_tokens"], 1.0)
    predicted = fit.law.predict(fit.coefficients, runs.inputs())
    router = runs["router"] if "router" in runs else np.full(len(runs), "runs")
    figure = Figure(figsize=(6.4, 3.2))
    left, right = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(np.unique(router.astype(str))):
        mine, marker = router == name, MARKERS[i % len(MARKERS)]
        left.plot(epochs[mine], observed[mine], marker, ms=3.5, alpha=0.7, label=name)
        right.plot(predicted[mine], observed[mine], marker, ms=3.5, alpha=0.7)
    ends = [predicted.min(), predicted.max()]
    right.plot(ends, ends, "-", color="0.4", lw=0.8)
    left.set(xscale="log", xlabel="epochs D/U", ylabel="validation - training loss (nats)")
    right.set(xlabel="gap of the law (nats)")
    left.legend(fontsize=7)
    return figure
