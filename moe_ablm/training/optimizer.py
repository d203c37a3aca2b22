"""AdamW, or Muon with AdamW, with the schedules of the published studies."""

from collections.abc import Callable
from functools import partial

import jax
import optax
from flax import nnx

from moe_ablm.training.spec import OptimizerSpec
from moe_ablm.training.spikes import skip_spikes

# not biases and layer norms
DECAYED = ("kernel", "embedding", "positions", "decoder", "router", "up", "down")
EMBEDDING = ("embedding", "positions", "embedding_norm")  # what is before the first layer
HIDDEN = ("kernel", "up", "down")  # weights of layers that Muon moves; a router is none


def make_schedule(spec: OptimizerSpec, peak: float | None = None) -> optax.Schedule:
    """Learning rate by number of updates done: linear warm-up from 0, then the named decay.

    All but "constant" reach 0 at `steps` if the warm-up is shorter than `steps`. "linear" and
    "cosine" decay from the end of the warm-up. "wsd" (warm-up, stable, decay; Hu et al. 2024) stays
    at the peak and decays linearly over the last `decay_steps`, which must begin after the warm-up
    (config.py checks this). At each of `restarts` the course begins anew (warm restarts;
    Loshchilov & Hutter 2017), warm-up included.

    Args:
      spec: the settings.
      peak: the highest rate; None: that of AdamW, `spec.lr`.
    """
    peak = spec.lr if peak is None else peak
    courses = [_course(spec, cycle, peak) for cycle in range(len(spec.cycles))]
    return optax.join_schedules(courses, list(spec.restarts)) if spec.restarts else courses[0]


def _course(spec: OptimizerSpec, cycle: int, peak: float) -> optax.Schedule:
    rest = max(spec.cycles[cycle] - spec.warmup, 1)
    if spec.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif spec.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif spec.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = spec.decay_steps(cycle)
        after = optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay)
    warmup = optax.linear_schedule(0.0, peak, max(spec.warmup, 1))
    return optax.join_schedules([warmup, after], [spec.warmup])


def decay_mask(params: nnx.State) -> nnx.State:
    """True for parameters with weight decay: weights, but not biases and layer norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in DECAYED, params)


def frozen_mask(params: nnx.State, layers: int) -> nnx.State:
    """True for the embedding and the parameters of the first `layers` layers."""

    def frozen(path: tuple, _) -> bool:
        first = path[0].key
        return first in EMBEDDING or (first == "layers" and int(path[1].key) < layers)

    return jax.tree_util.tree_map_with_path(frozen, params)


def hidden_mask(params: nnx.State) -> nnx.State:
    """True for the matrices of the layers: attention, FFNs, experts; not for routers.

    Embedding and head are no hidden matrices, biases and norms no matrices at all.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "layers" and _name(path) in HIDDEN, params
    )


def router_mask(params: nnx.State) -> nnx.State:
    """True for the weights of routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) == "router", params)


def _name(path: tuple) -> str:
    return [p.key for p in path if isinstance(getattr(p, "key", None), str)][-1]


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon, with decoupled weight decay.

    Gradients of frozen parameters are zeroed before the norm is taken, and frozen parameters have
    no weight decay. Where spikes are skipped (`spikes.skip_spikes`), all else comes after it.
    """
    frozen = partial(frozen_mask, layers=spec.freeze)

    def unless_frozen(mask: Callable) -> Callable:
        def found(params: nnx.State) -> nnx.State:
            if not spec.freeze:
                return mask(params)
            return jax.tree.map(lambda m, f: m and not f, mask(params), frozen(params))

        return found

    adamw = optax.adamw(
        make_schedule(spec),
        b1=spec.beta1,
        b2=spec.beta2,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        mask=unless_frozen(decay_mask),
    )
    moved = [adamw]
    if spec.optimizer == "muon":
        hidden = unless_frozen(hidden_mask)

        def others(params: nnx.State) -> nnx.State:
            return jax.tree.map(lambda m: not m, hidden(params))

        moved = [optax.masked(muon(spec), hidden), optax.masked(adamw, others)]
    if spec.router_lr != 1:
        moved.append(optax.masked(optax.scale(spec.router_lr), router_mask))
    clipped = optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity()
    if spec.skip_spikes:
        clipped = skip_spikes(optax.chain(clipped, *moved), spec.skip_spikes)
        moved = []
    return optax.chain(
        *([optax.masked(optax.set_to_zero(), frozen)] if spec.freeze else []), clipped, *moved
    )


def muon(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices `[..., N, M]`: the momentum, orthogonalised.

    What leads the last two axes is no part of a matrix: each expert's is orthogonalised on its own,
    or each of the equal pieces that experts of several `widths` are made of.
    An update is O * sqrt(max(1, M / N)), with O from five Newton-Schulz iterations (singular values
    of some .7 to 1.2) of Nesterov's momentum of .95; weights decay by `weight_decay` times Muon's
    own rate.
    """

    def last_two(matrices: nnx.State) -> nnx.State:
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), matrices
        )

    def widened(matrices: nnx.State, _: nnx.State | None) -> nnx.State:
        return jax.tree.map(lambda x: x * max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5, matrices)

    return optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=last_two),
        optax.stateless(widened),
        optax.add_decayed_weights(spec.weight_decay),
        optax.scale_by_learning_rate(make_schedule(spec, spec.muon_lr)),
    )
