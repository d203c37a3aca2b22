"""AdamW with the schedules of the published studies."""

from functools import partial

import jax
import optax
from flax import nnx

from moe_ablm.training.spec import OptimizerSpec

DECAYED = ("kernel", "embedding", "decoder", "router", "up", "down")  # not biases and layer norms


def make_schedule(spec: OptimizerSpec) -> optax.Schedule:
    """Learning rate by number of updates done: linear warm-up from 0, then the named decay.

    All but "constant" reach 0 at `steps` if the warm-up is shorter than `steps`. "linear" and
    "cosine" decay from the end of the warm-up. "wsd" (warm-up, stable, decay; Hu et al. 2024) stays
    at the peak and decays linearly over the last `decay_steps`, which must begin after the warm-up
    (config.py checks this). At each of `restarts` the course begins anew (warm restarts;
    Loshchilov & Hutter 2017), warm-up included.
    """
    courses = [_course(spec, cycle) for cycle in range(len(spec.cycles))]
    return optax.join_schedules(courses, list(spec.restarts)) if spec.restarts else courses[0]


def _course(spec: OptimizerSpec, cycle: int) -> optax.Schedule:
    rest = max(spec.cycles[cycle] - spec.warmup, 1)
    if spec.schedule == "linear":
        after = optax.linear_schedule(spec.lr, 0.0, rest)
    elif spec.schedule == "cosine":
        after = optax.cosine_decay_schedule(spec.lr, rest)
    elif spec.schedule == "constant":
        after = optax.constant_schedule(spec.lr)
    else:
        decay = spec.decay_steps(cycle)
        after = optax.linear_schedule(spec.lr, 0.0, decay, transition_begin=rest - decay)
    warmup = optax.linear_schedule(0.0, spec.lr, max(spec.warmup, 1))
    return optax.join_schedules([warmup, after], [spec.warmup])


def decay_mask(params: nnx.State) -> nnx.State:
    """True for parameters with weight decay: weights, but not biases and layer norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in DECAYED, params)


def frozen_mask(params: nnx.State, layers: int) -> nnx.State:
    """True for the embedding and the parameters of the first `layers` layers."""

    def frozen(path: tuple, _) -> bool:
        first = path[0].key
        return first == "embedding" or (first == "layers" and int(path[1].key) < layers)

    return jax.tree_util.tree_map_with_path(frozen, params)


def _name(path: tuple) -> str:
    return [p.key for p in path if isinstance(getattr(p, "key", None), str)][-1]


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decoupled weight decay.

    Gradients of frozen parameters are zeroed before the norm is taken, and frozen parameters have
    no weight decay.
    """
    frozen = partial(frozen_mask, layers=spec.freeze)

    def decayed(params: nnx.State) -> nnx.State:
        if not spec.freeze:
            return decay_mask(params)
        return jax.tree.map(lambda d, f: d and not f, decay_mask(params), frozen(params))

    return optax.chain(
        *([optax.masked(optax.set_to_zero(), frozen)] if spec.freeze else []),
        optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity(),
        optax.adamw(
            make_schedule(spec),
            b1=spec.beta1,
            b2=spec.beta2,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            mask=decayed,
        ),
    )
