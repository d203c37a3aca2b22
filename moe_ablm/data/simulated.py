"""The embedded dataset: simulated antibodies, made on first use and kept in the user's cache."""

import hashlib
from pathlib import Path

from moe_ablm.cache import cache_directory
from moe_ablm.data.dataset import SCHEMA_VERSION
from moe_ablm.data.prepare import prepare_batches
from moe_ablm.data.simulate import SimulationParams, simulate
from moe_ablm.data.split import SALT


def simulated_dataset(pairs: int, seed: int = 0) -> Path:
    """Path of the dataset of `pairs` simulated antibodies; made when it is not in the cache."""
    settings = hashlib.sha256(repr((SimulationParams(), SALT)).encode()).hexdigest()[:8]
    path = cache_directory() / f"simulated-{pairs}-seed{seed}-{settings}-v{SCHEMA_VERSION}"
    if not path.exists():
        print(f"simulating {pairs:,} antibodies, once, into {path}")
        prepare_batches(
            simulate(pairs, seed), path, source="simulated", licence="none (simulated sequences)"
        )
    return path
