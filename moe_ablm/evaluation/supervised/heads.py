"""Supervised heads: a small network on an encoder's hidden states.

The encoder is frozen, or trained with the head, as a whole or by low-rank adapters.

The last layer gives a vector a residue. They are standardised, pooled - by attention with one
learned query, or as their mean - and go through a hidden layer with GELU. Special tokens are
context, but have no part in it.

The loop is not `training.step`: its loss is of labels instead of masked tokens, head and encoder
have rates of their own, and hundreds of heads train for seconds each, on one device, without
checkpoints. Sharing it would also change the rounding of rates, and with it recorded results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe_ablm.data.antibody import Antibody
from moe_ablm.evaluation.supervised.head_inputs import (
    Head,
    HeadInputs,
    batch_of,
    by_length,
    goals_of,
    inputs_of,
    scale_of,
)
from moe_ablm.evaluation.supervised.lora import adapted, adapters
from moe_ablm.evaluation.supervised.restraints import with_expert_dropout, with_frozen_routers
from moe_ablm.inference.buckets import Engine, alone
from moe_ablm.inference.embed import HiddenStates
from moe_ablm.model.encoder import Observe, make_definition
from moe_ablm.model.spec import Execution

Labelled = tuple[Sequence[Antibody] | HeadInputs, Sequence]  # antibodies and their targets
Goals = tuple[HeadInputs, list]  # the same as the loss needs them
HIDDEN = 64
_PRECISION = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Training:
    """AdamW with a linear warm-up over a tenth of the steps and a linear decay to 0.

    Attributes:
      epochs: passes over the training set.
      batch: antibodies of a step.
      lr: of the head.
      encoder_lr: of the encoder, where `full`, or of its adapters.
      weight_decay: of the head's matrices.
      full: the encoder is trained, too.
      rank: of adapters of the encoder, which are trained instead of it; 0: none.
      seed: of the head's weights and of the order.
      freeze_routers: routers stay as they are while the encoder or its adapters are trained.
      expert_dropout: share of the hidden units of each expert that an update goes without.
    """

    epochs: int = 20
    batch: int = 32
    lr: float = 3e-3
    encoder_lr: float = 1e-4
    weight_decay: float = 0.01
    full: bool = False
    seed: int = 0
    rank: int = 0
    freeze_routers: bool = False
    expert_dropout: float = 0.0

    @property
    def frozen(self) -> bool:
        """Whether nothing of the encoder is trained."""
        return not (self.full or self.rank)


@dataclass(frozen=True)
class _Network:
    """Outputs of a batch; hashable, so that what is compiled for it is used again.

    `definition`: of the encoder where it or its adapters are trained, else None.
    """

    head: Head
    definition: nnx.GraphDef | None
    freeze_routers: bool = False
    expert_dropout: float = 0.0

    def __call__(self, params: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
        """float32 `[B, outputs]`, of residues `[B, R, outputs]`: log-probabilities or values.

        `key`: of the expert dropout; None: nothing is dropped.
        """
        p, mask = params["head"], batch["mask"][..., None]
        x = batch["states"] if "states" in batch else self._encoded(params, batch, key)
        x = x.astype(jnp.float32)
        centre, spread = (jax.lax.stop_gradient(p[name]) for name in ("centre", "spread"))
        if self.head.kind != "residue":
            # pooled before it is standardised: the same, as weights add up to 1, for less work
            scores = jnp.zeros((*x.shape[:2], 1))
            if self.head.pooling == "attention":
                scores = jnp.matmul(x, p["query"] / spread[:, None], precision=_PRECISION)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=1)
            x = jnp.einsum("brd,bro->bd", x, weights, precision=_PRECISION)
        x = (x - centre) / spread
        x = jax.nn.gelu(jnp.matmul(x, p["inner"], precision=_PRECISION) + p["inner_bias"])
        x = jnp.matmul(x, p["outer"], precision=_PRECISION) + p["outer_bias"]
        return x if self.head.kind == "regression" else jax.nn.log_softmax(x, axis=-1)

    def _encoded(self, params: dict, batch: dict, key: jax.Array | None) -> jax.Array:
        assert self.definition is not None  # batches of a frozen encoder hold its states
        weights = encoder_of(params)
        if self.freeze_routers:
            weights = with_frozen_routers(weights)
        if key is not None:
            weights = with_expert_dropout(weights, self.expert_dropout, key)
        encoder = nnx.merge(self.definition, weights)
        states = encoder(
            batch["tokens"].astype(jnp.int32), batch["valid"], observe=Observe(hidden=True)
        ).hidden[-1]
        return jnp.take_along_axis(states, batch["places"][..., None], axis=1)

    def loss(
        self, params: dict, batch: dict, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Sum over what has a target, and its number: cross-entropy (nats) or squared error."""
        found, target, weight = self(params, batch, key), batch["target"], batch["weight"]
        if self.head.kind == "regression":
            each = ((found - target) ** 2).mean(-1)
        else:
            each = -jnp.take_along_axis(found, target[..., None], axis=-1)[..., 0]
        return (each * weight).sum(), weight.sum()


def encoder_of(params: dict) -> nnx.State:
    """Parameters of the encoder, its adapters added to them."""
    return adapted(params["encoder"], params["lora"]) if "lora" in params else params["encoder"]


@partial(jax.jit, static_argnames="network")
def _outputs(network: _Network, params: dict, batch: dict) -> jax.Array:
    return network(params, batch)


@partial(jax.jit, static_argnames="network")
def _loss_sums(network: _Network, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    return network.loss(params, batch)


@partial(jax.jit, static_argnames=("network", "weight_decay"))
def _update(
    network: _Network,
    weight_decay: float,
    params,
    state,
    batch: dict,
    rates: dict,
    fixed: dict,
    key,
):
    def objective(params):
        total, count = network.loss(params | fixed, batch, key)
        return total / jnp.maximum(count, 1)

    gradient = jax.grad(objective)(params)
    updates, state = _optimizer(weight_decay).update(gradient, state, params)
    updates = {k: jax.tree.map(lambda u, k=k: -rates[k] * u, updates[k]) for k in updates}
    params = optax.apply_updates(params, updates)
    return params, state


def _optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, which differs between head and encoder."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, _decayed),
    )


def _decayed(params: dict) -> dict:
    """Matrices of the head: a pre-trained encoder is not pulled to 0."""
    return {k: jax.tree.map(lambda x, k=k: k == "head" and x.ndim > 1, params[k]) for k in params}


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained head, and its encoder.

    `losses`: after each epoch, by the name of what `fit` watched.
    """

    engine: Engine
    network: _Network
    params: dict
    batch: int
    scale: tuple[np.ndarray, np.ndarray]  # mean and standard deviation of a regression's targets
    losses: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __call__(
        self, antibodies: Sequence[Antibody] | HeadInputs
    ) -> np.ndarray | list[np.ndarray]:
        """Predictions, in the order of `antibodies`; they do not depend on each other.

        Returns:
          Classification: float32 log-probabilities `[n, outputs]`; regression: values `[n]`, or
          `[n, outputs]` of several; residue: log-probabilities `[residues, outputs]` of each.
        """
        head, full = self.network.head, self.network.definition is not None
        inputs = _inputs(self.engine, antibodies, head, full)
        found: list = [None] * len(inputs)
        for members, batch in by_length(inputs, self.batch):
            outputs = np.asarray(_outputs(self.network, self.params, batch))
            for i, out in zip(members.tolist(), outputs, strict=False):
                found[i] = out[: len(inputs.rows[i].places)] if head.kind == "residue" else out
        if head.kind == "residue":
            return found
        values = np.array(found, np.float32).reshape(-1, head.outputs)
        if head.kind == "classification":
            return values
        values = values * self.scale[1] + self.scale[0]
        return values[:, 0] if head.outputs == 1 else values


def fit(
    engine: Engine,
    antibodies: Sequence[Antibody] | HeadInputs,
    targets: Sequence,
    head: Head,
    training: Training,
    valid: Labelled | None = None,
    watched: Mapping[str, Labelled] | None = None,
) -> Predictor:
    """Trains a head, in float32 and deterministically.

    Args:
      engine: the encoder; routers treat each antibody as if alone, in training, too.
      antibodies: the training set, or `inputs_of` it.
      targets: classes (integers), values (float `[n]` or `[n, outputs]`), or of "residue" the
        classes of each residue, `IGNORED` where there is none.
      head: what is predicted.
      training: how.
      valid: antibodies and targets; the epoch of least loss on them is kept, else the last one.
      watched: antibodies and targets by name, whose mean loss after each epoch is kept with the
        predictor: cross-entropy (nats), or squared error over the variance of `targets`.
    """
    inputs = _inputs(engine, antibodies, head, not training.frozen)
    definition = None
    if not training.frozen:
        definition = make_definition(alone(engine.model.spec), Execution())
    restraints = training.freeze_routers, training.expert_dropout
    network, scale = _Network(head, definition, *restraints), scale_of(targets, head)
    params: dict[str, Any] = {"head": _initial(engine, inputs, head, training.seed)}
    fixed = {}
    if training.full:
        params["encoder"] = engine.parameters()
    elif training.rank:
        params["lora"] = adapters(engine.parameters(), training.rank, training.seed)
        fixed["encoder"] = engine.parameters()
    goals = goals_of(targets, scale, head)

    def asked(part: Labelled) -> Goals:
        return _inputs(engine, part[0], head, not training.frozen), goals_of(part[1], scale, head)

    checked = None if valid is None else asked(valid)
    losses = _Losses({name: asked(part) for name, part in (watched or {}).items()})
    params = _trained(network, params, fixed, inputs, goals, training, checked, losses) | fixed
    return Predictor(engine, network, params, training.batch, scale, losses.found)


def predictor_of(
    engine: Engine,
    head: Head,
    weights: dict[str, jax.Array],
    batch: int,
    scale: tuple[np.ndarray, np.ndarray],
) -> Predictor:
    """The predictor of a head that was trained before, on an encoder that is not trained.

    Args:
      engine: the encoder.
      head: what is predicted.
      weights: of the head, by name.
      batch: antibodies that it computes at once.
      scale: mean and standard deviation of a regression's targets.
    """
    return Predictor(engine, _Network(head, None), {"head": weights}, batch, scale)


def settled(predictor: Predictor) -> Predictor:
    """The same head on an encoder that is not trained any more: with it a model can be saved.

    Adapters are added to the weights; hidden states are the engine's, as with a frozen encoder.
    """
    if predictor.network.definition is None:
        return predictor
    params = jax.jit(encoder_of)({k: v for k, v in predictor.params.items() if k != "head"})
    engine = predictor.engine.with_model(replace(predictor.engine.model, params=params))
    head, weights = predictor.network.head, predictor.params["head"]
    found = predictor_of(engine, head, weights, predictor.batch, predictor.scale)
    return replace(found, losses=predictor.losses)


def _inputs(
    engine: Engine, antibodies: Sequence[Antibody] | HeadInputs, head: Head, full: bool
) -> HeadInputs:
    if isinstance(antibodies, HeadInputs):
        return antibodies
    return inputs_of(engine, antibodies, head, full)


class _Losses:
    """Mean losses on named sets, after each epoch: `found`."""

    def __init__(self, sets: Mapping[str, Goals]):
        self._sets = sets
        self.found: dict[str, list[float]] = {name: [] for name in sets}

    def add(self, network: _Network, params: dict, size: int) -> None:
        """Computes those of all sets."""
        for name, asked in self._sets.items():
            self.found[name].append(_mean_loss(network, params, *asked, size))


def _trained(
    network: _Network,
    params: dict,
    fixed: dict,
    inputs: HeadInputs,
    goals: list,
    training: Training,
    checked: Goals | None,
    losses: _Losses,
) -> dict:
    """Parameters after the last epoch, or after that of least loss on `checked`."""
    rng = np.random.default_rng([training.seed, 1])
    drops = training.expert_dropout and not training.frozen
    key = jax.random.key(training.seed) if drops else None
    state = _optimizer(training.weight_decay).init(params)
    size = min(training.batch, len(inputs))
    steps, step = training.epochs * -(-len(inputs) // size), 0
    best, least = None, np.inf
    for _ in range(training.epochs):
        order = rng.permutation(len(inputs))
        for first in range(0, len(order), size):
            batch = batch_of(inputs, order[first : first + size], size, goals)
            share = min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1), 1)
            rates = {"head": share * training.lr}
            rates |= dict.fromkeys(("encoder", "lora"), share * training.encoder_lr)
            drawn = None if key is None else jax.random.fold_in(key, step)
            params, state = _update(
                network, training.weight_decay, params, state, batch, rates, fixed, drawn
            )
            step += 1
        losses.add(network, params | fixed, size)
        loss = _mean_loss(network, params | fixed, *checked, size) if checked else -step
        if loss < least:
            best, least = params, loss
    return params if best is None else best  # no loss was a number: predictions will tell


def _mean_loss(
    network: _Network, params: dict, inputs: HeadInputs, goals: list, size: int
) -> float:
    sums = [_loss_sums(network, params, b) for _, b in by_length(inputs, size, goals)]
    total, count = np.array(sums, np.float64).sum(0)
    return float(total / max(count, 1))


def _initial(engine: Engine, inputs: HeadInputs, head: Head, seed: int) -> dict:
    """Weights of the head; the mean and spread of hidden states are constants of it."""
    some = inputs.take(range(min(len(inputs), 256)))
    parts = some.states
    if parts is None:
        task, rows = HiddenStates(engine.model.spec.layers), some.rows
        parts = [x[rows[i].places] for i, x in engine.run(task, [r.tokens for r in rows])]
    states = np.concatenate(parts).astype(np.float32)
    width, rng = states.shape[1], np.random.default_rng([seed, 0])

    def drawn(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, columns)) / np.sqrt(rows), jnp.float32)

    return {
        "centre": jnp.asarray(states.mean(0)),
        "spread": jnp.asarray(np.maximum(states.std(0), 1e-3)),
        "query": jnp.zeros((width, 1)),  # attention begins as the mean
        "inner": drawn(width, HIDDEN),
        "inner_bias": jnp.zeros(HIDDEN),
        "outer": drawn(HIDDEN, head.outputs),
        "outer_bias": jnp.zeros(head.outputs),
    }
