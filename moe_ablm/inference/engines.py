"""The engine of whatever `--run` names: a run, an import, or a directory of transformers."""

import os
from contextlib import suppress
from pathlib import Path

import jax

from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.torch_engine import TorchEngine
from moe_ablm.interop.load import load_model
from moe_ablm.interop.pretrained import PREFIX, load_pretrained


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
      run: see `load_model`; or `transformers:DIR`, which torch computes (`torch_engine`).
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
    if not str(run).startswith(PREFIX):
        return ours(load_model(run, name), precision, devices, batch_tokens)
    model = load_pretrained(Path(str(run).removeprefix(PREFIX)), name)
    return theirs(model, precision, devices, batch_tokens)
