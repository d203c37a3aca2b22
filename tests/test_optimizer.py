"""Schedules and updates by hand, and which parameters decay."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model.encoder import Encoder
from moe_ablm.model.families import TopK
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.training.optimizer import decay_mask, hidden_mask, make_optimizer, make_schedule
from moe_ablm.training.spec import OptimizerSpec


def spec(**changes):
    values = {
        "steps": 100, "lr": 1.0, "warmup": 10, "schedule": "linear", "decay_share": 0.2,
        "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.01, "clip": 1.0,
    }  # fmt: skip
    return OptimizerSpec(**(values | changes))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ("cosine", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0, 40: (1 + np.cos(np.pi / 3)) / 2}),
        ("wsd", {0: 0, 5: 0.5, 10: 1, 50: 1, 80: 1, 90: 0.5, 100: 0}),
    ],
)
def test_schedule(schedule, expected):
    rate = make_schedule(spec(schedule=schedule))
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(
    ("warmup", "decay_share"), [(80, 0.2), (0, 1.0), (99, 0.001), (50, 0.5), (0, 0.2)]
)
def test_the_last_update_is_one_before_0(schedule, warmup, decay_share):
    """On the boundary, too, where the decay begins as the warm-up ends."""
    s = spec(schedule=schedule, warmup=warmup, decay_share=decay_share)
    rate, steps = make_schedule(s), np.arange(100)
    values = np.array([float(rate(step)) for step in steps])
    assert float(rate(100)) == 0 and float(rate(1000)) == 0
    assert values.max() == pytest.approx(1)
    falling = s.decay_steps() if schedule == "wsd" else 100 - warmup
    assert (np.diff(values) < 0).sum() == falling - 1
    if schedule != "cosine":
        assert values[-1] == pytest.approx(1 / falling)


def test_constant_and_restarts():
    rate = make_schedule(spec(schedule="constant"))
    assert [float(rate(n)) for n in (0, 5, 10, 99, 10**6)] == [0, 0.5, 1, 1, 1]
    rate = make_schedule(spec(steps=160, restarts=(100,)))
    for step, value in {
        5: 0.5,
        55: 0.5,
        99: 1 / 90,
        100: 0,
        105: 0.5,
        110: 1,
        135: 0.5,
        160: 0,
    }.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)
    rate = make_schedule(
        spec(schedule="wsd", steps=160, restarts=(100,))
    )  # decays over 20, over 12
    for step, value in {80: 1, 90: 0.5, 100: 0, 110: 1, 148: 1, 154: 0.5, 160: 0}.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_no_warmup():
    assert float(make_schedule(spec(warmup=0))(0)) == 1.0


def test_weights_decay_and_biases_and_norms_do_not():
    moe = TopK(experts=2, k=1)
    encoder = Encoder(EncoderSpec(2, 8, 16, 2, moe=moe), Execution(), nnx.Rngs(0))
    params = nnx.split(encoder)[1]
    decayed, kept = set(), set()
    for path, value in nnx.to_flat_state(decay_mask(params)):
        (decayed if value.get_value() else kept).add(path[-1])
    assert decayed == {"embedding", "kernel", "router", "up", "down"}
    assert kept == {"bias", "scale", "up_bias", "down_bias"}


def test_one_update_by_hand():
    """AdamW's first step is lr * (sign(g) + wd * w), up to eps, after clipping."""
    optimizer = make_optimizer(spec(warmup=0, clip=0.5))
    params = {"kernel": np.array([[2.0, -1.0]], np.float32)}
    grads = {"kernel": np.array([[3.0, 4.0]], np.float32)}  # norm 5, clipped to 0.5
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    clipped = np.array([[0.3, 0.4]])
    expected = -(clipped / (clipped + 1e-6) + 0.01 * params["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def orthogonalised(x: np.ndarray) -> np.ndarray:
    """Five iterations of Newton and Schulz with Jordan's coefficients, in the precision of `x`."""
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.T).T
    x = x / (np.sqrt((x**2).sum()) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_moves_the_matrices_of_layers_alone():
    moe = TopK(experts=2, k=1)
    encoder = Encoder(EncoderSpec(2, 8, 16, 2, moe=moe, tied=False), Execution(), nnx.Rngs(0))
    found = {
        "/".join(map(str, path)): value.get_value()
        for path, value in nnx.to_flat_state(hidden_mask(nnx.split(encoder)[1]))
    }
    names = {"attention/qkv/kernel", "attention/out/kernel"}
    dense, sparse = {"ffn/up/kernel", "ffn/down/kernel"}, {"ffn/up", "ffn/down"}
    expected = {f"layers/0/{name}" for name in names | dense}
    expected |= {f"layers/1/{name}" for name in names | sparse}
    assert {name for name, moved in found.items() if moved} == expected
    assert "layers/1/ffn/router" in found and "head/dense/kernel" in found and "embedding" in found


@pytest.mark.parametrize("freeze", [0, 1])
def test_two_updates_of_muon_by_hand(freeze):
    """Every expert on its own, in float64; embeddings, routers and biases by AdamW, as before."""
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (5, 4),
        "layers": {
            0: {"up": (3, 4, 6), "down": (3, 6, 4), "router": (4, 3), "kernel": (4, 12)},
            1: {"kernel": (6, 4), "bias": (4,)},
        },
    }

    def drawn():
        return jax.tree.map(
            lambda shape: rng.standard_normal(shape).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    settings = spec(warmup=0, clip=0.0, optimizer="muon", muon_lr=0.1, freeze=freeze, steps=10)
    plain = make_optimizer(spec(warmup=0, clip=0.0, freeze=freeze, steps=10))
    muon, params, gradients = make_optimizer(settings), drawn(), [drawn(), drawn()]
    state, other = muon.init(params), plain.init(params)
    for count, gradient in enumerate(gradients, start=1):
        found, state = muon.update(gradient, state, params)
        by_adamw, other = plain.update(gradient, other, params)
        rate = 0.1 * (1 - (count - 1) / 10)
        for layer, name in [(0, "up"), (0, "down"), (0, "kernel"), (1, "kernel")]:
            if layer < freeze:
                assert not np.asarray(found["layers"][layer][name]).any()
                continue
            seen = [np.float64(g["layers"][layer][name]) for g in gradients[:count]]
            weight = np.float64(params["layers"][layer][name])
            mean = 0.05 * sum(0.95 ** (count - i) * g for i, g in enumerate(seen, start=1))
            ahead = 0.95 * mean / (1 - 0.95 ** (count + 1)) + 0.05 * seen[-1] / (1 - 0.95**count)
            scale = np.sqrt(max(1, weight.shape[-1] / weight.shape[-2]))
            matrices = ahead if ahead.ndim == 3 else ahead[None]
            expected = np.stack([scale * orthogonalised(m) for m in matrices]).reshape(ahead.shape)
            np.testing.assert_allclose(
                found["layers"][layer][name], -rate * (expected + 0.01 * weight), atol=2e-6
            )
        for path in (("embedding",), ("layers", 0, "router"), ("layers", 1, "bias")):
            one, two = found, by_adamw
            for key in path:
                one, two = one[key], two[key]
            np.testing.assert_array_equal(one, two)


def test_muons_own_matrix_is_nearly_orthogonal():
    """Singular values of some .7 to 1.2, whatever those of the gradient are."""
    x = np.random.default_rng(1).standard_normal((12, 40)) * np.geomspace(1, 0.05, 12)[:, None]
    values = np.linalg.svd(orthogonalised(x), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
