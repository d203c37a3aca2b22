"""What is evaluated: evaluations in their order, with settings that differ from the defaults.

    python -m moe_ablm evaluate --run runs/top2 --input data/pairs --suite configs/evaluation.py \
        --data specificity=specificity.csv.gz --data therapeutic=therapeutic_mabs.csv \
        --data proteins=gb1/splits.zip --out evaluation/top2

It takes about five minutes for an encoder of a million parameters on two cores. Write your own
suite as such a file; an evaluation without settings is an empty mapping. `claims` are named before
anything runs, and only these get a verdict from the verb compare. docs/evaluation.md has names and
settings.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Smaller than the defaults, which `--suite all` has."""
    return ConfigDict(
        {
            "claims": ["specialisation", "pairing", "experts"],
            "perplexity": {"antibodies": 1000, "repeats": 2},
            "positions": {"antibodies": 60},
            "mutations": {"antibodies": 400},
            "attention": {"antibodies": 400},
            "embeddings": {"antibodies": 1000},
            "routing": {"antibodies": 600},
            "pairing": {"antibodies": 600},
            "classification": {"most": 300},
            "proteins": {"train": 300, "test": 200, "splits": "sampled"},
        }
    )
