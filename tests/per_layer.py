"""What one more layer costs a compiled step: the difference between two depths.

What does not grow with the number of layers (embedding, head, loss, the loops themselves) drops
out, and so does how XLA writes the layers: in a loop, or one after another.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from launch.compile import Compiled, compile_step
from launch.hardware import Hardware
from moe_ablm.config_schema import Config

DEPTHS = 2, 4  # even, for layers that alternate


@dataclass(frozen=True)
class PerLayer:
    """Of a mean layer, on one device.

    Attributes:
      kept: bytes a token that the forward pass keeps for the backward pass: all temporaries that
        grow with the number of layers. There must be so many tokens that a layer keeps more than
        its gradients take, which replace it as the backward pass goes on.
      kernels, copies: of a step.
      copied: bytes a token that the copies move.
    """

    kept: float
    kernels: float
    copies: float
    copied: float


def measure(
    config: Config, where: Hardware, given: Collection[str] = ()
) -> tuple[PerLayer, Compiled]:
    """A layer of a run, and the deeper of the two encoders that it was measured with.

    Raises:
      UserError: as `compile_step`, or the layers of the config cannot be that few.
    """
    shallow, deep = (compile_step(with_layers(config, n), where, given) for n in DEPTHS)
    return difference(shallow, deep, config.data.length), deep


def with_layers(config: Config, layers: int) -> Config:
    """The same config with another number of layers."""
    return replace(config, model=replace(config.model, layers=layers))


def difference(shallow: Compiled, deep: Compiled, length: int) -> PerLayer:
    """A layer, from encoders of the two depths with rows of `length` tokens."""
    layers, tokens = DEPTHS[1] - DEPTHS[0], deep.plan.rows * length
    a, b = shallow.counts, deep.counts
    return PerLayer(
        kept=(deep.memory.temporaries - shallow.memory.temporaries) / layers / tokens,
        kernels=(b.kernels - a.kernels) / layers,
        copies=(b.copies - a.copies) / layers,
        copied=(b.copied - a.copied) / layers / tokens,
    )
