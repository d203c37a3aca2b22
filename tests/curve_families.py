"""Simulated curves of known families, for the tests of their clusters."""

import numpy as np


def families(seed, kinds, each, irregular=False):
    """Steps, values and family of `each` curves of every kind.

    Losses of kind 1 end higher than those of kind 0, those of kind 2 lower. A curve has a smooth
    deviation of its own (a Gaussian process, sd .04) and white noise (sd .02). Irregular: every
    curve has other steps, and ends between 60 and 100 % of the way.
    """
    random = np.random.default_rng(seed)
    steps, values, truth = [], [], []
    for kind in kinds:
        for _ in range(each):
            s = np.arange(40, 1001, 40)
            if irregular:
                end = random.integers(600, 1001)
                s = np.sort(random.choice(np.arange(1, end), random.integers(10, 30), False))
            steps.append(s)
            apart = (s[:, None] - s) / 400
            smooth = np.exp(-0.5 * apart**2) + 1e-9 * np.eye(s.size)
            own = 0.04 * np.linalg.cholesky(smooth) @ random.standard_normal(s.size)
            values.append(family_mean(kind, s) + own + 0.02 * random.standard_normal(s.size))
            truth.append(kind)
    return steps, values, np.array(truth)


def family_mean(kind, steps):
    x = steps / 1000
    extra = (0.0 * x, 0.35 * np.tanh(2 * x), -0.25 * np.tanh(4 * x))[kind]
    return 1.0 + 2.0 * np.exp(-steps / 150) + extra


def right_share(labels, truth):
    """Share of curves in the cluster of their family, clusters matched to families one to one."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((max(labels.max(), truth.max()) + 1,) * 2)
    np.add.at(table, (labels, truth), 1)
    row, column = linear_sum_assignment(-table)
    return table[row, column].sum() / truth.size
