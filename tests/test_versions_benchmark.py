"""`benchmarks/versions.py` tells right from wrong."""

import jax.numpy as jnp
import numpy as np

from benchmarks import versions


def test_operations_are_right_and_a_wrong_one_is_told(capsys, monkeypatch):
    assert versions.main(["--tokens", "256"]) == 0
    assert "gradient of LayerNorm" in capsys.readouterr().out
    x = np.linspace(1, 2, 64, dtype=np.float32)
    error, _ = versions.error_of(lambda a: a * (1.01 if a.dtype == jnp.float32 else 1.0), (x,))
    assert abs(error - 0.01) < 1e-5
    wrong = {"wrong": (lambda a: a * (1.01 if a.dtype == jnp.float32 else 1.0), (x,))}
    monkeypatch.setattr(versions, "operations", lambda tokens: wrong)
    assert versions.main([]) == 1
