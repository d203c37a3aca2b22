"""The engine of whatever `--run` names: a run, an import, or a directory of transformers."""

import os
from contextlib import suppress
from pathlib import Path

import jax

from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.torch_engine import TorchEngine
from moe_ablm.interop.load import load_model
from moe_ablm.interop.pretrained import PREFIX, base_of, load_pretrained


def engine_of(
    run: Path | str,
    precision: str = "float32",
    devices: int = 1,
    batch_tokens: int | None = None,
    name: str = "--run",
    kinds: tuple[type[Engine], type[TorchEngine]] = (Engine, TorchEngine),
) -> Engine:
    """Loads a model and prepares it.

    Args:
      run: see `load_model`; or `transformers:DIR`, which torch computes (`torch_engine`), or what
        `finetune` wrote of such a model.
      precision, devices, batch_tokens: see `Engine`.
      name: flag or argument that gave `run`, for messages.
      kinds: the engine of an encoder of ours, and that of a model of transformers.

    Raises:
      UserError: see `load_model` and `load_pretrained`; an argument is out of range.
    """
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # where there is no accelerator; more devices than cores would compute one after the other
        with suppress(RuntimeError):  # in Python jax may have been used before
            jax.config.update("jax_num_cpu_devices", min(devices, os.cpu_count() or 1))
    ours, theirs = kinds
    directory = base_of(Path(run))
    if directory is not None:
        name = f"{name} {run}, a head on"
    elif str(run).startswith(PREFIX):
        directory = Path(str(run).removeprefix(PREFIX))
    else:
        return ours(load_model(run, name), precision, devices, batch_tokens)
    return theirs(load_pretrained(directory, name), precision, devices, batch_tokens)
