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
