"""The encoder: ESM-2's architecture (Lin et al. 2023), with experts in place of some FFNs.

Those of ESM-1b (Rives et al. 2021), ESM-1v (Meier et al. 2021) and RoBERTa (Liu et al. 2019) differ
in positions and norms alone (`EncoderSpec`).

Parameters are stored layer by layer. `Execution.scan` runs equal layers under `lax.scan`, but does
not change how they are stored, so checkpoints do not depend on it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe_ablm.model.attention import Dropped, SelfAttention, take_position
from moe_ablm.model.dropout import drop, token_counters
from moe_ablm.model.layers import KEPT, FeedForward, LayerNorm, Linear, constant, gelu, normal
from moe_ablm.model.linear import wide
from moe_ablm.model.moe import MoE, Routed
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import EncoderSpec, Execution

MASK_TOKEN = 32  # of data.tokenizer, whose vocabulary is ESM-2's
TRAINED_MASK_RATIO = 0.15 * 0.8  # share of <mask> in training that token_dropout assumes


class Observe(NamedTuple):
    """What a forward pass returns in addition to logits and routing statistics."""

    hidden: bool = False
    attention: bool = False
    plans: bool = False


class EncoderOutput(NamedTuple):
    """Result of an encoder.

    Attributes:
      logits: at least float32 `[B, L, V]`, or `[B, 1, V]` with `at`.
      routing: of the M MoE layers, arrays `[M, ...]`; None for a dense encoder, and with `at`. It
        has plans only if `Observe.plans`.
      hidden: outputs `[B, L, D]` of the embedding and of each layer, the last one normalised; empty
        unless `Observe.hidden`.
      attention: weights `[B, H, L, L]` of each layer; empty unless `Observe.attention`.
    """

    logits: jax.Array
    routing: Routed | None
    hidden: tuple[jax.Array, ...] = ()
    attention: tuple[jax.Array, ...] = ()


NOTHING = Observe()


class Context(NamedTuple):
    """What every layer gets in addition to its input.

    Attributes:
      valid: bool `[B, L]`, False at padding.
      packing: where the antibodies of a row are; None: a row is one antibody.
      counters: uint32 `[B, L]` from `dropout.token_counters`; None: no dropout.
    """

    valid: jax.Array
    packing: Packing | None = None
    counters: jax.Array | None = None


class Seen(NamedTuple):
    """What a layer reports: its routing (None: dense), and its attention weights if observed."""

    routing: Routed | None
    attention: jax.Array | None


class Block(nnx.Module):
    """One transformer layer, dense or with experts; pre-LN unless `post_norm`."""

    def __init__(self, spec: EncoderSpec, sparse: bool, execution: Execution, rngs: nnx.Rngs):
        self.sparse, self.spec = sparse, spec
        # whether the FFN's output for a token depends on that token alone
        self.independent = not sparse or (spec.moe is not None and spec.moe.independent)
        self.attention_norm = LayerNorm(spec.d_model, spec.layer_norm_eps)
        self.attention = SelfAttention(spec, execution, rngs)
        self.ffn_norm = LayerNorm(spec.d_model, spec.layer_norm_eps)
        self.ffn: MoE | FeedForward = (
            MoE(spec, execution, rngs) if sparse else FeedForward(spec, spec.ffn, execution, rngs)
        )

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        training: bool = False,
        key: jax.Array | None = None,
        observe: Observe = NOTHING,
        at: jax.Array | None = None,
    ) -> tuple[jax.Array, Seen]:
        """`x [B, L, D]` -> `[B, L, D]` and what the layer reports.

        Args:
          x: output of the layer before.
          context: padding, packing and dropout counters of the batch.
          training: as for `Encoder`.
          key: key of the layer; None: neither dropout nor jitter.
          observe: what is reported.
          at: integers `[B]`, the only position of each row to return, as `[B, 1, D]`; None: all.
        """
        valid, packing, counters = context
        dropped = None
        if counters is not None and self.spec.attention_dropout:
            assert key is not None  # counters need a key; without one dropout would be off silently
            dropped = Dropped(counters, jax.random.fold_in(key, 1))
        y = x if self.spec.post_norm else self.attention_norm(x)
        weights = self.attention.weights(y, valid, packing) if observe.attention else None
        # an FFN that treats every token by itself needs only the token at this position
        alone = at if self.independent else None
        if alone is not None:
            x, valid = take_position(x, alone), jnp.ones((len(x), 1), bool)
        y = self.attention(y, context.valid, packing, alone, dropped)
        x = x + self._drop(y, counters, key, 2)
        x = self.attention_norm(x) if self.spec.post_norm else x
        y, routing = x if self.spec.post_norm else self.ffn_norm(x), None
        if isinstance(self.ffn, MoE):
            y, routing = self.ffn(y, valid, packing, training, key, observe.plans)
        else:
            y = self.ffn(y)
        x = x + self._drop(y, counters, key, 3)
        x = self.ffn_norm(x) if self.spec.post_norm else x
        if at is not None and alone is None:
            x = take_position(x, at)
        return x, Seen(routing, weights)

    def _drop(self, y, counters, key, place: int) -> jax.Array:
        if counters is None or not self.spec.hidden_dropout:
            return y
        return drop(y, counters, self.spec.hidden_dropout, jax.random.fold_in(key, place))


class LMHead(nnx.Module):
    """Dense, GELU, layer norm and a decoder with a bias, whose weights may be the embedding's."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        self.backend = execution.backend
        self.dense = Linear(spec.d_model, spec.d_model, "DF", execution, rngs)
        self.norm = LayerNorm(spec.d_model, spec.layer_norm_eps)
        self.bias = constant(0.0, (spec.vocabulary,), "V")
        self.decoder = None if spec.tied else normal(rngs, (spec.vocabulary, spec.d_model), "VD")

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """`x [B, L, D]`, `embedding [V, D]` -> logits `[B, L, V]`, at least float32."""
        x = self.norm(gelu(self.dense(x), self.backend))
        x = x.astype(wide(x.dtype))
        decoder = embedding if self.decoder is None else self.decoder[...]
        return jnp.dot(x, decoder.T, precision=jax.lax.Precision.HIGHEST) + self.bias[...]


class Encoder(nnx.Module):
    """Bidirectional encoder with a language-model head."""

    def __init__(self, spec: EncoderSpec, execution: Execution, rngs: nnx.Rngs):
        self.spec, self.execution = spec, execution
        self.embedding = normal(rngs, (spec.vocabulary, spec.d_model), "VD")
        count, width, eps = spec.learned_positions, spec.d_model, spec.layer_norm_eps
        self.positions = normal(rngs, (count, width), ".D") if count else None
        self.embedding_norm = LayerNorm(width, eps) if spec.embedding_norm else None
        sparse = spec.moe_layers
        self.layers = nnx.List(
            [Block(spec, i in sparse, execution, rngs) for i in range(spec.layers)]
        )
        self.final_norm = None if spec.post_norm else LayerNorm(width, eps)
        self.head = LMHead(spec, execution, rngs)

    def embed(
        self, tokens: jax.Array, valid: jax.Array, packing: Packing | None = None
    ) -> jax.Array:
        """Embeddings `[B, L, D]` of `tokens [B, L]`, in the dtype of activations.

        With token_dropout (ESM-2) the embeddings of <mask> are zeroed and the rest is rescaled by
        (1 - 0.15 * 0.8) / (1 - observed mask ratio) of the antibody. Learned positions are added
        and the sum normalised, where the encoder does so. Padding embeds to 0.
        """
        x = look_up(self.embedding[...], tokens)
        if self.spec.token_dropout:
            masked = (tokens == MASK_TOKEN) & valid
            if packing is None:
                counts = [a.sum(-1, keepdims=True) for a in (masked, valid)]
            else:
                counts = [(packing.same() & a[:, None, :]).sum(-1) for a in (masked, valid)]
            ratio = counts[0] / jnp.maximum(counts[1], 1)
            scale = (1 - TRAINED_MASK_RATIO) / jnp.maximum(1 - ratio, 1e-6)  # all masked: not NaN
            x = jnp.where(masked[..., None], 0.0, x) * scale[..., None].astype(x.dtype)
        if self.positions is not None:
            x = x + vectors_of_positions(self.positions[...], tokens.shape[1], packing)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return (x * valid[..., None]).astype(self.execution.activations)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        packing: Packing | None = None,
        training: bool = False,
        key: jax.Array | None = None,
        observe: Observe = NOTHING,
        at: jax.Array | None = None,
    ) -> EncoderOutput:
        """Logits of every position, or of one position of each row.

        Args:
          tokens: integers `[B, L]`.
          valid: bool `[B, L]`, False at padding, which stands at the end of each row.
          packing: where the antibodies of a row are, which do not see each other; None: a row is
            one antibody.
          training: whether token choice obeys the capacity; in inference it is dropless.
          key: key of the step for dropout and the routers' jitter; None: neither.
          observe: what else is returned; if anything, layers are unrolled and not rematerialised.
          at: integers `[B]`, the only position of each row to return. The head, and the last layer
            where its FFN treats every token by itself, then compute no other position. Rows must
            not be packed. None: all positions.
        """
        x, counters = self.embed(tokens, valid, packing), None
        if key is not None and self.spec.drops:
            counters = token_counters(tokens, valid, packing, key)
            x = drop(x, counters, self.spec.embedding_dropout, jax.random.fold_in(key, 0))
        context = Context(valid, packing, counters)
        keys = None if key is None else jax.random.split(key, len(self.layers))
        if any(observe) or at is not None:
            x, routing, hidden, attention = self._observed(x, context, training, keys, observe, at)
        else:
            hidden = attention = ()
            x, routing = self._run_layers(x, context, training, keys)
        x = x if self.final_norm is None else self.final_norm(x)
        if observe.hidden:
            hidden = (*hidden[:-1], x)
        return EncoderOutput(self.head(x, self.embedding[...]), routing, hidden, attention)

    def _observed(self, x, context, training, keys, observe, at):
        """Runs the layers one by one: `x`, routing, hidden states and attention weights."""
        routings, states, weights = [], [x], []
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            key = None if keys is None else keys[i]
            x, seen = layer(x, context, training, key, observe, at if last else None)
            if seen.routing is not None and at is None:
                routings.append(seen.routing)
            weights += [seen.attention] if observe.attention else []
            states.append(x)
        hidden = tuple(states) if observe.hidden else ()
        return x, _stack(routings), hidden, tuple(weights)

    def _run_layers(self, x, context, training, keys) -> tuple[jax.Array, Routed | None]:
        """Runs the layers, scanned or unrolled by `Execution`: `x` and the MoE layers' routing."""
        routings = []
        for start, period, repeats in self._runs():
            groups = [range(start + i, start + i + period) for i in _steps(period, repeats)]
            split = [[nnx.split(self.layers[i]) for i in group] for group in groups]
            definitions = [definition for definition, _ in split[0]]

            def body(x, states, definitions=definitions):
                period_routings = []
                for definition, (state, key) in zip(definitions, states, strict=True):
                    x, seen = nnx.merge(definition, state)(x, context, training, key)
                    period_routings += [] if seen.routing is None else [seen.routing]
                return x, _stack(period_routings)

            body = remat(body, self.execution)
            states = [
                [
                    (state, None if keys is None else keys[i])
                    for i, (_, state) in zip(group, part, strict=True)
                ]
                for group, part in zip(groups, split, strict=True)
            ]
            if repeats == 1:
                x, routing = body(x, states[0])
            else:
                x, routing = jax.lax.scan(body, x, _stack(states))
                routing = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), routing)
            routings += [] if routing is None else [routing]
        if not routings:
            return x, None
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *routings)

    def _runs(self) -> list[tuple[int, int, int]]:
        """Layers as runs `(first layer, period, repeats)`; runs with `repeats > 1` are scanned."""
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


def remat(body, execution: Execution):
    """`body`, whose backward pass recomputes what `Execution.remat` says."""
    if execution.remat == "none":
        return body
    policy = None if execution.remat == "full" else _keep_matmuls
    # XLA must not merge unrolled layers with their own recomputation
    return jax.checkpoint(body, policy=policy, prevent_cse=not execution.scan)


def _keep_matmuls(primitive, *arguments: Any, **parameters: Any) -> bool:
    """Remat policy: keeps arrays named in `KEPT`, and what cuDNN's attention returns."""
    named = jax.checkpoint_policies.save_only_these_names(*KEPT)
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or named(primitive, *arguments, **parameters)


def make_definition(spec: EncoderSpec, execution: Execution) -> nnx.GraphDef:
    """The static half of an encoder; `nnx.merge(definition, params)` gives the module back."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(spec, execution, nnx.Rngs(0))))[0]


def parameter_shapes(spec: EncoderSpec) -> nnx.State:
    """Shapes of an encoder's parameters, the same for each execution; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0))))[1]


@jax.custom_vjp
def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`table [V, D]` at integers `tokens`. The gradient is a matmul instead of a scattered sum.

    A scattered sum of floats depends on its order on GPUs, and is slow where V is small.
    """
    return table[tokens]


def _look_up_backward(residuals, gradient):
    tokens, rows = residuals
    one_hot = jax.nn.one_hot(tokens.reshape(-1), rows.shape[0], axis=0, dtype=gradient.dtype)
    columns = gradient.reshape(-1, gradient.shape[-1])
    return jnp.dot(one_hot, columns, precision=lax.Precision.HIGHEST), None


look_up.defvjp(
    lambda table, tokens: (table[tokens], (tokens, jnp.zeros((len(table), 0)))), _look_up_backward
)


def vectors_of_positions(table: jax.Array, length: int, packing: Packing | None) -> jax.Array:
    """`table [N, D]` at the positions of rows: `[L, D]`, or `[B, L, D]` of packed rows.

    Rows may be padded to more than N tokens; places beyond N get 0.
    """
    if packing is not None:
        return look_up(table, packing.position)
    rows = table[:length]
    return jnp.pad(rows, ((0, length - len(rows)), (0, 0)))


def _steps(period: int, repeats: int) -> range:
    return range(0, period * repeats, period)


def _repeats(kinds: list[bool], period: int) -> int:
    """How often the first `period` kinds repeat from the start."""
    count = 1
    while kinds[count * period : (count + 1) * period] == kinds[:period] and len(kinds) >= period:
        count += 1
    return count


def _stack(trees: list):
    """Stacks equal pytrees along a new first axis; None for an empty list."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None
