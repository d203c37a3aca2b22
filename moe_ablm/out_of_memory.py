"""One line for a run that does not fit the memory of a device."""

import jax

from moe_ablm.config_schema import Config
from moe_ablm.model.spec import Execution
from moe_ablm.training.memory import Needed

_WORDS = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")
_REASON = 100  # characters of XLA's message


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether XLA ran out of a device's memory, be it while it compiled or while it computed.

    XLA has one type of error for everything; orbax may wrap it.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error) for w in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_memory(
    error: Exception, config: Config, execution: Execution, needed: Needed, memory: int | None
) -> str:
    """One line: what an update needs, what a device has, and what to set.

    Args:
      error: what was raised.
      config: of the run.
      execution: in effect.
      needed: estimate of what an update needs.
      memory: bytes of a device; None: not known.
    """
    reason = str(error).strip().split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")[:_REASON]
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needed._asdict().items() if size)
    has = f", which has {memory / 1e9:.1f}" if memory else ""
    return (
        f"out of device memory: an update needs about {needed.total / 1e9:.1f} GB a device{has} "
        f"({parts}); {_advice(config, execution)} (XLA: {reason})"
    )


def _advice(config: Config, execution: Execution) -> str:
    mesh, devices = config.mesh, jax.device_count()
    here = []
    if execution.remat != "full":
        here.append(f"--config.compute.remat=full (now {execution.remat})")
    more = "" if devices > mesh.fsdp * mesh.expert else " and more devices"
    here.append(f"a larger --config.mesh.fsdp (now {mesh.fsdp}){more}")
    text = f"give the same command {' or '.join(here)}: it goes on from the newest checkpoint"
    batch, now = config.train.batch, config.train.accumulate
    fits = [n for n in range(now + 1, batch + 1) if batch % n == 0 and batch // n % devices == 0]
    if fits:
        text += f"; or --config.train.accumulate={fits[0]} (now {now}) and another --workdir"
    return text
