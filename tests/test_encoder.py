"""The encoder against Hugging Face's `EsmForMaskedLM`, and its invariances."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_blocks import jit

from moe_ablm.interop.naming import ESM
from moe_ablm.model import flops
from moe_ablm.model.encoder import Encoder, Observe
from moe_ablm.model.families import ExpertChoice, Soft, TopK
from moe_ablm.model.packing import Packing
from moe_ablm.model.spec import SIZES, EncoderSpec, Execution

FIXTURES = Path(__file__).parent / "fixtures"
# numel of `EsmForMaskedLM(config)` of transformers 5.23.0, and of its contact head, which is no
# part of the language model
HUGGINGFACE_PARAMS = {
    "8m": (7_512_474, 121),
    "35m": (33_501_394, 241),
    "150m": (148_140_154, 601),
    "350m": (355_252_514, 641),
    "650m": (651_043_254, 661),
}


def tiny_spec(**changes) -> EncoderSpec:
    return EncoderSpec(**({"layers": 2, "d_model": 24, "ffn": 48, "heads": 4} | changes))


def encode(spec, execution, params=None):
    """A jitted `(tokens, valid) -> Output` under given or fresh parameters."""
    definition, fresh = nnx.split(Encoder(spec, execution, nnx.Rngs(0)))
    params = fresh if params is None else params
    run = jax.jit(lambda *inputs: nnx.merge(definition, params)(*inputs))
    return lambda tokens, valid, *packing: run(jnp.asarray(tokens), jnp.asarray(valid), *packing)


@pytest.fixture(scope="module")
def huggingface():
    return np.load(FIXTURES / "esm2_tiny.npz", allow_pickle=False)


def imported(huggingface, spec):
    tensors = {k[2:]: huggingface[k] for k in huggingface.files if k.startswith("w/")}
    _, params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))
    return ESM.read(params, tensors)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("token_dropout", [True, False])
def test_logits_equal_those_of_huggingface(huggingface, token_dropout, scan):
    spec = tiny_spec(token_dropout=token_dropout)
    params = imported(huggingface, spec)
    valid = huggingface["valid"]
    found = encode(spec, Execution(scan=scan), params)(huggingface["tokens"], valid).logits
    expected = huggingface[f"logits_dropout_{token_dropout}".lower()]
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_equal_those_of_huggingface(size):
    layers, d_model, ffn, heads = SIZES[size]
    spec = EncoderSpec(layers, d_model, ffn, heads)
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    counted = sum(x.size for x in jax.tree.leaves(nnx.state(module)))
    total, contact_head = HUGGINGFACE_PARAMS[size]
    assert counted == flops.params_total(spec) == total - contact_head


SPECS = {
    "dense": tiny_spec(),
    "top1": tiny_spec(moe=TopK(experts=4, k=1)),
    "top2": tiny_spec(moe=TopK(experts=4, k=2, placement="every", first_dense=0)),
    "expert choice": tiny_spec(moe=ExpertChoice(experts=4)),
    "learned positions, norms after": tiny_spec(
        learned_positions=30, embedding_norm=True, post_norm=True
    ),
    "soft": tiny_spec(tied=False, activation="swiglu", moe=Soft(experts=4, slots=3)),
}


@pytest.fixture(scope="module", params=SPECS)
def model(request):
    return encode(SPECS[request.param], Execution())


@pytest.fixture(scope="module")
def rows():
    return make_rows()


def make_rows():
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 24, (4, 24))
    tokens[:, 3] = 32
    return tokens, np.arange(24) < np.array([24, 17, 9, 12])[:, None]


def test_padding_never_changes_a_logit(model, rows):
    tokens, valid = rows
    before = model(tokens, valid).logits
    after = model(np.where(valid, tokens, 7), valid).logits
    np.testing.assert_array_equal(before[valid], after[valid])


def test_longer_padding_never_changes_a_logit(model, rows):
    tokens, valid = rows
    before = model(tokens, valid).logits
    wide = model(np.pad(tokens, ((0, 0), (0, 8))), np.pad(valid, ((0, 0), (0, 8)))).logits[:, :24]
    np.testing.assert_allclose(before[valid], wide[valid], atol=2e-6, rtol=0)


def test_batch_neighbours_never_change_a_logit(model, rows):
    tokens, valid = rows
    before = model(tokens, valid).logits
    others = np.where(np.arange(4)[:, None] == 1, tokens, tokens[::-1])
    others_valid = np.where(np.arange(4)[:, None] == 1, valid, valid[::-1])
    after = model(others, others_valid).logits
    np.testing.assert_allclose(before[1][valid[1]], after[1][valid[1]], atol=2e-6, rtol=0)


@cache
def loss_and_gradient(name: str, execution: Execution):
    """Of four layers in training, the jitter of their routers included."""
    moe = replace(SPECS[name].moe, jitter=0.1) if name != "dense" else SPECS[name].moe
    spec = EncoderSpec(4, 24, 48, 4, moe=moe)
    params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))[1]
    definition = nnx.split(nnx.eval_shape(lambda: Encoder(spec, execution, nnx.Rngs(0))))[0]
    tokens, valid = (jnp.asarray(a) for a in make_rows())

    def loss(params):
        model, key = nnx.merge(definition, params), jax.random.key(0)
        output = model(tokens, valid, None, True, key)
        aux = 0 if output.routing is None else output.routing.stats.load_balance.sum()
        return jnp.square(output.logits * valid[..., None]).sum() + aux

    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss), compiler_options=quickly)(params)


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        pytest.param("dense", Execution(scan=True), marks=pytest.mark.slow),
        # pairs of a dense and a sparse layer
        pytest.param("top1", Execution(scan=True), marks=pytest.mark.slow),
        pytest.param("top2", Execution(scan=True, remat="full"), marks=pytest.mark.slow),
        ("top1", Execution(remat="full")),
        pytest.param("top1", Execution(remat="matmuls"), marks=pytest.mark.slow),
        ("top2", Execution(scan=True, backend="tpu", remat="matmuls")),
    ],
    ids=str,
)
def test_scan_and_remat_change_neither_loss_nor_gradient(name, execution):
    for found, expected in zip(
        jax.tree.leaves(loss_and_gradient(name, execution)),
        jax.tree.leaves(loss_and_gradient(name, Execution())),
        strict=True,
    ):
        scale = float(jnp.abs(expected).max()) + 1e-30
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


def test_routing_is_reported_layer_by_layer_however_layers_run():
    """Statistics and assignments of the sparse layers, in their order."""
    spec = EncoderSpec(4, 24, 48, 4, moe=SPECS["top1"].moe)
    tokens, valid = make_rows()
    found = [encode(spec, Execution(scan=scan))(tokens, valid).routing for scan in (False, True)]
    assert found[0].assigned.shape == (2, 4, 24, 4) and found[0].stats.load.shape == (2, 4)
    np.testing.assert_array_equal(found[0].assigned.sum(-1), np.stack([valid, valid]))
    assert (found[0].assigned[0] != found[0].assigned[1]).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    dense = encode(SPECS["dense"], Execution())(tokens, valid)
    assert dense.routing is None


def test_an_untied_decoder_replaces_the_embedding():
    encoder = Encoder(tiny_spec(tied=False), Execution(), nnx.Rngs(0))
    x, other = jnp.ones((1, 2, 24)), jnp.zeros((33, 24))
    before = encoder.head(x, encoder.embedding[...])
    np.testing.assert_array_equal(before, encoder.head(x, other))
    encoder.head.decoder[...] = encoder.embedding[...]
    tied = Encoder(tiny_spec(), Execution(), nnx.Rngs(0)).head
    tied.dense.kernel[...] = encoder.head.dense.kernel[...]
    tied_logits = tied(x, encoder.embedding[...])
    np.testing.assert_array_equal(encoder.head(x, other), tied_logits)
    assert (before != tied_logits).any()


def test_bfloat16_stays_near_float32(rows):
    tokens, valid = rows
    # dense: rounding may send a token near a tie to another expert
    params = nnx.split(Encoder(SPECS["dense"], Execution(), nnx.Rngs(0)))[1]
    exact = encode(SPECS["dense"], Execution(), params)(tokens, valid).logits
    for activations in ("bfloat16", "float32"):
        near = encode(SPECS["dense"], Execution(activations, "bfloat16"), params)(tokens, valid)
        assert near.logits.dtype == jnp.float32
        np.testing.assert_allclose(near.logits[valid], exact[valid], atol=0.02)


@pytest.mark.parametrize(("name", "backend"), [("dense", "cpu"), ("soft", "tpu")])
def test_gradients_in_bfloat16_are_those_of_float32(name, backend):
    """Of 4,096 tokens: of biases, whose sums over tokens bfloat16 would spoil, and of all."""
    spec = replace(SPECS[name], d_model=32)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(4, 24, (64, 64)))
    masked, valid = jnp.where(rng.random(tokens.shape) < 0.15, 32, tokens), tokens > 0
    # no routing that a rounding could turn; weights with which layers matter
    params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))[1]
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)

    def gradient(execution):
        definition = nnx.split(nnx.eval_shape(lambda: Encoder(spec, execution, nnx.Rngs(0))))[0]

        def loss(params):
            found = nnx.merge(definition, params)(masked, valid, None, True).logits
            return -jnp.take_along_axis(jax.nn.log_softmax(found), tokens[..., None], -1).mean()

        quickly = {"xla_backend_optimization_level": 0}
        found = jax.jit(jax.grad(loss), compiler_options=quickly)(params)
        flat = nnx.to_flat_state(found)
        return {path: np.asarray(v.get_value(), "f8") for path, v in flat}

    exact = gradient(Execution(backend=backend))
    found = gradient(Execution("bfloat16", "bfloat16", backend=backend))
    biases = [path for path in exact if "bias" in path[-1]]
    assert len(biases) > 10
    for path in biases:
        error = np.linalg.norm(found[path] - exact[path]) / np.linalg.norm(exact[path])
        assert error < 0.015, path
    everything = [np.concatenate([g[p].ravel() for p in exact]) for g in (found, exact)]
    error = np.linalg.norm(everything[0] - everything[1]) / np.linalg.norm(everything[1])
    assert error < 0.01


def test_attention_weights_are_those_of_the_forward_pass(rows):
    tokens, valid = (jnp.asarray(a) for a in rows)
    encoder = Encoder(tiny_spec(), Execution(), nnx.Rngs(0))
    observe = Observe(attention=True)
    weights = jit(lambda t, v: encoder(t, v, observe=observe).attention)(tokens, valid)
    assert [w.shape for w in weights] == [(4, 4, 24, 24)] * 2
    np.testing.assert_allclose(weights[1].sum(-1), 1.0, atol=1e-5)
    assert float(jnp.where(valid[:, None, None], 0.0, weights[1]).max()) == 0.0
    # the values weighted by hand give the block's attention output
    layer, x = encoder.layers[0], encoder.layers[0].attention_norm(encoder.embed(tokens, valid))
    _, _, v = layer.attention._project(x)
    by_hand = jnp.einsum("bhqk,bkhd->bqhd", weights[0], v).reshape(x.shape)
    np.testing.assert_allclose(layer.attention.out(by_hand), layer.attention(x, valid), atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_observed_changes_nothing(name, rows):
    """Hidden states from the embedding to what the head reads, plans of the sparse layers."""
    tokens, valid = (jnp.asarray(a) for a in rows)
    spec = SPECS[name]
    encoder = Encoder(spec, Execution(scan=True), nnx.Rngs(0))
    everything = Observe(hidden=True, attention=True, plans=True)

    @jit
    def run(tokens, valid):
        seen = encoder(tokens, valid, observe=everything)
        head = encoder.head(seen.hidden[-1], encoder.embedding[...])
        return encoder(tokens, valid), seen, encoder.embed(tokens, valid), head

    plain, seen, embedded, head = run(tokens, valid)
    assert plain.hidden == plain.attention == ()
    np.testing.assert_allclose(seen.logits[valid], plain.logits[valid], atol=2e-6)
    assert len(seen.hidden) == 3 and len(seen.attention) == 2
    np.testing.assert_allclose(seen.hidden[0], embedded, atol=1e-6)
    np.testing.assert_allclose(seen.logits, head, atol=1e-6)
    if not spec.moe:
        assert seen.routing is None
        return
    assert plain.routing.plan is None
    plans = seen.routing.plan
    assert {len(x) for x in jax.tree.leaves(plans)} == {len(spec.moe_layers)}
    for i in range(len(spec.moe_layers)):
        plan = jax.tree.map(lambda x, i=i: x[i], plans)
        np.testing.assert_array_equal(plan.assigned(4), seen.routing.assigned[i])


@pytest.mark.parametrize("name", SPECS)
def test_logits_of_one_position_are_those_of_all(name, rows):
    tokens, valid = (jnp.asarray(a) for a in rows)
    encoder = Encoder(SPECS[name], Execution(), nnx.Rngs(0))
    at = np.array([23, 0, 5, 11])
    run = jit(lambda t, v, at: (encoder(t, v, at=at).logits, encoder(t, v).logits))
    found, everywhere = run(tokens, valid, jnp.asarray(at))
    assert found.shape == (4, 1, 33)
    expected = everywhere[np.arange(4), at]
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-6)


@pytest.mark.hf
@pytest.mark.parametrize("token_dropout", [True, False])
def test_live_against_transformers(token_dropout):
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    from fixtures.make_esm2_tiny import inputs, tiny

    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
    model = tiny(token_dropout, **sizes)
    tokens, valid = inputs()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(valid).long())
    spec = EncoderSpec(3, 64, 128, 4, token_dropout=token_dropout)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    params = ESM.read(nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))[1], tensors)
    found = encode(spec, Execution(), params)(tokens, valid).logits
    np.testing.assert_allclose(found[valid], expected.logits.numpy()[valid], atol=1e-5, rtol=0)


def test_learned_positions_learn_from_packed_rows_as_from_others():
    """Gradients of two rows apart, and of the same in one, where places are looked up."""
    name = "learned positions, norms after"
    spec = replace(SPECS[name], layers=1, token_dropout=False)
    definition, params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))

    def gradient(tokens, valid, packing=None):
        def loss(params):
            logits = nnx.merge(definition, params)(tokens, valid, packing).logits
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
            return (picked * valid).sum()

        return jit(jax.grad(loss))(params)

    tokens = np.array([[0, 5, 6, 2, 1], [0, 9, 8, 7, 2]])
    antibody = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    position = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    row = np.array([[0, 5, 6, 2, 0, 9, 8, 7, 2, 1]])
    apart = gradient(jnp.asarray(tokens), jnp.asarray(tokens != 1))
    packing = Packing(jnp.asarray(antibody), jnp.asarray(position))
    together = gradient(jnp.asarray(row), jnp.asarray(row != 1), packing)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    learned = np.abs(np.asarray(apart["positions"].get_value())).max(1)
    assert (learned[:5] > 0).all() and (learned[5:] == 0).all()


def test_packed_rows_give_the_logits_of_separate_ones(model, rows):
    tokens, valid = rows
    lengths = valid.sum(1)
    packed, antibody, position = (np.zeros((1, 80), int) for _ in range(3))
    starts = np.cumsum(lengths) - lengths
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        here = slice(start, start + length)
        packed[0, here], antibody[0, here] = tokens[i, :length], i + 1
        position[0, here] = np.arange(length)
    apart = model(tokens, valid).logits[valid]
    packing = Packing(jnp.asarray(antibody), jnp.asarray(position))
    together = model(packed, antibody > 0, packing).logits[0, : lengths.sum()]
    np.testing.assert_allclose(together, apart, atol=2e-6, rtol=0)
