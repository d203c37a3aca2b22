"""Export to a directory of our own, which holds every model that can be trained here."""

from dataclasses import replace
from pathlib import Path

from moe_ablm.interop.card import model_card
from moe_ablm.interop.saved import Model, new_directory, write_model
from moe_ablm.interop.tensors import AS_COMPUTED, Storage

ARCHITECTURE = "Encoder"
_USE = """import moe_ablm  # pip install moe_ablm

model = moe_ablm.load("{directory}")
scores = model.score([("EVQLVESGGG", "DIQMTQSPSS")])"""


def export_native(
    model: Model, out: Path, licence: str | None = None, storage: Storage = AS_COMPUTED
) -> None:
    """Writes what `read_model` reads, with a model card: the same model, bit for bit in float32.

    Args:
      model: what is exported.
      out: a new directory.
      licence: for the model card and later exports; None: that of the model's facts.
      storage: of the weights.

    Raises:
      UserError: `out` cannot be written.
    """
    if licence:
        model = replace(model, facts={**model.facts, "licence": licence})
    with new_directory(out) as directory:
        write_model(model, directory, storage)
        (directory / "README.md").write_text(model_card(model, ARCHITECTURE, _USE, None))
