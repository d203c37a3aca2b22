"""Embeddings: hidden states of a layer, one for each residue, chain or antibody."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.errors import ArgumentError
from moe_ablm.inference.antibodies import labels
from moe_ablm.inference.buckets import Batch, Engine
from moe_ablm.inference.output import vectors
from moe_ablm.model.encoder import Encoder, Observe

LEVELS = ("antibody", "chain", "residue")


@dataclass(frozen=True)
class HiddenStates:
    """Output of a layer, float32 `[B, L, D]`; layer 0 is the embedding, the last is normalised."""

    layer: int

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        output = encoder(batch.tokens, batch.valid, observe=Observe(hidden=True))
        return output.hidden[self.layer].astype("float32")


def layer_number(layer: int, layers: int) -> int:
    """The index of a layer that is counted from 0 (the embedding) or, if negative, from the end.

    Raises:
      UserError: there is no such layer.
    """
    if not -layers - 1 <= layer <= layers:
        expected = f"0 (token embeddings) to {layers}, or -1 (the last layer) to {-layers - 1}"
        raise ArgumentError("layer", layer, f"expected {expected}")
    return layer % (layers + 1)


def embed(
    engine: Engine, antibodies: Sequence[Antibody], level: str = "residue", layer: int = -1
) -> list[np.ndarray]:
    """Embeddings of each antibody; special tokens are context, but are left out of the result.

    Args:
      engine: the model.
      antibodies: any number of them; all results are held in memory.
      level: one of `LEVELS`.
      layer: see `layer_number`.

    Returns:
      For each antibody float32 `[residues, D]`, `[chains, D]` or `[1, D]`, heavy chain first.

    Raises:
      UserError: there is no such layer.
    """
    task = HiddenStates(layer_number(layer, engine.model.spec.layers))
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    embeddings: list = [None] * len(rows)
    for index, states in engine.run(task, [row.tokens for row in rows]):
        states = states[rows[index].places]
        embeddings[index] = (
            states if level == "residue" else means(states, antibodies[index], level)
        )
    return embeddings


def means(states: np.ndarray, antibody: Antibody, level: str) -> np.ndarray:
    """Means over residues, float32 `[1 or chains, D]`.

    Args:
      states: `[residues, D]`.
      antibody: the antibody of the states.
      level: "antibody", or "chain" (heavy first; missing chains are left out).
    """
    parts = [states]
    if level == "chain":
        parts = np.split(states, np.cumsum([len(s) for _, s in antibody.chains()])[:-1])
    return np.stack([part.mean(0, dtype=np.float64) for part in parts]).astype(np.float32)


def table(
    engine: Engine, antibodies: Sequence[Antibody], level: str = "antibody", layer: int = -1
) -> pa.Table:
    """A table of `embedding [D]` of each antibody, chain or residue, and columns that name it."""
    embeddings = np.concatenate(embed(engine, antibodies, level, layer))
    columns: dict = {"sequence_id": [a.name for a in antibodies]}
    if level == "residue":
        columns = labels(antibodies)
    elif level == "chain":
        chains = [(a.name, chain) for a in antibodies for chain, _ in a.chains()]
        columns = {"sequence_id": [n for n, _ in chains], "chain": [c for _, c in chains]}
    return pa.table(columns | {"embedding": vectors(embeddings)})
