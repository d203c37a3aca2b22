"""Rows that hold several antibodies."""

from typing import NamedTuple

import jax


class Packing(NamedTuple):
    """Which antibody each token of a packed row belongs to, and where in it the token is.

    Attributes:
      antibody: integers `[B, L]`, the number of the antibody within its row, 0 at padding.
      position: integers `[B, L]`, position within the antibody.
    """

    antibody: jax.Array
    position: jax.Array

    def same(self) -> jax.Array:
        """bool `[B, L, L]`: whether two tokens belong to one antibody."""
        antibody = self.antibody
        return (antibody[:, :, None] == antibody[:, None, :]) & (antibody > 0)[:, None, :]
