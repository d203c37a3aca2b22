"""What a run has had of its learning-rate schedule: the area under it, and the rate of late.

Of update t with rates eta: the area S1 = sum of eta_1 ... eta_t, and the recent rate
r_t = m r_(t-1) + (1 - m) eta_t, which starts at the peak. With Tissue et al. 2024 (arXiv
2408.11029) the area of annealing is S2 = (peak - r_t) / (1 - m), m their lambda: what annealing has
taken off the rate.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

MEMORY = 0.99  # lambda; the paper finds .99 to .999
FALLS, RISES = 24, 16  # groups of the drops of a schedule, and of its rises
SMALLEST_RATE = 1e-6  # of the peak: a rate of 0 has no logarithm
NEVER = -1e3  # ln of no area at all
KEYS = ("steps", "lr", "warmup", "schedule", "decay_share")  # of `config.train`; `restarts`, too


def rates(train: Mapping[str, Any]) -> np.ndarray:
    """Learning rate of every update `[steps]`, of the keys `KEYS` of a run's `config.train`.

    The first warm-up counts at the peak, as in the paper: a short one costs no progress. After each
    of `restarts` the rate does rise from 0.

    Raises:
      ValueError: there is no such schedule.
    """
    ends = (*map(int, train.get("restarts") or ()), int(train["steps"]))
    courses = [_course(train, end - begin) for begin, end in pairwise((0, *ends))]
    warmup = int(train["warmup"])
    for course in courses[1:]:
        course[:warmup] *= np.arange(min(warmup, course.size)) / max(warmup, 1)
    return np.concatenate(courses)


def _course(train: Mapping[str, Any], steps: int) -> np.ndarray:
    """Rates from one warm-up, which counts at the peak, to the next."""
    warmup = int(train["warmup"])
    done = np.arange(steps) - warmup  # since the warm-up
    rest = max(steps - warmup, 1)
    if train["schedule"] == "linear":
        share = 1.0 - done / rest
    elif train["schedule"] == "cosine":
        share = 0.5 * (1.0 + np.cos(np.pi * done / rest))
    elif train["schedule"] == "constant":
        share = np.ones(steps)
    elif train["schedule"] == "wsd":
        decay = max(round(float(train["decay_share"]) * steps), 1)
        share = (rest - done) / decay
    else:
        raise ValueError(f"schedule {train['schedule']!r} is not known")
    return float(train["lr"]) * np.where(done < 0, 1.0, np.clip(share, 0.0, 1.0))


def path_of(eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area and recent rate after every update, both `[steps]`; the first rate is the peak."""
    from scipy.signal import lfilter

    recent, _ = lfilter([1.0 - MEMORY], [1.0, -MEMORY], eta, zi=[MEMORY * eta[0]])
    return np.cumsum(eta), recent


def history(eta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What the multi-power law needs of the rates up to each of `steps`, `[n, nodes, 3]`.

    A node is a drop of the rate eta_(k-1) - eta_k, ln eta_k, and ln of the area since,
    S_k = eta_k + ... + eta_t (Luo et al. 2025, arXiv 2503.12811); the first node is the rate of
    now, which no area has passed since. The law's kernel is smooth in both logs, so drops next to
    each other share one of `FALLS` nodes, and rises one of `RISES`.
    """
    area, smallest = np.cumsum(eta), SMALLEST_RATE * eta.max()
    drop = np.concatenate([[0.0], eta[:-1] - eta[1:]])
    log_rate = np.log(np.maximum(eta, smallest))
    out = np.zeros((len(steps), 1 + FALLS + RISES, 3))
    out[:, 0] = np.stack([eta[steps - 1], 0.0 * steps, np.full(len(steps), NEVER)], axis=1)
    for row, t in zip(out, steps, strict=True):
        since = np.log(np.maximum(area[t - 1] - area[:t] + eta[:t], smallest))
        for k, nodes in (
            (np.flatnonzero(drop[:t] > 0.0), row[1 : 1 + FALLS]),
            (np.flatnonzero(drop[:t] < 0.0), row[1 + FALLS :]),
        ):
            if k.size:
                nodes[:] = _nodes(drop[k], log_rate[k], since[k], len(nodes))
    return out


def _nodes(drop: np.ndarray, log_rate: np.ndarray, log_since: np.ndarray, count: int) -> np.ndarray:
    """Drops `[k]` of one sign as `[count, 3]`: sums, and means that are weighted by the drops.

    A node of drops of mass m that extends over w in the logs of rate and area errs by some m w^2:
    the sum over nodes is least where each has as much of (dm)^(1/3) (dw)^(2/3) (Panter, Dite 1951).
    """
    share = drop / drop.sum()
    wide = np.abs(np.diff(log_since, prepend=log_since[0]))
    wide += np.abs(np.diff(log_rate, prepend=log_rate[0]))
    way = np.cbrt(share * np.maximum(wide, 1e-9) ** 2)
    node = np.minimum((np.cumsum(way) / way.sum() * count).astype(int), count - 1)
    mass = np.maximum(np.bincount(node, share, count), 1e-300)
    means = [np.bincount(node, share * v, count) / mass for v in (log_rate, log_since)]
    return np.stack([np.bincount(node, drop, count), *means], axis=1)
