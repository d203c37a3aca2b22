"""The device whose hours a sweep plans, where `--device` does not say.

Hardware that is named says it: `--hardware=v5e-8`. Cells that this machine runs, without GPU or
TPU, are planned for one of its cores. Otherwise it is the device that the study was made for.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.hardware import hardware
from moe_ablm.training.peaks import KINDS

CORE = "core"  # of a CPU
# of NVIDIA's driver; of TPUs, older and newer ones
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")


def planned_device(
    made_for: str, named: str | None, here: bool, accelerators: Sequence[str] = ACCELERATORS
) -> str:
    """A name of `sweeps.cost.DEVICES`.

    Args:
      made_for: the device of the study.
      named: hardware of `--hardware` or of the launcher's settings; None: not given.
      here: whether this machine is to run the cells.
      accelerators: device files of which a machine with a GPU or TPU has one.

    Raises:
      UserError: there is no such hardware.
    """
    if named is not None:
        chip = hardware(named).chip
        return CORE if chip == "cpu" else chip
    if here and not any(Path(file).exists() for file in accelerators):
        return CORE
    return made_for


def device_of(kind: str | None) -> str | None:
    """The device by JAX's `device_kind`; None where it is not known."""
    return CORE if kind == "cpu" else KINDS.get(kind or "")
