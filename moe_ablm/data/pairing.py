"""A joint distribution of heavy and light V genes with a known strength of pairing."""

import numpy as np


def gene_frequencies(gene_usage: dict[str, float]) -> np.ndarray:
    """Frequencies of the genes of a usage table, in the order of their names."""
    weights = np.array([gene_usage[gene] for gene in sorted(gene_usage)], float)
    return weights / weights.sum()


def tilted_pairing(heavy: np.ndarray, light: np.ndarray, tilt: float) -> np.ndarray:
    """Joint probability `[H, L]` with the marginals `heavy` `[H]` and `light` `[L]`.

    In the order of falling frequency, the genes of either chain go by turns to one of two classes.
    The joint probability of genes h and l is a_h b_l exp(+tilt / 2) where their classes agree and
    a_h b_l exp(-tilt / 2) where they differ; a and b are such that the marginals hold (Sinkhorn
    1967, Am. Math. Mon. 74:402). So the log odds ratio of any two genes of different classes on
    either side is 2 tilt, tilt 0 is independence, and the mutual information stays below one bit.
    """
    agree = np.equal.outer(_classes(heavy), _classes(light))
    kernel = np.exp(tilt * (agree - 0.5))
    b = np.ones(len(light))
    for _ in range(10_000):
        a = heavy / (kernel @ b)
        previous, b = b, light / (a @ kernel)
        if np.allclose(previous, b, rtol=1e-13, atol=0):
            break
    return a[:, None] * kernel * b


def _classes(frequencies: np.ndarray) -> np.ndarray:
    rank = np.empty(len(frequencies), np.int64)
    rank[np.argsort(-frequencies, kind="stable")] = np.arange(len(frequencies))
    return rank % 2


def mutual_information(joint: np.ndarray) -> float:
    """Mutual information in bits of a joint probability `[H, L]`."""
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    bits = (joint[positive] * np.log2(joint[positive] / independent[positive])).sum()
    return max(float(bits), 0.0)  # rounding can leave an independent table just below zero
