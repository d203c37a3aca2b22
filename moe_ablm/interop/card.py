"""The model card of an export: architecture, training data and validation metrics."""

from typing import Any

from moe_ablm.config_schema import MoEConfig
from moe_ablm.data.tokenizer import VOCABULARY
from moe_ablm.files import json_text
from moe_ablm.interop.saved import Model
from moe_ablm.model import flops
from moe_ablm.model.spec import EncoderSpec

UNKNOWN_LICENCE = "other"
_INTENDED = """## Intended use

Research on sequences of antibodies (a heavy chain, a light chain, or a pair): embeddings,
pseudo-log-likelihoods, completion of masked residues. A likelihood says how usual a residue is; it
is no measurement of binding, stability or safety, and the model was not tested for decisions about
patients. Other proteins, and longer rows, are outside of what it was trained for.
"""


def model_card(model: Model, architecture: str, use: str, licence: str | None) -> str:
    """README.md of an export, with the front matter that hubs read.

    Args:
      model: the exported model.
      architecture: name of the class that the weights are for.
      use: Python lines that load them; `{directory}` and `{row}` are filled in.
      licence: identifier such as "mit"; None: that of the model's facts, if they have one.
    """
    licence = licence or model.facts.get("licence")
    config = model.facts.get("config")
    parts = [
        _front_matter(licence),
        f"# {architecture} exported by moe_ablm\n",
        f"From {model.source}.\n",
        *(f"{note[0].upper()}{note[1:]}.\n" for note in model.notes),
        _architecture(model),
        _rows(model),
        _INTENDED,
        f"## Use\n\n```python\n{_filled(use, model)}\n```\n",
        _section("Data", model.facts.get("data"), "Not known."),
        _metrics(model.facts.get("metrics") or {}),
        _licence(licence),
    ]
    if config:
        parts.append(f"## Config\n\n```json\n{json_text(config, indent=1)}\n```\n")
    return "\n".join(parts)


def _front_matter(licence: str | None) -> str:
    tags = "tags:\n- antibody\n- protein\n- moe_ablm\n"
    return f"---\nlicense: {licence or UNKNOWN_LICENCE}\npipeline_tag: fill-mask\n{tags}---\n"


def _architecture(model: Model) -> str:
    spec, moe = model.spec, model.spec.moe
    lines = [
        f"- {spec.layers} layers, width {spec.d_model}, feed-forward width {spec.ffn}, "
        f"{spec.heads} heads, {spec.activation}, {_positions(spec)}",
        f"- {flops.params_total(spec):,} parameters ({flops.params_active(spec):,} active)",
        f"- decoder {'tied to the embedding' if spec.tied else 'of its own'}, token dropout "
        f"{'on' if spec.token_dropout else 'off'}",
    ]
    if moe:
        flat = MoEConfig.of(moe)
        lines.append(
            f"- layers {', '.join(map(str, spec.moe_layers))}: {moe.experts} experts, "
            f"{moe.name}, k {flat.k}, {moe.shared} shared; padding policy {flat.pads}"
        )
    return "## Architecture\n\n" + "\n".join(lines) + "\n"


def _positions(spec: EncoderSpec) -> str:
    parts = [f"{spec.learned_positions} learned positions" * bool(spec.learned_positions)
             or "rotary positions", "a norm after the embedding" * spec.embedding_norm,
             "norms after attention and feed-forward" * spec.post_norm]  # fmt: skip
    return ", ".join(filter(None, parts))


def row_text(model: Model, heavy: str, light: str) -> str:
    """A pair as text for a tokenizer that adds the first and the last token itself."""
    between = "".join(VOCABULARY[token] for token in model.layout.between)
    return f"{heavy}{between}{light}"


def _rows(model: Model) -> str:
    names = {
        part: "".join(VOCABULARY[t] for t in getattr(model.layout, part))
        for part in ("before", "between", "after")
    }
    pair = f"{names['before']}HEAVY{names['between']}LIGHT{names['after']}"
    regime = f" Training regime: {model.regime}." if model.regime else ""
    return (
        f"A pair is one row, `{pair}`; rows of up to {model.length} tokens were seen in "
        f"training.{regime}\n"
    )


def _filled(use: str, model: Model) -> str:
    return use.replace("{directory}", "DIRECTORY").replace(
        "{row}", row_text(model, "EVQLVESGGG", "DIQMTQSPSS")
    )


def _section(title: str, values: dict[str, Any] | None, otherwise: str) -> str:
    lines = [f"- {k.replace('_', ' ')}: {v}" for k, v in (values or {}).items() if v is not None]
    return f"## {title}\n\n" + ("\n".join(lines) if lines else otherwise) + "\n"


def _metrics(metrics: dict[str, Any]) -> str:
    regions = metrics.get("loss_by_region") or {}
    plain = {k: _rounded(v) for k, v in metrics.items() if not isinstance(v, dict)}
    text = _section("Validation (nats a masked residue)", plain, "Not known.")
    if regions:
        text += f"\n| {' | '.join(regions)} |\n|{'--:|' * len(regions)}\n"
        text += f"| {' | '.join(str(_rounded(v)) for v in regions.values())} |\n"
    return text


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _licence(licence: str | None) -> str:
    if licence:
        return f"## Licence\n\n{licence}\n"
    return "## Licence\n\nNot stated: who trained the weights decides (`export --licence`).\n"
