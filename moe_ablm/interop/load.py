"""Loads a model of a run, of our own directories (`saved.py`), or from Hugging Face's form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ablm import config as configs
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.files import require_local
from moe_ablm.interop.balm import import_balm
from moe_ablm.interop.esm2 import import_esm2
from moe_ablm.interop.hub import is_hub_name, local_directory
from moe_ablm.interop.huggingface import HuggingFaceConfig
from moe_ablm.interop.pretrained import PREFIX
from moe_ablm.interop.roberta import import_roberta
from moe_ablm.interop.saved import MODEL_FILE, Model, parameter_shapes, read_json, read_model
from moe_ablm.interop.transformers_moe import import_transformers
from moe_ablm.training.checkpoint import read_parameters, read_records

__all__ = ["Model", "import_directory", "load_model"]

_IMPORTERS = {
    "esm": import_esm2,
    "balm": import_balm,
    "balm_moe": import_balm,
    "moe_ablm": import_transformers,
    "roberta": import_roberta,
}


_ASK = "; --run transformers:DIR asks it as it is"
_REASONS = {
    "bert": f"BERT (ProtBert, IgBert) is none of the forms that are read{_ASK}",
    "esmc": f"ESM-C has norms of queries and keys, for which there is no place here{_ASK}",
    "roformer": f"RoFormer (AntiBERTa2) rotates neighbours, for which there is no place here{_ASK}",
    "t5": "T5 (ProtT5) has relative positions, for which there is no place here",
}


def load_model(run: Path | str, name: str = "--run") -> Model:
    """The model of a directory.

    Of a trained run it is the checkpoint with the best validation loss, or the newest one if none
    was evaluated. Nothing is changed, so the trainer may still be running.

    Args:
      run: a work directory, a directory that `import`, `upcycle` or `export --format native`
        wrote, or `hf:ORG/NAME[@REVISION]`: an export, or what `import` reads, on the hub.
      name: flag or config key that gave the directory, for messages.

    Raises:
      UserError: there is no model, no checkpoint yet, or it is damaged.
    """
    if str(run).startswith(PREFIX):
        raise UserError(
            f"{name} {run}: a model that transformers computes is only asked (embed, score, "
            "infill, scan, app, evaluate, finetune of a head); here expected a run, or what "
            "python -m moe_ablm import wrote"
        )
    if is_hub_name(run):
        return _of_hub(str(run), name)
    require_local(run, name)
    run = Path(run)
    if not run.is_dir():
        found = "is a file" if run.exists() else "is not there"
        raise UserError(f"{name} {run} {found}: expected the directory of a run or an import")
    if (run / MODEL_FILE).exists():
        return read_model(run)
    if (run / "config.json").exists():
        return _trained(run, name)
    raise UserError(
        f"{name} {run} holds neither config.json (a trained run) nor {MODEL_FILE} (an import): "
        "name the work directory of a run, or import the weights first (python -m moe_ablm import)"
    )


def _of_hub(run: str, name: str) -> Model:
    directory = local_directory(run, name)
    ours = (directory / MODEL_FILE).exists()
    model = read_model(directory) if ours else import_directory(directory)
    return replace(model, source=f"{run}, commit {directory.name[:12]}")


def _trained(run: Path, name: str) -> Model:
    content = read_json(run / "config.json")
    if "config" not in content and "architectures" in content:
        raise UserError(
            f"{name} {run} is a Hugging Face directory: import it first (python -m moe_ablm import "
            f"--input {run} --out RUN)"
        )
    try:
        config = content["config"]
        spec = configs.encoder_of_run(config["model"])
        data = config["data"]
        layout, length = LAYOUTS[data["layout"]], int(data["length"])
        regime, averaged = str(data["regime"]), float(config["train"]["ema"]) > 0
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{run / 'config.json'} is damaged or of another version ({error!s}): expected the "
            "config.json that the trainer wrote"
        ) from error
    records = read_records(run / "checkpoints")
    step = best_step(records)
    params = read_parameters(run / "checkpoints" / str(step), parameter_shapes(spec), averaged)
    record = records[step]
    loss = _loss(step, record)
    validation = "" if loss is None else f", validation loss {loss:.4f}"
    source = f"{run}, step {step}{' (averaged weights)' if averaged else ''}{validation}"
    facts = {
        "config": config,
        "data": {"sha256": content.get("dataset"), **_trained_on(data, record)},
        "metrics": _metrics(record["evaluation"]) if loss is not None else {},
    }
    if content.get("licence"):
        facts["licence"] = content["licence"]
    return Model(spec, params, layout, length, source, regime, (), facts)


def best_step(records: dict[int, dict]) -> int:
    """The step with the lowest validation loss; the newest if no checkpoint was evaluated."""
    losses = {step: _loss(step, record) for step, record in records.items()}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    return min(evaluated, key=evaluated.__getitem__) if evaluated else max(losses)


def _loss(step: int, record: dict[str, Any]) -> float | None:
    """Validation loss of a checkpoint; None if the one in its record is of an earlier step."""
    evaluation = record.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("step") != step:
        return None
    loss = evaluation.get("loss")
    return loss if isinstance(loss, float) else None


def _trained_on(data: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    keys = ("path", "simulated_pairs", "fraction", "regime", "mask")
    facts = {key: data.get(key) for key in keys}
    if facts["path"]:
        facts.pop("simulated_pairs")
    return facts | {"tokens_seen": record.get("tokens_seen")}


def _metrics(evaluation: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "loss", "perplexity", "accuracy", "loss_by_region")
    return {name: evaluation[name] for name in names if name in evaluation}


def import_directory(directory: Path, layout: str | None = None) -> Model:
    """Imports a directory in Hugging Face's form by the `model_type` of its config.json.

    Args:
      directory: the directory.
      layout: name of the layout by which chains become a row; None: see the importers.

    Raises:
      UserError: the model type cannot be imported, or the directory is damaged.
    """
    config = HuggingFaceConfig(directory)
    why = _REASONS.get(str(config["model_type"]), "")
    kind = config.expect("model_type", None, *_IMPORTERS, why=why)
    if not isinstance(kind, str):
        raise UserError(f"{config.file}: model_type is {kind!r}, expected a name")
    return _IMPORTERS[kind](directory, layout)
