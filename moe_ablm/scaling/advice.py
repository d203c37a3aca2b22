"""The best model under limits of compute, memory and data, over bootstrap draws."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_ablm.errors import UserError
from moe_ablm.scaling.compute import along_sizes, excess
from moe_ablm.scaling.resampling import Bootstrap
from moe_ablm.scaling.result import SmoothFit
from moe_ablm.scaling.runs import Runs

SIZES = 96  # model sizes tried, log-spaced
BEYOND = 8.0  # the sizes reach this factor beyond those that were run
SHORTER = 0.5 ** np.arange(8)  # fractions of the affordable tokens that are tried
DRAWS = 200  # bootstrap draws that are evaluated
KIND = ("experts", "router", "granularity", "sparsity")


@dataclass(frozen=True)
class Limits:
    """Limits of a model; None is no limit.

    Training FLOPs; total parameters that fit in memory; unique tokens; FLOPs of a token at
    inference, a third of those of training.
    """

    flops: float
    total_params: float | None = None
    unique_tokens: float | None = None
    inference_flops: float | None = None


@dataclass(frozen=True)
class Advice:
    """The best model for each draw: arrays `[draws]`, and the kinds that `kind` indexes."""

    kinds: tuple[str, ...]
    kind: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    at_bound: np.ndarray  # the best size was the smallest or largest tried: an extrapolation
    memory_binds: np.ndarray
    repeats: np.ndarray  # epochs over the unique tokens


@dataclass(frozen=True)
class _Grid:
    """All candidates: columns for the law, and the kind of each row."""

    columns: Mapping[str, np.ndarray]
    kind: np.ndarray
    kinds: tuple[str, ...]
    edge: np.ndarray  # the smallest or largest size of the grid
    full: np.ndarray  # the largest size of its kind that memory allows


def advise(fit: SmoothFit, boot: Bootstrap, limits: Limits) -> Advice:
    """Minimises the law over (N, kind of model, D) under the limits, for each bootstrap draw.

    A kind is a combination of experts, router, granularity and sparsity that was run. Its ratio
    of total to active parameters is the median of its runs, and a token costs what the `flops` of
    its runs say (else 6 N). Fewer tokens than compute allows are tried too, because repeats may
    hurt. A law without unique tokens is trusted up to one epoch only: `unique_tokens` then limits
    the tokens.

    Raises:
      UserError: the law has no tokens or is of no loss, or no model fits the limits.
    """
    if fit.law.of_gap:
        raise UserError(
            f"--advise: law {fit.law.name} is of the train-valid gap, and the model of the least "
            "gap is not the best one; use a law of the loss, as joint"
        )
    if "tokens" not in fit.law.needs:
        raise UserError(f"--advise: law {fit.law.name} says nothing about tokens; use another law")
    for name, value in vars(limits).items():
        if value is not None and not value > 0:
            raise UserError(f"--advise: {name}={value}: expected a positive number")
    grid = _grid(fit, limits)
    x = fit.law.inputs(grid.columns, fit.centre)
    theta = boot.usable[:DRAWS]
    loss = np.concatenate([fit.law.log_loss(t, x) for t in np.array_split(theta, 20) if len(t)])
    best = np.argmin(loss, axis=1)
    columns = grid.columns
    unique = columns.get("unique_tokens", columns["tokens"])
    return Advice(
        kinds=grid.kinds,
        kind=grid.kind[best],
        params=columns["params"][best],
        tokens=columns["tokens"][best],
        loss=np.exp(loss[np.arange(best.size), best]),
        at_bound=grid.edge[best],
        memory_binds=grid.full[best],
        repeats=(columns["tokens"] / unique)[best],
    )


def _grid(fit: SmoothFit, limits: Limits) -> _Grid:
    runs = fit.runs
    kinds, ratios, values, members = _kinds(runs)
    settings = _settings(fit)
    log_c = excess(runs.columns)
    if limits.total_params and "total_params" not in runs and any(r != 1.0 for r in ratios):
        raise UserError("--max-params: the input has no total_params column to hold against it")
    low, high = runs["params"].min() / BEYOND, runs["params"].max() * BEYOND
    sizes = np.geomspace(low, high, SIZES)
    parts = []
    for i, (ratio, value) in enumerate(zip(ratios, values, strict=True)):
        per_token = 6.0 * sizes  # FLOPs of training on a token
        if log_c is not None:
            here = members[i]
            log_n = np.log(runs["params"][here])
            per_token *= np.exp(along_sizes(log_n, log_c[here], np.log(sizes)))
        fits = sizes * ratio <= (limits.total_params or math.inf)
        fits &= per_token / 3.0 <= (limits.inference_flops or math.inf)
        if not fits.any():
            continue
        n, share = (a.ravel() for a in np.meshgrid(sizes[fits], SHORTER))
        tokens = limits.flops / np.tile(per_token[fits], len(SHORTER)) * share
        cap = limits.unique_tokens or math.inf
        if "unique_tokens" not in fit.law.needs:
            tokens = np.minimum(tokens, cap)
        column = {
            "params": n,
            "total_params": n * ratio,
            "tokens": tokens,
            "unique_tokens": np.minimum(tokens, cap),
            **{k: np.full(n.size, v) for k, v in (value | settings).items()},
        }
        largest = sizes[fits].max()
        edge = (n <= low * 1.0001) | (n >= high * 0.9999)
        full = (n >= largest * 0.9999) & (largest < high * 0.9999)
        parts.append((column, np.full(n.size, i), edge, full))
    if not parts:
        flags = {
            "--max-params": limits.total_params,
            "--max-inference-flops": limits.inference_flops,
        }
        given = ", ".join(f"{flag} {value:g}" for flag, value in flags.items() if value)
        raise UserError(f"{given}: not even the smallest model tried fits")
    columns = {k: np.concatenate([p[0][k] for p in parts]) for k in parts[0][0]}
    kind, edge, full = (np.concatenate([p[j] for p in parts]) for j in (1, 2, 3))
    return _Grid(columns, kind, kinds, edge, full)


def _settings(fit: SmoothFit) -> dict[str, float]:
    """The covariates of the law, as the target has them."""
    given: Mapping[str, Any] = {**fit.target}
    missing = [name for name in fit.runs.covariates if name not in given]
    if missing:
        raise UserError(f"--advise: the loss depends on {missing[0]}; --target {missing[0]}=...")
    return {name: value for name, value in given.items() if name in fit.runs.covariates}


def _kinds(runs: Runs) -> tuple[tuple[str, ...], list[float], list[dict], list[np.ndarray]]:
    """Kinds of models that were run: name, total over active parameters, columns, its runs."""
    present = [k for k in KIND if k in runs]
    rows = list(zip(*(runs[k].tolist() for k in present), strict=True)) or [()] * len(runs)
    ratio = runs["total_params"] / runs["params"] if "total_params" in runs else np.ones(len(runs))
    names, ratios, values, runs_of = [], [], [], []
    for row in sorted(set(rows), key=str):
        value = dict(zip(present, row, strict=True))
        members = np.array([r == row for r in rows])
        names.append(
            ", ".join(f"{k} {v:g}" if isinstance(v, float) else str(v) for k, v in value.items())
            or "dense"
        )
        ratios.append(float(np.median(ratio[members])))
        values.append(value)
        runs_of.append(members)
    return tuple(names), ratios, values, runs_of


@dataclass(frozen=True)
class DataValue:
    """Best loss when the unique data are multiplied by `factor`: median and 95 % range."""

    factor: float
    unique_tokens: float
    loss: tuple[float, float, float]
    gain: tuple[float, float, float]  # over the step before, as a relative loss


def worth_of_data(
    fit: SmoothFit,
    boot: Bootstrap,
    limits: Limits,
    noise: float,
    tokens_per_pair: float | None = None,
) -> tuple[list[DataValue], str]:
    """The gain of each doubling of the unique data at fixed compute, and a sentence on it.

    A doubling is worth it while its median gain in ln L exceeds `noise`, the sd between seeds.
    """
    if limits.unique_tokens is None or "unique_tokens" not in fit.law.needs:
        return [], "The worth of more data needs a data-constrained law and --max-unique."
    out: list[DataValue] = []
    before = None
    stop = None
    for factor in 2.0 ** np.arange(9):
        unique = limits.unique_tokens * factor
        loss = advise(fit, boot, replace(limits, unique_tokens=unique)).loss
        gain = np.zeros_like(loss) if before is None else np.log(before) - np.log(loss)
        out.append(DataValue(float(factor), unique, _range(loss), _range(gain)))
        if before is not None and stop is None and np.median(gain) < noise:
            stop = factor / 2
        before = loss
    if stop is None:
        return (
            out,
            f"Every doubling up to {out[-1].factor:g} times the data gains more than seed noise.",
        )
    if stop == 1.0:
        return out, "More unique data gain less than seed noise at this compute."
    amount = f"{limits.unique_tokens * stop:.4g} tokens"
    if tokens_per_pair:
        amount += f", {limits.unique_tokens * stop / tokens_per_pair:,.0f} pairs"
    return out, (
        f"Up to {stop:g} times the unique data ({amount}) each doubling gains more than seed "
        f"noise ({noise:.1g} in ln L)."
    )


def _range(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, [2.5, 50, 97.5])
    return float(middle), float(low), float(high)
