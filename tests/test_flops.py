"""Parameters and FLOPs from the spec, against the arrays, the jaxpr and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model import flops
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.ffn import FeedForward
from moe_ablm.model.grouped import BLOCK, ExpertWeights, grouped_ffn
from moe_ablm.model.moe import MoE
from moe_ablm.model.spec import SIZES, EncoderSpec, Execution, MoESpec

MOES = {
    "none": MoESpec(),
    "top1 alternate": MoESpec("topk", experts=4, k=1),
    "top2 every": MoESpec("topk", experts=8, k=2, placement="every", first_dense=0),
    "top2 last": MoESpec("topk", experts=3, k=2, placement="last_2", first_dense=0),
    "all of all": MoESpec("topk", experts=3, k=3, placement="1,2"),
}
SPARSE = {"none": 0, "top1 alternate": 2, "top2 every": 4, "top2 last": 2, "all of all": 2}


def parts(spec: EncoderSpec):
    """Abstract arrays of an encoder: `(elements, is it expert weights?)` of each."""
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    return [
        (value.get_value().size, "E" in value.axes)
        for _, value in nnx.to_flat_state(nnx.state(module, nnx.Param))
    ]


@pytest.mark.parametrize("name", MOES)
def test_parameters_equal_those_of_the_arrays(name):
    spec = EncoderSpec(4, 12, 20, 2, moe=MOES[name])
    sizes = parts(spec)
    assert len(spec.moe_layers) == SPARSE[name]
    assert flops.params_total(spec) == sum(size for size, _ in sizes)
    experts = sum(size for size, of_experts in sizes if of_experts)
    rest = sum(size for size, of_experts in sizes if not of_experts)
    assert flops.params_active(spec) == rest + experts * spec.moe.k // spec.moe.experts


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
    assert flops.forward_flops_per_token(spec, 7) == 2 * multiply_adds
    assert flops.train_flops_per_token(spec, 7) == 6 * multiply_adds


def test_flops_equal_what_xla_counts():
    """A dense encoder wide enough for its matmuls to be nearly everything."""
    spec, b, length = EncoderSpec(2, 768, 3072, 12), 2, 64
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    definition, params = nnx.split(module)
    run = jax.jit(lambda p, t, v: nnx.merge(definition, p)(t, v).logits)
    tokens = jax.ShapeDtypeStruct((b, length), jnp.int32)
    compiled = run.lower(params, tokens, jax.ShapeDtypeStruct((b, length), bool)).compile()
    counted = compiled.cost_analysis()["flops"]
    expected = flops.forward_flops_per_token(spec, length) * b * length
    assert abs(counted / expected - 1) < 0.02


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
        times = trips if eqn.primitive.name == "while" else 1
        total += times * sum(matmul_flops(getattr(p, "jaxpr", p), trips) for p in inner)
    return total


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("name", ["none", "top1 alternate", "top2 every"])
def test_flops_equal_the_matmuls_of_the_program(name):
    """Exactly, when the experts' blocks are all full: T * K / BLOCK of them."""
    spec = EncoderSpec(4, 32, 64, 2, moe=MOES[name])
    b, length = 2, BLOCK
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    definition, params = nnx.split(module)
    jaxpr = jax.make_jaxpr(lambda p, t, v: nnx.merge(definition, p)(t, v).logits)(
        params,
        jax.ShapeDtypeStruct((b, length), jnp.int32),
        jax.ShapeDtypeStruct((b, length), bool),
    )
    blocks = b * length * spec.moe.k // BLOCK
    expected = flops.forward_flops_per_token(spec, length) * b * length
    expected += len(spec.moe_layers) * 2 * spec.moe.experts  # load . probability, once a layer
    assert matmul_flops(jaxpr.jaxpr, blocks) == expected


def test_backward_matmuls_of_a_dense_ffn_are_twice_the_forward_ones():
    """Where the factor 3 of training comes from."""
    layer = FeedForward(EncoderSpec(1, 32, 64, 1), Execution(), nnx.Rngs(0))
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
    weights = ExpertWeights(*(w[...] for w in (moe.up, moe.up_bias, moe.down, moe.down_bias)))
    expert, x = jnp.zeros(4, jnp.int32), jnp.ones((4 * BLOCK, 32))

    def loss(x, weights):
        return grouped_ffn(x, weights, expert, jnp.int32(4), "float32").sum()

    forward = matmul_flops(jax.make_jaxpr(loss)(x, weights).jaxpr, trips=4)
    both = matmul_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights).jaxpr, trips=4)
    assert forward == 4 * BLOCK * 2 * 2 * 32 * 64 and both == 3 * forward
