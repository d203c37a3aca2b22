"""One update and one evaluation of a batch, as pure functions to be jitted.

Losses are sums by region, so that the sums of several batches can be added.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_ablm.model.encoder import Encoder, EncoderOutput
from moe_ablm.model.families import Router
from moe_ablm.model.layers import Balance
from moe_ablm.model.moe import Routed
from moe_ablm.model.packing import Packing
from moe_ablm.model.routing import RouterStats
from moe_ablm.model.spec import EncoderSpec
from moe_ablm.training.state import TrainState, split_trained

# a cell is a region of a chain: (segment - 1) * REGIONS + region; data.regions has both codes
REGIONS = 8
CELLS = 2 * REGIONS
SEEN_LEVELS = 3  # codes of `seen` in evaluation batches: does training have the chain (data.chains)

Batch = dict[str, jax.Array]


class RegionSums(NamedTuple):
    """Sums over the masked positions of each cell, float32 `[CELLS]`.

    For batches with `seen` they are `[SEEN_LEVELS * CELLS]`, level by level.
    """

    loss: jax.Array  # nats
    correct: jax.Array
    tokens: jax.Array


def cells(batch: Batch) -> jax.Array:
    """Cell of every position, int32 `[B, L]`; padding is in cell 0, and never masked."""
    segment = batch["segment"].astype(jnp.int32)
    return jnp.maximum(segment - 1, 0) * REGIONS + batch["region"].astype(jnp.int32)


def region_sums(logits: jax.Array, batch: Batch) -> RegionSums:
    """Cross-entropy and hits at the masked positions.

    Args:
      logits: float32 `[B, L, V]`.
      batch: `targets`, `loss_mask`, `segment` and `region`, each `[B, L]`; evaluation batches also
        have `seen`.
    """
    targets = batch["targets"].astype(jnp.int32)
    # not a gather along V, whose gradient would be a scatter
    chosen = (logits * jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)).sum(-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    counted = batch["loss_mask"]
    cell, count = cells(batch), CELLS
    if "seen" in batch:
        cell, count = cell + CELLS * batch["seen"].astype(jnp.int32), SEEN_LEVELS * CELLS
    one_hot = jax.nn.one_hot(cell, count, dtype=jnp.float32)
    sums = jnp.einsum(
        "nbl,blc->nc",
        jnp.stack([jnp.where(counted, x, 0.0) for x in (loss, correct, jnp.ones_like(loss))]),
        one_hot,
        precision=jax.lax.Precision.HIGHEST,
    )
    return RegionSums(*sums)


class StepMetrics(NamedTuple):
    """What an update reports; `router` statistics are `[M, ...]`, None for a dense encoder."""

    sums: RegionSums
    tokens: jax.Array  # padding not counted
    objective: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    router: RouterStats | None
    skipped: jax.Array | None  # updates of the run so far that were spikes; None: none is skipped


def forward(
    model: Encoder, batch: Batch, training: bool = False, key: jax.Array | None = None
) -> EncoderOutput:
    """The encoder's output for a batch; rows are packed if the batch has `position`."""
    packing = None
    if "position" in batch:
        packing = Packing(batch["antibody"], batch["position"])
    return model(batch["tokens"], batch["segment"] > 0, packing, training, key)


def logit_z_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Sum over the masked positions of log^2 of the partition function (Chowdhery et al. 2022).

    Args:
      logits: float32 `[B, L, V]`.
      batch: with `loss_mask [B, L]`.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(batch["loss_mask"], normaliser**2, 0.0).sum()


def auxiliary_loss(stats: RouterStats, moe: Router) -> jax.Array:
    """Weighted router losses, summed over the MoE layers (statistics `[M, ...]`)."""
    return (
        moe.load_balance * stats.load_balance.sum()
        + moe.z_loss * stats.z_loss.sum()
        + moe.entropy_loss * stats.entropy_loss.sum()
    )


def make_train_step(
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    spec: EncoderSpec,
    accumulate: int,
    ema: float,
    seed: int = 0,
    z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function that updates a state by a batch.

    Gradients of micro-batches add up to those of the whole batch: every masked token has the same
    weight, whichever micro-batch it is in. Router losses are means over micro-batches. Jitter and
    dropout are functions of (seed, step, micro-batch).

    Args:
      definition: of the encoder (`encoder.make_definition`).
      optimizer: from `optimizer.make_optimizer`.
      spec: the encoder.
      accumulate: micro-batches of a batch.
      ema: decay of the average of the weights; not used if the state has none.
      seed: seed of jitter and dropout.
      z_loss: weight of `logit_z_loss`, which is not in the reported loss.
    """
    moe = spec.moe
    random = spec.drops or bool(moe and moe.noise)
    gradient = _accumulated(_gradient(definition, moe, accumulate, z_loss), accumulate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        masked = jnp.maximum(batch["loss_mask"].sum(), 1)
        key = jax.random.fold_in(jax.random.key(seed), state.step) if random else None
        trained, fixed = split_trained(state.params)
        (loss, (sums, router)), grads = gradient(trained, fixed, batch, masked, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params = nnx.merge_state(trained, fixed)
        if moe and moe.balance_step:
            params = rebalanced(params, router.asked, moe.balance_step)
        # norms are separated from the update, which XLA:GPU would otherwise not make in place
        measured = jax.lax.optimization_barrier((updates, trained))
        average = state.ema
        if average is not None:
            average = optax.incremental_update(params, average, 1 - ema)
        metrics = StepMetrics(
            sums=sums,
            tokens=(batch["segment"] > 0).sum(),
            objective=loss,
            grad_norm=optax.tree.norm(grads),
            update_norm=optax.tree.norm(measured[0]),
            param_norm=optax.tree.norm(measured[1]),
            router=router,
            skipped=optax.tree.get(opt_state, "skipped"),
        )
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return train_step


def _gradient(
    definition: nnx.GraphDef, moe: Router | None, accumulate: int, z_loss: float
) -> Callable:
    """(trained, fixed, batch, masked, key) -> ((objective, (sums, router)), gradient).

    `masked` counts the masked tokens of the whole batch, of which the given one may be a part.
    """

    def objective(trained, fixed, batch, masked, key):
        output = forward(nnx.merge(definition, trained, fixed), batch, training=True, key=key)
        sums = region_sums(output.logits, batch)
        loss = sums.loss.sum() / masked
        if z_loss:
            loss = loss + z_loss * logit_z_loss(output.logits, batch) / masked
        router = None
        if moe and output.routing is not None:
            router = output.routing.stats
            loss = loss + auxiliary_loss(router, moe) / accumulate
        return loss, (sums, router)

    return jax.value_and_grad(objective, has_aux=True)


def _accumulated(gradient: Callable, accumulate: int) -> Callable:
    """The same function, over the micro-batches of a batch one after the other."""
    if accumulate == 1:
        return gradient

    def micro_batches(batch: Batch) -> Batch:
        # row i goes to micro-batch i % accumulate: each holds rows of every device
        return jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def accumulated(trained, fixed, batch, masked, key):
        def body(carry, part):
            (loss, (sums, router)), grads = gradient(trained, fixed, part[0], masked, part[1])
            return jax.tree.map(jnp.add, carry, (loss, sums, grads)), router

        zero = jnp.zeros(()), RegionSums(*[jnp.zeros(CELLS)] * 3)
        carry = (*zero, jax.tree.map(jnp.zeros_like, trained))
        keys = None if key is None else jax.random.split(key, accumulate)
        (loss, sums, grads), router = jax.lax.scan(body, carry, (micro_batches(batch), keys))
        return (loss, (sums, jax.tree.map(lambda x: x.mean(0), router))), grads

    return accumulated


def rebalanced(params: nnx.State, asked: jax.Array, rate: float) -> nnx.State:
    """Parameters with each layer's `balance` moved towards equal loads.

    An expert with less than its share becomes easier to choose, one with more becomes harder:
    `b_e += rate * sign(1/E - load_e)` (Wang et al. 2024, algorithm 1; used by DeepSeek-V3). With a
    capacity the load is that before drops. The load after drops is capped, which would push experts
    below their share further down.

    Args:
      params: of an encoder whose M MoE layers have a `balance [E]`.
      asked: `[M, E]`, shares of the assignments before drops.
      rate: step of the bias.
    """
    flat = dict(nnx.to_flat_state(params))
    paths = sorted(path for path, variable in flat.items() if isinstance(variable, Balance))
    for path, shares in zip(paths, asked, strict=True):
        missing = 1 / asked.shape[-1] - shares
        # a share that is fair up to rounding moves nothing
        step = rate * jnp.where(jnp.abs(missing) < 1e-6, 0.0, jnp.sign(missing))
        flat[path] = flat[path].replace(flat[path].get_value() + step)
    return nnx.from_flat_state(flat)


class EvalSums(NamedTuple):
    """The sums of an evaluation batch.

    Attributes:
      sums: by region.
      routed: `[M, E, CELLS]`, assignments of each expert by the cell of the token; None: dense.
    """

    sums: RegionSums
    routed: jax.Array | None


def make_eval_step(definition: nnx.GraphDef) -> Callable[[nnx.State, Batch], EvalSums]:
    """The function that sums up a batch under fixed parameters; `definition` is the encoder's."""

    def eval_step(params: nnx.State, batch: Batch) -> EvalSums:
        output = forward(nnx.merge(definition, params), batch)
        sums = region_sums(output.logits, batch)
        return EvalSums(sums, routed_by_region(output.routing, batch))

    return eval_step


def routed_by_region(routing: Routed | None, batch: Batch) -> jax.Array | None:
    """Assignments by layer, expert and cell, float32 `[M, E, CELLS]`; None for a dense encoder."""
    if routing is None:
        return None
    where = jax.nn.one_hot(cells(batch), CELLS, dtype=jnp.float32)
    # padding has a cell as well, and under BALM-MoE's policies experts may compute for it
    assigned = routing.assigned * (batch["segment"] > 0)[..., None]
    return jnp.einsum("mble,blc->mec", assigned, where, precision=jax.lax.Precision.HIGHEST)
