"""The encoder: ESM-2's architecture (Lin et al. 2023), with experts in place of some FFNs.

Parameters are kept layer by layer; running equal layers under `lax.scan` is a way to execute them
(`Execution.scan`), not a way to store them, so checkpoints do not depend on it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_ablm.model.attention import Packing, SelfAttention
from moe_ablm.model.ffn import FeedForward, gelu
from moe_ablm.model.layers import LayerNorm, Linear, constant, normal
from moe_ablm.model.moe import MoE, Routed
from moe_ablm.model.spec import EncoderSpec, Execution

MASK_TOKEN = 32  # of data.tokenizer, whose vocabulary is ESM-2's
TRAINED_MASK_RATIO = 0.15 * 0.8  # share of <mask> that token_dropout assumes in training


class Output(NamedTuple):
    """Result of an encoder: `logits [B, L, V]`; with M MoE layers, their routing `[M, ...]`."""

    logits: jax.Array
    routing: Routed | None


class Context(NamedTuple):
    """What every layer is told beside its input: `valid [B, L]`, and how rows are packed."""

    valid: jax.Array
    packing: Packing | None = None


class Block(nnx.Module):
    """One pre-LN transformer layer, dense or with experts."""

    def __init__(self, spec: EncoderSpec, sparse: bool, execution: Execution, rngs: nnx.Rngs):
        self.sparse = sparse
        self.attention_norm = LayerNorm(spec.d_model)
        self.attention = SelfAttention(spec, execution, rngs)
        self.ffn_norm = LayerNorm(spec.d_model)
        if sparse:
            self.ffn = MoE(spec, execution, rngs)
        else:
            self.ffn = FeedForward(spec, spec.ffn, execution, rngs)

    def __call__(
        self, x: jax.Array, context: Context, training: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routed | None]:
        """`x [B, L, D]` -> `[B, L, D]` and this layer's routing; `key` and `training`: of `MoE`."""
        x = x + self.attention(self.attention_norm(x), *context)
        y = self.ffn_norm(x)
        if not self.sparse:
            return x + self.ffn(y), None
        out, routed = self.ffn(y, *context, training, key)
        return x + out, routed


class LMHead(nnx.Module):
    """Dense, GELU, layer norm, and a decoder with a bias: the embedding, or one of its own."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        self.dense = Linear(spec.d_model, spec.d_model, "DF", execution, rngs)
        self.norm = LayerNorm(spec.d_model)
        self.bias = constant(0.0, (spec.vocabulary,), "V")
        self.decoder = None if spec.tied else normal(rngs, (spec.vocabulary, spec.d_model), "VD")

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """`x [B, L, D]`, `embedding [V, D]` -> float32 logits `[B, L, V]`."""
        x = self.norm(gelu(self.dense(x))).astype(jnp.float32)
        decoder = embedding if self.decoder is None else self.decoder[...]
        return jnp.dot(x, decoder.T, precision=jax.lax.Precision.HIGHEST) + self.bias[...]


class Encoder(nnx.Module):
    """Bidirectional encoder with a language-model head."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        self.spec, self.execution = spec, execution
        self.embedding = normal(rngs, (spec.vocabulary, spec.d_model), "VD")
        sparse = spec.moe_layers
        self.layers = nnx.List(
            [Block(spec, i in sparse, execution, rngs) for i in range(spec.layers)]
        )
        self.final_norm = LayerNorm(spec.d_model)
        self.head = LMHead(spec, execution, rngs)

    def embed(
        self, tokens: jax.Array, valid: jax.Array, packing: Packing | None = None
    ) -> jax.Array:
        """Token embeddings `[B, L, D]` of `tokens [B, L]`, in the dtype of activations.

        With token_dropout (ESM-2) the embeddings of <mask> are zeroed and the rest rescaled by
        (1 - 0.15 * 0.8) / (1 - observed mask ratio), antibody by antibody. Padding embeds to 0.
        """
        x = self.embedding[...][tokens]
        if self.spec.token_dropout:
            masked = (tokens == MASK_TOKEN) & valid
            if packing is None:
                counts = [a.sum(-1, keepdims=True) for a in (masked, valid)]
            else:
                counts = [(packing.same() & a[:, None, :]).sum(-1) for a in (masked, valid)]
            ratio = counts[0] / jnp.maximum(counts[1], 1)
            scale = (1 - TRAINED_MASK_RATIO) / jnp.maximum(1 - ratio, 1e-6)  # all masked: not NaN
            x = jnp.where(masked[..., None], 0.0, x) * scale[..., None]
        return (x * valid[..., None]).astype(self.execution.activations)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        packing: Packing | None = None,
        training: bool = False,
        key: jax.Array | None = None,
    ) -> Output:
        """Logits of every position.

        Args:
          tokens: integers `[B, L]`.
          valid: bool `[B, L]`, False at padding, which stands at the end of each row.
          packing: given when rows hold several antibodies, which then do not see each other.
          training: whether experts have a limited capacity; in inference token choice is dropless.
          key: of the routers' jitter; None: no jitter.
        """
        x, context = self.embed(tokens, valid, packing), Context(valid, packing)
        x, routing = self._run_layers(x, context, training, key)
        return Output(self.head(self.final_norm(x), self.embedding[...]), routing)

    def hidden_states(
        self, tokens: jax.Array, valid: jax.Array, packing: Packing | None = None
    ) -> list[jax.Array]:
        """Outputs `[B, L, D]` of the embedding and of each layer, the last one normalised."""
        x = self.embed(tokens, valid, packing)
        states = [x]
        for layer in self.layers:
            x, _ = layer(x, Context(valid, packing))
            states.append(x)
        return [*states[:-1], self.final_norm(states[-1])]

    def attention_weights(
        self, tokens: jax.Array, valid: jax.Array, packing: Packing | None = None
    ) -> list[jax.Array]:
        """Attention weights of each layer, float32 `[B, H, L, L]`."""
        x, weights = self.embed(tokens, valid, packing), []
        for layer in self.layers:
            weights.append(layer.attention.weights(layer.attention_norm(x), valid, packing))
            x, _ = layer(x, Context(valid, packing))
        return weights

    def _run_layers(
        self, x: jax.Array, context: Context, training: bool, key: jax.Array | None
    ) -> tuple[jax.Array, Routed | None]:
        keys = None if key is None else jax.random.split(key, len(self.layers))
        routings = []
        for start, period, repeats in self._runs():
            groups = [range(start + i, start + i + period) for i in _steps(period, repeats)]
            split = [[nnx.split(self.layers[i]) for i in group] for group in groups]
            definitions = [definition for definition, _ in split[0]]

            def body(x, states, definitions=definitions):
                found = []
                for definition, (state, key) in zip(definitions, states, strict=True):
                    x, routing = nnx.merge(definition, state)(x, context, training, key)
                    found += [] if routing is None else [routing]
                return x, _stack(found)

            if self.execution.remat:
                body = jax.checkpoint(body)
            states = [
                [
                    (state, None if keys is None else keys[i])
                    for i, (_, state) in zip(group, part, strict=True)
                ]
                for group, part in zip(groups, split, strict=True)
            ]
            if repeats == 1:
                x, found = body(x, states[0])
            else:
                x, found = jax.lax.scan(body, x, _stack(states))
                found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
            routings += [] if found is None else [found]
        if not routings:
            return x, None
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *routings)

    def _runs(self) -> list[tuple[int, int, int]]:
        """Layers as runs `(first layer, period, repeats)`; `repeats > 1` is scanned."""
        kinds = [layer.sparse for layer in self.layers]
        if not self.execution.scan:
            return [(i, 1, 1) for i in range(len(kinds))]
        runs, start = [], 0
        while start < len(kinds):
            counts = {p: _repeats(kinds[start:], p) for p in (1, 2)}
            period = max(counts, key=lambda p: p * counts[p] if counts[p] > 1 else p == 1)
            runs.append((start, period, counts[period]))
            start += period * counts[period]
        return runs


def _steps(period: int, repeats: int) -> range:
    return range(0, period * repeats, period)


def _repeats(kinds: list[bool], period: int) -> int:
    """How often the first `period` kinds follow each other from the start."""
    count = 1
    while kinds[count * period : (count + 1) * period] == kinds[:period] and len(kinds) >= period:
        count += 1
    return count


def _stack(trees: list):
    """Stacks equal pytrees along a new first axis; None for an empty list."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None
