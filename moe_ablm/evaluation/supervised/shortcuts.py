"""A classifier that sees no sequence: what V genes, mutation counts and CDRH3 length give away."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.supervised.folds import cdr3_of, out_of_fold

BASELINE = "V genes, mutations, CDRH3 length"
PAIRED_BASELINE = "V genes and mutations of both chains"
BINS = (1, 2, 4, 8, 16)  # lower ends of the bins of mutation counts, the first being 0
LENGTHS = (5, 30)  # of CDRH3; what is shorter or longer counts as that


def mutation_bin(mutations: int) -> int:
    """0, 1, 2-3, 4-7, 8-15, or 16 and more mutations, as 0 to 5."""
    return int(np.searchsorted(BINS, mutations, side="right"))


def features(antibody: Annotated) -> dict[str, str]:
    """What the baseline knows of an antibody; everything is a category."""
    heavy, light = antibody.heavy, antibody.light
    known = {"CDRH3": str(np.clip(len(cdr3_of(heavy)), *LENGTHS))}
    for name, chain in antibody.chains():
        known[f"{name} V"] = chain.v_gene
        known[f"{name} mutations"] = str(mutation_bin(chain.mutations))
    return known if len(light) else known | {"light V": "none"}


def pair_features(antibody: Annotated) -> dict[str, str]:
    """What the baseline of pairing knows: genes, families and mutations of the chains together.

    Of one chain alone nothing is told: each is in a native and in a re-paired antibody.
    """
    heavy, light = antibody.heavy, antibody.light
    families = [gene.split("-")[0] for gene in (heavy.v_gene, light.v_gene)]
    bins = [mutation_bin(chain.mutations) for chain in (heavy, light)]
    return {
        "V genes": f"{heavy.v_gene} {light.v_gene}",
        "V families": f"{families[0]} {families[1]}",
        "mutations": f"{bins[0]} {bins[1]}",
    }


def predictions(
    known: Sequence[Mapping[str, str]], classes: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Out-of-fold class probabilities of logistic regression on one-hot features, `[n, C]`.

    Raises:
      Skipped: scikit-learn is not installed.
    """
    linear_model, extraction = require_sklearn()

    def predict(train: np.ndarray, held: np.ndarray) -> np.ndarray:
        table = extraction.DictVectorizer()
        x = table.fit_transform([known[i] for i in train])
        model = linear_model.LogisticRegression(max_iter=1000).fit(x, classes[train])
        found = np.zeros((len(held), classes.max() + 1))
        found[:, model.classes_] = model.predict_proba(table.transform([known[i] for i in held]))
        return found

    return out_of_fold(predict, folds)


def require_sklearn() -> tuple[Any, Any]:
    """Its modules `linear_model` and `feature_extraction`.

    Raises:
      Skipped: scikit-learn is not installed.
    """
    try:
        from sklearn import feature_extraction, linear_model
    except ImportError as error:
        raise Skipped("the baseline needs scikit-learn: pip install 'moe_ablm[eval]'") from error
    return linear_model, feature_extraction
