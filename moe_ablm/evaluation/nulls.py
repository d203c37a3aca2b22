"""Null models: a model that has learned nothing, and routers that know position alone.

`untrained` is the same encoder, initialised afresh, for every evaluation. The other two are nulls
of experts: `position-only` routes by smooth random functions of the place in a chain,
`shuffled` gives each chain the routing of another antibody's chain of the same length, so that what
depends on the position stays, and what depends on the residues goes.
"""

from dataclasses import replace

import numpy as np
from flax import nnx

from moe_ablm.inference.buckets import Engine
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import Execution

POSITION, SHUFFLED, UNTRAINED = "position-only", "shuffled", "untrained"
NULLS = (POSITION, SHUFFLED, UNTRAINED)
ROUTED = (POSITION, SHUFFLED)  # nulls of a router: they have no predictions


def seed_of(engine: Engine) -> int:
    """Seed of a model's nulls: other seeds of a kind have other ones, independent of theirs."""
    return int(engine.model.digest()[:8], 16)


def untrained(engine: Engine, seed: int | None = None) -> Engine:
    """The same encoder as training starts it, from a seed, or one that the weights decide."""
    model, start = engine.model, seed_of(engine) if seed is None else seed
    engine.parameters()  # before a large encoder is made in vain
    params = nnx.split(Encoder(model.spec, Execution(), nnx.Rngs(params=start)))[1]
    source = f"{UNTRAINED}: the encoder of {model.source}"
    return engine.with_model(replace(model, params=params, source=source, facts={}))


def generator(engine: Engine, purpose: str) -> np.random.Generator:
    """Random numbers of a model's null."""
    return np.random.default_rng([seed_of(engine), *purpose.encode()])
