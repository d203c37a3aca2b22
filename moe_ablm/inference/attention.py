"""Cross-chain attention: weights between the residues of the heavy and the light chain."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.errors import ArgumentError, UserError
from moe_ablm.inference.buckets import Batch, Engine, Task
from moe_ablm.inference.output import vectors
from moe_ablm.model.encoder import Encoder, Observe


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of a layer, counted from 0: float32 `[B, H, queries, keys]`."""

    layer: int

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        return _weights(encoder, batch)[self.layer]


@dataclass(frozen=True)
class MeanAttentionWeights:
    """Mean over heads of the attention weights of a layer, or of all layers (None): `[B, L, L]`."""

    layer: int | None

    def __call__(self, encoder: Encoder, batch: Batch) -> jax.Array:
        weights = _weights(encoder, batch)
        if self.layer is not None:
            return weights[self.layer].mean(1)
        first, *others = (each.mean(1) for each in weights)
        return sum(others, first) / len(weights)


def _weights(encoder: Encoder, batch: Batch) -> tuple[jax.Array, ...]:
    return encoder(batch.tokens, batch.valid, observe=Observe(attention=True)).attention


class CrossAttention(NamedTuple):
    """Attention weights between the chains of one antibody.

    The softmax is over all tokens of the row, so the weights of a residue sum to less than 1.

    Attributes:
      heavy_to_light: float32 `[H, heavy residues, light residues]`, queries before keys; without
        `H` if it is a mean over heads.
      light_to_heavy: `[H, light residues, heavy residues]`.
    """

    heavy_to_light: np.ndarray
    light_to_heavy: np.ndarray


def attention_layer(layer: int, layers: int) -> int:
    """The index of a layer that is counted from 0 or, if negative, from the end.

    Raises:
      UserError: there is no such layer.
    """
    if not -layers <= layer < layers:
        expected = f"expected 0 to {layers - 1}, or -1 (the last layer) to {-layers}"
        raise ArgumentError("layer", layer, expected)
    return layer % layers


def needs_both(antibody: Antibody) -> str | None:
    """The reason to refuse an antibody of one chain; None for a pair."""
    if len(antibody.chains()) == 2:
        return None
    return "one chain only: attention between chains needs a heavy and a light one"


def attention(
    engine: Engine, antibodies: Sequence[Antibody], layer: int = -1
) -> list[CrossAttention]:
    """Attention of a layer between the two chains of each antibody, in the order given.

    Raises:
      UserError: an antibody has one chain, or there is no such layer.
    """
    task = AttentionWeights(attention_layer(layer, engine.model.spec.layers))
    weights = dict(_between_chains(engine, antibodies, task))
    return [weights[index] for index in range(len(antibodies))]


def mean_attention(
    engine: Engine, antibodies: Sequence[Antibody], layer: int | None = None
) -> Iterator[tuple[int, CrossAttention]]:
    """Yields (index of the antibody, mean attention over heads) in any order.

    Memory is bounded: weights are computed batch by batch and not kept.

    Args:
      engine: the model.
      antibodies: pairs.
      layer: see `attention_layer`; None: the mean over all layers.

    Raises:
      UserError: an antibody has one chain, or there is no such layer.
    """
    if layer is not None:
        layer = attention_layer(layer, engine.model.spec.layers)
    yield from _between_chains(engine, antibodies, MeanAttentionWeights(layer))


def _between_chains(
    engine: Engine, antibodies: Sequence[Antibody], task: Task
) -> Iterator[tuple[int, CrossAttention]]:
    for antibody in antibodies:
        if reason := needs_both(antibody):
            raise UserError(f"{antibody.where or 'antibody'}: {antibody.name}: {reason}")
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    for index, weights in engine.run(task, [row.tokens for row in rows]):
        heavy, light = np.split(rows[index].places, [len(antibodies[index].heavy)])
        pairs = (heavy, light), (light, heavy)
        yield index, CrossAttention(*(weights[..., q[:, None], k] for q, k in pairs))


def bytes_of(engine: Engine, antibody: Antibody) -> int:
    """Estimate of the bytes of an antibody's table."""
    return 2 * len(antibody.heavy) * len(antibody.light) * (4 * engine.model.spec.heads + 64)


def table(engine: Engine, antibodies: Sequence[Antibody], layer: int, heads: bool) -> pa.Table:
    """A table with a line for each pair of residues of different chains, in both directions.

    The column `weight` is the mean over heads. `heads` adds the column `heads [H]`.
    """
    parts = []
    for antibody, cross in zip(antibodies, attention(engine, antibodies, layer), strict=True):
        for query, key, weights in (
            ("heavy", "light", cross.heavy_to_light),
            ("light", "heavy", cross.light_to_heavy),
        ):
            h, queries, keys = weights.shape
            at, seen = np.indices((queries, keys)).reshape(2, -1)
            n = queries * keys
            columns = {
                "sequence_id": np.repeat(antibody.name, n),
                "query_chain": np.repeat(query, n),
                "query_position": at + 1,
                "key_chain": np.repeat(key, n),
                "key_position": seen + 1,
                "weight": weights.mean(0).reshape(-1),
            }
            if heads:
                columns["heads"] = vectors(weights.reshape(h, n).T)
            parts.append(pa.table(columns))
    return pa.concat_tables(parts)
