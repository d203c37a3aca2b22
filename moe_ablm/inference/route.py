"""Routing: the experts that compute for each residue in each layer, and their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.germline import HUMAN
from moe_ablm.errors import UserError
from moe_ablm.inference.buckets import Batch, Engine
from moe_ablm.inference.numbers import numbered_labels
from moe_ablm.inference.output import vectors
from moe_ablm.model.encoder import Encoder, Observe
from moe_ablm.model.routing import SoftPlan


class Choices(NamedTuple):
    """Experts of tokens and their gates.

    Attributes:
      experts: int32 `[..., M, K]`, E where there is none; K is E in expert choice.
      gates: `[..., M, K]`, 0 where there is none.
    """

    experts: np.ndarray
    gates: np.ndarray


class Weights(NamedTuple):
    """Weights of soft-MoE: `dispatch` and `combine`, float32 `[..., M, E, S]`.

    A slot is the mean of tokens weighted by `dispatch`; the output of a token is the sum of slot
    outputs weighted by `combine`.
    """

    dispatch: np.ndarray
    combine: np.ndarray


@dataclass(frozen=True)
class Routing:
    """The arrays of `Choices` or `Weights`, by name: `[B, L, M, ...]`."""

    def __call__(self, encoder: Encoder, batch: Batch) -> dict[str, jax.Array]:
        routing = encoder(batch.tokens, batch.valid, observe=Observe(plans=True)).routing
        assert routing is not None  # a model with experts
        # `[M, B, L, ...]` -> `[B, L, M, ...]`
        plan = jax.tree.map(lambda x: jax.numpy.moveaxis(x, 0, 2), routing.plan)
        if isinstance(plan, SoftPlan):
            return {"dispatch": plan.dispatch, "combine": plan.combine}
        return {"experts": plan.experts, "gates": plan.gates}


def route(engine: Engine, antibodies: Sequence[Antibody]) -> list[Choices | Weights]:
    """Routing of the residues of each antibody, arrays `[residues, M, ...]`.

    Raises:
      UserError: the model has no experts.
    """
    spec = engine.model.spec
    if not spec.moe_layers:
        raise UserError(f"{engine.model.source}: a dense model; only experts are routed to")
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    routings: list = [None] * len(rows)
    for index, routing in engine.run(Routing(), [row.tokens for row in rows]):
        kind = Weights if "combine" in routing else Choices
        routings[index] = kind(**{name: a[rows[index].places] for name, a in routing.items()})
    return routings


def bytes_of(engine: Engine, antibody: Antibody) -> int:
    """Estimate of the bytes of an antibody's table."""
    moe = engine.model.spec.moe
    if moe is None:
        return 0
    each = 8 * moe.experts * moe.slots_of_expert or 64 * moe.choices
    return antibody.residues * len(engine.model.spec.moe_layers) * each


def table(
    engine: Engine,
    antibodies: Sequence[Antibody],
    numbering: str = "imgt",
    germlines: Sequence[str] = (HUMAN,),
) -> pa.Table:
    """A table with a line for each residue, layer and expert.

    For token choice and expert choice it has only experts that compute for the residue, or `expert`
    -1 if none does. For soft-MoE it has all experts, with `dispatch [S]` and `combine [S]` of their
    slots and `share`, the sum of `combine`.
    """
    routings, layers = route(engine, antibodies), np.array(engine.model.spec.moe_layers)
    labels = numbered_labels(antibodies, numbering, germlines)
    names = {name: np.array(values) for name, values in labels.items()}
    if isinstance(routings[0], Weights):
        dispatch, combine = (np.concatenate(arrays) for arrays in zip(*routings, strict=True))
        residue, layer, expert = np.indices(combine.shape[:3]).reshape(3, -1)
        columns = {name: values[residue] for name, values in names.items()}
        columns |= {"layer": layers[layer], "expert": expert}
        columns["share"] = combine.sum(-1).reshape(-1)
        slots = combine.shape[-1]
        columns["dispatch"] = vectors(dispatch.reshape(-1, slots))
        columns["combine"] = vectors(combine.reshape(-1, slots))
        return pa.table(columns)
    experts, gates = (np.concatenate(arrays) for arrays in zip(*routings, strict=True))
    moe = engine.model.spec.moe
    assert moe is not None  # `route` refuses dense models
    order = np.argsort(-gates, axis=-1, kind="stable")
    experts, gates = (np.take_along_axis(a, order, axis=-1) for a in (experts, gates))
    taken = experts < moe.experts
    taken[..., 0] |= ~taken.any(-1)
    residue, layer, choice = np.nonzero(taken)
    columns = {name: values[residue] for name, values in names.items()}
    columns |= {"layer": layers[layer]}
    columns["expert"] = np.where(experts[taken] < moe.experts, experts[taken], -1)
    return pa.table(columns | {"gate": gates[taken]})
