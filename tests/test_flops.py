"""Parameters and FLOPs from the spec, against the arrays, the jaxpr and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model import flops
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.experts import BLOCK, Groups, grouped_ffn
from moe_ablm.model.families import ExpertChoice, RowShape, Sequence, Soft, TopK, TopP
from moe_ablm.model.layers import FeedForward
from moe_ablm.model.moe import MoE
from moe_ablm.model.spec import SIZES, EncoderSpec, Execution

ROWS = BLOCK["cpu"][0]  # of a block
MOES = {
    "none": None,
    "top1 alternate": TopK(experts=4, k=1),
    "top2 every": TopK(experts=8, k=2, placement="every", first_dense=0),
    "top2 last": TopK(experts=3, k=2, placement="last_2", first_dense=0),
    "all of all": TopK(experts=3, k=3, placement="1,2"),
    "capacity": TopK(experts=4, k=2, capacity=0.75),
    "balanced": TopK(experts=4, k=2, gate="sigmoid", balance_rate=0.1),
    "shared": TopP(experts=4, k=2, shared=2),
    "unequal": TopK(experts=4, k=2, widths=(8, 16, 24, 8), shared=1),
    "narrow": TopK(experts=4, k=2, ffn=7),
    "expert choice": ExpertChoice(experts=4, k=2),
    "expert choice half": ExpertChoice(experts=4, k=2, capacity=0.5),
    "soft": Soft(experts=4, slots=5),
    "soft l2": Soft(experts=4, slots=5, l2=True),
    "sequence": Sequence(experts=4, k=2),
}
SPARSE = {"none": 0, "top2 every": 4}  # layers, else 2
# experts that compute for an average token in training
ACTIVE = {
    "none": 1, "top1 alternate": 1, "all of all": 3, "capacity": 1.5, "expert choice half": 1,
    "soft": 4, "soft l2": 4,
}  # fmt: skip


def parts(spec: EncoderSpec):
    """Abstract arrays of an encoder: `(elements, is it expert weights?)` of each."""
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    return [
        (value.get_value().size, "E" in value.axes)
        for _, value in nnx.to_flat_state(nnx.state(module, nnx.Param))
    ]


@pytest.mark.parametrize(
    ("activation", "tied"), [("gelu", True), ("swiglu", False)], ids=["gelu tied", "swiglu untied"]
)
@pytest.mark.parametrize("name", MOES)
def test_parameters_equal_those_of_the_arrays(name, activation, tied):
    spec = EncoderSpec(4, 12, 20, 2, activation=activation, tied=tied, moe=MOES[name])
    sizes = parts(spec)
    assert len(spec.moe_layers) == SPARSE.get(name, 2)
    assert flops.params_total(spec) == sum(size for size, _ in sizes)
    experts = sum(size for size, of_experts in sizes if of_experts)
    rest = sum(size for size, of_experts in sizes if not of_experts)
    active = rest + (experts * ACTIVE.get(name, 2) / spec.moe.experts if spec.moe else 0)
    assert abs(flops.params_active(spec) - active) <= len(spec.moe_layers) / 2


@pytest.mark.parametrize("size", SIZES)
def test_a_dense_encoder_is_all_active(size):
    spec = EncoderSpec(*SIZES[size])
    assert flops.params_total(spec) == flops.params_active(spec)


def test_counts_by_hand():
    """1 layer, D 2, F 3, V 5: every array written out."""
    spec = EncoderSpec(1, 2, 3, 1, vocabulary=5)
    embedding, norms, attention = 5 * 2, 2 * 4, 4 * (2 * 2 + 2)
    ffn = (2 * 3 + 3) + (3 * 2 + 2)
    final_norm, head = 4, (2 * 2 + 2) + 4 + 5
    assert flops.params_total(spec) == embedding + norms + attention + ffn + final_norm + head
    multiply_adds = 4 * 2 * 2 + 2 * 2 * 3 + (2 * 7 + 2 * 7) + 2 * 2 + 2 * 5  # 7: keys, values
    assert flops.forward_flops_per_token(spec, RowShape(7, 7)) == 2 * multiply_adds
    assert flops.train_flops_per_token(spec, RowShape(7, 7)) == 6 * multiply_adds


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("embedding_norm", [False, True])
def test_positions_and_norms_are_counted(embedding_norm, post_norm):
    spec = EncoderSpec(
        2, 12, 20, 2, learned_positions=7, embedding_norm=embedding_norm, post_norm=post_norm
    )
    assert flops.params_total(spec) == sum(size for size, _ in parts(spec))


# wide enough for matmuls to be nearly everything
WIDE = {"layers": 1, "d_model": 1024, "ffn": 1024, "heads": 4}
EVERY = {"placement": "every", "first_dense": 0, "experts": 4}
COUNTED = {
    "dense": (None, False),
    "topk": (TopK(capacity=1.25, **EVERY), True),
    "topp": (TopP(capacity=0.5, shared=1, **EVERY), True),
    "expert choice": (ExpertChoice(**EVERY), False),
    "expert choice, small": (ExpertChoice(capacity=0.3, **EVERY), True),
    "soft": (Soft(slots=24, **EVERY), False),
}


def abstract(spec: EncoderSpec, b: int, length: int):
    """Definition, and the parameters, tokens and mask of a batch without their values."""
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    definition, params = nnx.split(module)
    kinds = (jnp.int32, bool)
    return definition, params, *(jax.ShapeDtypeStruct((b, length), kind) for kind in kinds)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", COUNTED)
def test_flops_equal_what_xla_counts(name, activation):
    """In the program before fusions; loops of the dropless way, which it counts once: below."""
    (moe, training), b, length = COUNTED[name], 2, 64
    spec = EncoderSpec(**WIDE, activation=activation, moe=moe)
    definition, *inputs = abstract(spec, b, length)
    run = jax.jit(lambda p, t, v: nnx.merge(definition, p)(t, v, None, training).logits)
    counted = run.lower(*inputs).cost_analysis()["flops"]
    expected = flops.forward_flops_per_token(spec, RowShape(length, length), training) * b * length
    assert abs(counted / expected - 1) < 0.02


@pytest.mark.parametrize("name", ["dense", "topk"])
def test_flops_of_a_compiled_training_step(name):
    """Forward and backward, as XLA compiles them."""
    moe, b, length = COUNTED[name][0], 2, 64
    spec = EncoderSpec(**WIDE, moe=moe)
    definition, *inputs = abstract(spec, b, length)

    def loss(p, t, v):
        return nnx.merge(definition, p)(t, v, None, True).logits.sum()

    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(jax.grad(loss), compiler_options=options).lower(*inputs).compile()
    expected = flops.train_flops_per_token(spec, RowShape(length, length)) * b * length
    assert abs(compiled.cost_analysis()["flops"] / expected - 1) < 0.02


def matmul_flops(jaxpr, trips: int = 1) -> int:
    """FLOPs of the matmuls of a jaxpr, loops with an unknown end counted `trips` times."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            a = eqn.invars[0].aval.shape
            out = eqn.outvars[0].aval.size
            total += 2 * out * int(np.prod([a[i] for i in contracted]))
        inner = [p for p in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(p)]
        times = {"while": trips, "scan": eqn.params.get("length")}.get(eqn.primitive.name, 1)
        total += times * sum(matmul_flops(getattr(p, "jaxpr", p), trips) for p in inner)
    return total


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


# router, training, and assignments a token in the blocks of the dropless way (0: no loop)
PROGRAMS = {
    "none": (None, False, 0),
    "top1": (TopK(experts=4, k=1), False, 1),
    "top2 every": (MOES["top2 every"], True, 2),
    "top2 capacity": (TopK(experts=4, capacity=1.25), True, 0),
    "top2 capacity, inference": (TopK(experts=4, capacity=1.25), False, 2),
    "top2 batch": (TopK(experts=4, capacity=0.5, group="batch"), True, 1),
    "topp": (TopP(experts=4, k=3), False, 3),  # at most
    "topp capacity": (TopP(experts=4, k=3, capacity=0.5), True, 0),
    "shared": (TopK(experts=4, shared=2), True, 2),
    # parts of 32: 1, 2, 3, 2, so 2 on average and 4 of a token's two experts
    "unequal": (TopK(experts=4, widths=(32, 64, 96, 64)), True, 4),
    "expert choice": (ExpertChoice(experts=4, capacity=0.75), True, 0),
    "expert choice, inference": (ExpertChoice(experts=4), False, 0),
    "expert choice batch": (ExpertChoice(experts=4, group="batch"), True, 2),
    "soft": (Soft(experts=4, slots=5), True, 0),
    "soft l2, inference": (Soft(experts=4, slots=5, l2=True), False, 0),
    "sequence": (Sequence(experts=4), True, 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_equal_the_matmuls_of_the_program(name):
    """Exactly, when the experts' blocks are all full."""
    moe, training, assignments = PROGRAMS[name]
    spec = EncoderSpec(2, 32, 64, 2, moe=moe)
    b, length = 2, ROWS
    definition, *inputs = abstract(spec, b, length)

    def loss(p, t, v):
        return nnx.merge(definition, p)(t, v, None, training).logits.sum()

    blocks = b * length * assignments // ROWS
    forward = matmul_flops(jax.make_jaxpr(loss)(*inputs).jaxpr, blocks)
    assert (
        forward
        == flops.forward_flops_per_token(spec, RowShape(length, length), training) * b * length
    )
    if training:  # nothing is computed twice, nothing that needs a gradient left out
        both = matmul_flops(jax.make_jaxpr(jax.grad(loss))(*inputs).jaxpr, blocks)
        # the gradient of the embedding is a product, but one in place of a sum: it is not counted
        look_up = 2 * spec.vocabulary * spec.d_model
        counted = flops.train_flops_per_token(spec, RowShape(length, length))
        assert both == (counted + look_up) * b * length


def test_backward_matmuls_of_a_dense_ffn_are_twice_the_forward_ones():
    """Where the factor 3 of training comes from."""
    layer = FeedForward(EncoderSpec(1, 32, 99, 1), 64, Execution(), nnx.Rngs(0))
    definition, params = nnx.split(layer)

    def loss(params, x):
        return nnx.merge(definition, params)(x).sum()

    x = jnp.ones((4, 8, 32))
    forward = matmul_flops(jax.make_jaxpr(loss)(params, x).jaxpr)
    both = matmul_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x).jaxpr)
    assert forward == 2 * 32 * 2 * 32 * 64 and both == 3 * forward


def test_backward_matmuls_of_experts_are_twice_the_forward_ones():
    """Nothing of the experts is computed twice."""
    moe = MoE(EncoderSpec(1, 32, 64, 1, moe=MOES["top2 every"]), Execution(), nnx.Rngs(0))
    weights, x = moe.weights(), jnp.ones((4 * ROWS, 32))
    sizes = jnp.zeros(8, jnp.int32).at[0].set(4 * ROWS)
    groups = Groups(sizes, jnp.zeros(4, jnp.int32), jnp.int32(4))

    def loss(x, weights):
        return grouped_ffn(x, weights, groups, ROWS, "gelu", Execution()).sum()

    forward = matmul_flops(jax.make_jaxpr(loss)(x, weights).jaxpr, trips=4)
    both = matmul_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights).jaxpr, trips=4)
    assert forward == 4 * ROWS * 2 * 2 * 32 * 64 and both == 3 * forward
