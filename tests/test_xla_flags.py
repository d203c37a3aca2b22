"""What is compiled is right in the version of jax that is installed."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_ablm.model.layers import LayerNorm
from moe_ablm.xla_flags import require_right_sums


@pytest.mark.parametrize("shape", [(4096, 32), (16, 256, 32)])
def test_the_gradient_of_a_layer_norm_is_that_of_its_formula(shape):
    """jaxlib 0.11 and 0.12 compile one of thousands of rows wrongly, but for a flag."""
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=shape).astype("f4") for _ in range(2))
    definition, params = nnx.split(LayerNorm(32, 1e-5))

    @jax.jit
    def gradient(x, g):
        return jax.vjp(lambda x: nnx.merge(definition, params)(x), x)[1](g)[0]

    # Ba, Kiros & Hinton 2016: with y = (x - mean) / sd, (g - mean(g) - y mean(g y)) / sd
    wide, slope = x.astype("f8"), g.astype("f8")
    sd = np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    y = (wide - wide.mean(-1, keepdims=True)) / sd
    mean, along = (a.mean(-1, keepdims=True) for a in (slope, slope * y))
    np.testing.assert_allclose(gradient(x, g), (slope - mean - y * along) / sd, atol=1e-5)


def test_the_flag_is_set_for_versions_that_need_it():
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    for jaxlib, given, expected in (
        ("0.10.2", "", ""),
        ("0.11.2", "", f"{flag}=LIBRARY_FUSION_TYPE_DOT"),
        ("0.12.0.1", "--a=1", f"--a=1 {flag}=LIBRARY_FUSION_TYPE_DOT"),
        ("0.12.0", f"{flag}=", f"{flag}="),  # somebody's choice
        ("0.13.0", "--a=1", "--a=1"),
    ):
        environment = {"XLA_FLAGS": given} if given else {}
        require_right_sums(environment, jaxlib)
        require_right_sums(environment, jaxlib)
        assert environment.get("XLA_FLAGS", "") == expected
