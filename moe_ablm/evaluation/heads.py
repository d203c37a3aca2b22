"""Supervised heads: a small network on an encoder's hidden states, with the encoder frozen or not.

The last layer gives a vector a residue. They are standardised, pooled - by attention with one
learned query, or as their mean - and go through a hidden layer with GELU. Special tokens are
context, but have no part in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe_ablm.data.tokenizer import PAD
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.inference.antibodies import Antibody, Row, row_of, windows
from moe_ablm.inference.buckets import Engine, alone
from moe_ablm.inference.embed import HiddenStates, embed
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import Execution

KINDS = ("classification", "regression", "residue")
POOLINGS = ("attention", "mean")
HIDDEN = 64
MULTIPLE = 64  # of residues or tokens: lengths of batches
MOST_BYTES = 4 << 30  # of hidden states that are held
IGNORED = -1  # target of a residue that has none
_PRECISION = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Head:
    """What is predicted.

    Attributes:
      kind: "classification" of antibodies, "regression", or "residue": classes of each residue.
      outputs: classes, or values of a regression.
      pooling: "attention" or "mean"; of residues nothing is pooled.
    """

    kind: str
    outputs: int
    pooling: str = "attention"

    def __post_init__(self):
        if self.kind not in KINDS or self.pooling not in POOLINGS or self.outputs < 1:
            raise ValueError(f"{self}: expected a kind of {KINDS} and a pooling of {POOLINGS}")


@dataclass(frozen=True)
class Training:
    """AdamW with a linear warm-up over a tenth of the steps and a linear decay to 0.

    Attributes:
      epochs: passes over the training set.
      batch: antibodies of a step.
      lr: of the head.
      encoder_lr: of the encoder, where `full`.
      weight_decay: of matrices.
      full: the encoder is trained, too.
      seed: of the head's weights and of the order.
    """

    epochs: int = 20
    batch: int = 32
    lr: float = 1e-3
    encoder_lr: float = 1e-4
    weight_decay: float = 0.01
    full: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Inputs:
    """Antibodies as a head reads them; made once (`inputs_of`), used in many fits.

    Attributes:
      rows: tokens and places of residues.
      states: hidden states, float16 `[residues, D]` of each, or their mean, `[1, D]`; None where
        the encoder computes them anew in each step.
    """

    rows: Sequence[Row]
    states: Sequence[np.ndarray] | None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Sequence[int]) -> "Inputs":
        """Some of the antibodies."""
        states = None if self.states is None else [self.states[i] for i in index]
        return Inputs([self.rows[i] for i in index], states)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each in a batch: a multiple of `MULTIPLE` (of means: 1), int64 `[n]`."""
        if self.states is not None and all(len(s) == 1 for s in self.states):
            return np.ones(len(self), np.int64)
        sizes = [len(row.tokens) for row in self.rows]
        return -(-np.array(sizes, np.int64) // MULTIPLE) * MULTIPLE


def inputs_of(engine: Engine, antibodies: Sequence[Antibody], head: Head, full: bool) -> Inputs:
    """What a head needs of antibodies: with a frozen encoder their hidden states.

    Raises:
      Skipped: hidden states of all residues would take more than `MOST_BYTES`.
    """
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    if full:
        return Inputs(rows, None)
    pooled = head.pooling == "mean" and head.kind != "residue"
    width = engine.model.spec.d_model
    needed = 2 * width * (len(rows) if pooled else sum(len(row.places) for row in rows))
    if needed > MOST_BYTES:
        raise Skipped(
            f"hidden states of {len(rows):,} sequences take {needed / 2**30:.1f} GiB, at most "
            f"{MOST_BYTES >> 30} GiB are held: set a smaller number of sequences"
        )
    states = []
    for window in windows(antibodies, lambda a: (1, 4 * width * a.residues)):
        for found in embed(engine, window, "antibody" if pooled else "residue"):
            states.append(found.astype(np.float16))
    return Inputs(rows, states)


@dataclass(frozen=True)
class _Network:
    """Outputs of a batch; hashable, so that what is compiled for it is used again.

    `definition`: of the encoder where it is trained, else None.
    """

    head: Head
    definition: nnx.GraphDef | None

    def __call__(self, params: dict, batch: dict) -> jax.Array:
        """float32 `[B, outputs]`, of residues `[B, R, outputs]`: log-probabilities or values."""
        p, mask = params["head"], batch["mask"][..., None]
        x = batch["states"] if "states" in batch else self._encoded(params["encoder"], batch)
        centre, spread = (jax.lax.stop_gradient(p[name]) for name in ("centre", "spread"))
        x = (x.astype(jnp.float32) - centre) / spread * mask
        if self.head.kind != "residue":
            if self.head.pooling == "attention":
                scores = jnp.matmul(x, p["query"], precision=_PRECISION)
                weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=1)
            else:
                weights = mask / mask.sum(1, keepdims=True)
            x = (x * weights).sum(1)
        x = jax.nn.gelu(jnp.matmul(x, p["inner"], precision=_PRECISION) + p["inner_bias"])
        x = jnp.matmul(x, p["outer"], precision=_PRECISION) + p["outer_bias"]
        return x if self.head.kind == "regression" else jax.nn.log_softmax(x, axis=-1)

    def _encoded(self, params: nnx.State, batch: dict) -> jax.Array:
        encoder = nnx.merge(self.definition, params)
        states = encoder.hidden_states(batch["tokens"].astype(jnp.int32), batch["valid"])[-1]
        return jnp.take_along_axis(states, batch["places"][..., None], axis=1)

    def loss(self, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """Sum over what has a target, and its number: cross-entropy (nats) or squared error."""
        found, target, weight = self(params, batch), batch["target"], batch["weight"]
        if self.head.kind == "regression":
            each = ((found - target) ** 2).mean(-1)
        else:
            each = -jnp.take_along_axis(found, target[..., None], axis=-1)[..., 0]
        return (each * weight).sum(), weight.sum()


@partial(jax.jit, static_argnames="network")
def _outputs(network: _Network, params: dict, batch: dict) -> jax.Array:
    return network(params, batch)


@partial(jax.jit, static_argnames="network")
def _loss_sums(network: _Network, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    return network.loss(params, batch)


@partial(jax.jit, static_argnames=("network", "weight_decay"))
def _update(network: _Network, weight_decay: float, params, state, batch: dict, rates: dict):
    def objective(params):
        total, count = network.loss(params, batch)
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
        optax.add_decayed_weights(weight_decay, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained head, and its encoder."""

    engine: Engine
    network: _Network
    params: dict
    batch: int
    scale: tuple[np.ndarray, np.ndarray]  # mean and standard deviation of a regression's targets

    def __call__(self, antibodies: Sequence[Antibody] | Inputs) -> np.ndarray | list[np.ndarray]:
        """Predictions, in the order of `antibodies`; they do not depend on each other.

        Returns:
          Classification: float32 log-probabilities `[n, outputs]`; regression: values `[n]`, or
          `[n, outputs]` of several; residue: log-probabilities `[residues, outputs]` of each.
        """
        head, full = self.network.head, self.network.definition is not None
        inputs = antibodies
        if not isinstance(inputs, Inputs):
            inputs = inputs_of(self.engine, antibodies, head, full)
        found: list = [None] * len(inputs)
        for members, batch in _by_length(inputs, self.batch):
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
    antibodies: Sequence[Antibody] | Inputs,
    targets: Sequence,
    head: Head,
    training: Training,
    valid: tuple[Sequence[Antibody] | Inputs, Sequence] | None = None,
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
    """
    inputs = antibodies
    if not isinstance(inputs, Inputs):
        inputs = inputs_of(engine, antibodies, head, training.full)
    definition = None
    if training.full:
        spec = alone(engine.model.spec)
        definition = nnx.split(nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0))))[0]
    network, scale = _Network(head, definition), _scale(targets, head)
    params = {"head": _initial(engine, inputs, head, training.seed)}
    if training.full:
        params["encoder"] = engine.model.params
    goals = _goals(targets, scale, head)
    checked = None
    if valid is not None:
        given = valid[0]
        if not isinstance(given, Inputs):
            given = inputs_of(engine, given, head, training.full)
        checked = given, _goals(valid[1], scale, head)
    params = _trained(network, params, inputs, goals, training, checked)
    return Predictor(engine, network, params, training.batch, scale)


def _trained(network, params, inputs: Inputs, goals: list, training: Training, checked) -> dict:
    """Parameters after the last epoch, or after that of least loss on `checked`."""
    rng = np.random.default_rng([training.seed, 1])
    state = _optimizer(training.weight_decay).init(params)
    size = min(training.batch, len(inputs))
    steps, step = training.epochs * -(-len(inputs) // size), 0
    best, least = params, np.inf
    for _ in range(training.epochs):
        order = rng.permutation(len(inputs))
        for first in range(0, len(order), size):
            batch = _batch(inputs, order[first : first + size], size, goals)
            share = min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1), 1)
            rates = {"head": share * training.lr, "encoder": share * training.encoder_lr}
            params, state = _update(network, training.weight_decay, params, state, batch, rates)
            step += 1
        loss = _mean_loss(network, params, *checked, size) if checked else -step
        if loss < least:
            best, least = params, loss
    return best


def _mean_loss(network, params, inputs: Inputs, goals: list, size: int) -> float:
    sums = [_loss_sums(network, params, b) for _, b in _by_length(inputs, size, goals)]
    total, count = np.array(sums, np.float64).sum(0)
    return float(total / max(count, 1))


def _by_length(
    inputs: Inputs, size: int, goals: list | None = None
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of antibodies of one length: what is computed for one depends on it alone."""
    lengths = inputs.lengths
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        for first in range(0, len(members), size):
            part = members[first : first + size]
            yield part, _batch(inputs, part, size, goals)


def _batch(inputs: Inputs, members: np.ndarray, size: int, goals: list | None = None) -> dict:
    """Arrays of `size` rows, of which the first are `members`; the others weigh nothing."""
    length = int(inputs.lengths[members].max())
    mask = np.zeros((size, length), bool)
    mask[:, 0] = True  # rows without an antibody, too: no pooling divides by 0
    if inputs.states is None:
        batch = {"tokens": np.full((size, length), PAD, np.uint8)}
        batch |= {"valid": np.zeros((size, length), bool), "mask": mask}
        batch["places"] = np.zeros((size, length), np.int32)
    else:
        width = inputs.states[0].shape[1]
        batch = {"states": np.zeros((size, length, width), np.float16), "mask": mask}
    for row, member in enumerate(members.tolist()):
        tokens, places = inputs.rows[member]
        if inputs.states is None:
            batch["tokens"][row, : len(tokens)], batch["valid"][row, : len(tokens)] = tokens, True
            batch["places"][row, : len(places)], mask[row, : len(places)] = places, True
        else:
            states = inputs.states[member]
            batch["states"][row, : len(states)], mask[row, : len(states)] = states, True
    return batch if goals is None else batch | _targets(goals, members, mask.shape)


def _targets(goals: list, members: np.ndarray, shape: tuple[int, int]) -> dict:
    """`target` and `weight` of a batch: `[B]`, of a regression `[B, outputs]`, `[B, R]`."""
    size, length = shape
    of_residues = goals[0].ndim == 1 and goals[0].dtype.kind == "i"
    each = (length,) if of_residues else goals[0].shape
    target = np.zeros((size, *each), goals[0].dtype)
    weight = np.zeros((size, *each[:1]) if of_residues else size, np.float32)
    for row, member in enumerate(members.tolist()):
        goal = goals[member]
        if of_residues:
            target[row, : len(goal)] = np.maximum(goal, 0)
            weight[row, : len(goal)] = goal != IGNORED
        else:
            target[row], weight[row] = goal, 1
    return {"target": target, "weight": weight}


def _scale(targets: Sequence, head: Head) -> tuple[np.ndarray, np.ndarray]:
    if head.kind != "regression":
        return np.zeros(1, np.float32), np.ones(1, np.float32)
    values = np.asarray(targets, np.float64).reshape(-1, head.outputs)
    spread = values.std(0)
    found = values.mean(0), np.where(spread > 0, spread, 1)
    return tuple(x.astype(np.float32) for x in found)


def _goals(targets: Sequence, scale: tuple[np.ndarray, np.ndarray], head: Head) -> list[np.ndarray]:
    """Targets one by one: int32 `[]` or `[residues]`, or standardised float32 `[outputs]`."""
    if head.kind != "regression":
        return [np.asarray(target, np.int32) for target in targets]
    values = np.asarray(targets, np.float32).reshape(-1, head.outputs)
    return list((values - scale[0]) / scale[1])


def _initial(engine: Engine, inputs: Inputs, head: Head, seed: int) -> dict:
    """Weights of the head; the mean and spread of hidden states are constants of it."""
    some = inputs.take(range(min(len(inputs), 256)))
    states = some.states
    if states is None:
        task, rows = HiddenStates(engine.model.spec.layers), some.rows
        states = [x[rows[i].places] for i, x in engine.run(task, [r.tokens for r in rows])]
    states = np.concatenate(states).astype(np.float32)
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
