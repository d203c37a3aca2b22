"""Which importer a Hugging Face directory needs."""

from pathlib import Path

from moe_ablm.errors import UserError
from moe_ablm.interop.balm import import_balm
from moe_ablm.interop.esm2 import import_esm2
from moe_ablm.interop.huggingface import HuggingFaceConfig
from moe_ablm.interop.saved import Model

_IMPORTERS = {"esm": import_esm2, "balm": import_balm, "balm_moe": import_balm}


def import_directory(directory: Path, layout: str | None = None) -> Model:
    """The model of a directory, read as its config.json says.

    Raises:
      UserError: it is of no kind that can be imported, or is damaged.
    """
    config = HuggingFaceConfig(directory)
    kind = config.expect("model_type", None, *_IMPORTERS)
    if not isinstance(kind, str):
        raise UserError(f"{config.file}: model_type is {kind!r}, expected a name")
    return _IMPORTERS[kind](directory, layout)
