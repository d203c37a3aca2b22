"""What is evaluated: evaluations in their order, with settings that differ from the defaults.

    python -m moe_ablm evaluate --run runs/8m --input data/pairs --suite all --out evaluation/8m
    python -m moe_ablm evaluate --run runs/8m --input data/pairs --suite configs/evaluation.py \
        --out evaluation/8m

A suite of one's own is such a file; an evaluation without settings is an empty mapping. Names and
settings: docs/evaluation.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Minutes for an encoder of a million parameters on two cores."""
    return ConfigDict(
        {
            "perplexity": {"antibodies": 1000, "repeats": 2},
        }
    )
