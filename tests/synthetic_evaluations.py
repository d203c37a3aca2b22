"""Directories of `evaluate` without a model: numbers made by hand, written as the verb does."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from moe_ablm.data.regions import region_names
from moe_ablm.evaluation import suite
from moe_ablm.evaluation.declared import RESTS_ON
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.nulls import NULLS
from moe_ablm.evaluation.outcome import Outcome, Skipped
from moe_ablm.evaluation.reporting import report
from moe_ablm.evaluation.reporting.results import IDENTITY, write_results
from moe_ablm.evaluation.suite import SCHEMA

COMMAND = ["python", "-m", "moe_ablm", "evaluate", "--run", "runs/<x>"]
UNITS = [f"clone {i}" for i in range(300)]


def about(router: str = "none", sha256: str = "0", **changes) -> dict:
    """Of a model; `changes` of what is compared, or of the model by name."""
    model = {
        "source": f"runs/{router} <{sha256}>, step 500",
        "sha256": sha256,
        "regime": "paired",
        "router": router,
        "params_total": 1000 if router == "none" else 3000,
        "params_active": 1000,
        "tokens_seen": 10**6,
    }
    content = {
        "schema": SCHEMA,
        "model": model | {k: v for k, v in changes.items() if k in model},
        "dataset": {"path": "data/pairs", "sha256": "d" * 64},
        "files": {},
        "seed": 0,
        "precision": "float32",
        "claims": list(RESTS_ON),
    }
    return content | {k: v for k, v in changes.items() if k not in model}


def loss_outcome(effect: float, model: int, regions=("all", "CDRH3"), noise: float = 0.05):
    """Loss by region: difficulty of an antibody (the same for all models), effect, own noise."""
    shared, own = np.random.default_rng(7), np.random.default_rng([11, model])
    weight = shared.integers(5, 30, len(UNITS)).astype(float)
    samples = []
    for region in regions:
        difficulty = 2 + 0.5 * shared.standard_normal(len(UNITS))
        mean = difficulty + effect + noise * own.standard_normal(len(UNITS))
        labels = {"test set": "paired", "region": region}
        samples.append(Sample("loss", UNITS, mean * weight, weight, labels, unit="nats"))
        samples.append(Sample("perplexity", UNITS, mean * weight, weight, labels, scale="exp"))
    return Outcome(samples)


def gain_outcome(gain: float, spread: float = 0.5) -> Outcome:
    """Gains of native partners of masked light chains, over random ones."""
    values = gain + spread * np.random.default_rng(3).standard_normal(len(UNITS))
    labels = {"masked": "light", "partner": "random"}
    return Outcome([Sample("gain", UNITS, values, np.ones(len(UNITS)), labels, unit="nats")])


def routing_outcome(value: float, half: float, order: tuple[int, ...] = (0, 1, 2)) -> Outcome:
    """Numbers of the first claim; three experts with profiles, numbered in some order."""
    labels = {"matched": "chain and residue"}
    names = [(f"cdrh3_{metric}", {}) for metric in ("excess", "over_others")]
    names += [
        (f"beyond_null_{metric}", {"region": "CDRH3", "null": null})
        for metric in ("excess", "over_others")
        for null in NULLS
    ]
    numbers = [
        Number(metric, value, labels | more, value - half, value + half, 500)
        for metric, more in names
    ]
    profiles = np.random.default_rng(5).standard_normal((3, 14))
    for expert, profile in zip(order, profiles, strict=True):
        for region, enrichment in zip(region_names(), profile, strict=True):
            about = {"layer": "1", "expert": str(expert), "trait": "region", "class": region}
            numbers.append(Number("enrichment", float(enrichment), about, unit="log2"))
    return Outcome(numbers=numbers)


@dataclass(frozen=True)
class Settings:
    """Of every evaluation made by hand."""

    antibodies: int = 300


def write_evaluation(directory: Path, content: dict, **outcomes: Outcome | str) -> Path:
    """Outcomes by evaluation; a text: why it was skipped."""
    modules = {name: _module(name, outcome) for name, outcome in outcomes.items()}
    directory.mkdir(parents=True)
    (directory / IDENTITY).write_text(json.dumps(content))
    with (
        mock.patch.object(suite, "module_of", modules.get),
        mock.patch.object(report, "module_of", modules.get),
    ):
        found = suite.run_suite(None, dict.fromkeys(outcomes, Settings()), directory, str)
        write_results(directory, content, found, COMMAND)
    return directory


def _module(name: str, outcome: Outcome | str) -> SimpleNamespace:
    def evaluate(subject, settings):
        if isinstance(outcome, str):
            raise Skipped(outcome)
        return outcome

    about = f"What {name} asks <of> everybody."
    return SimpleNamespace(TITLE=name.title(), __doc__=about, Settings=Settings, evaluate=evaluate)
