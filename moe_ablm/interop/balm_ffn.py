"""Import and export of BALM's FFNs, experts and shared experts.

BALM stores the two halves of SwiGLU separately and each expert, of any width, as its own module.
Here the halves are one fused kernel, experts are stacked, and a wide expert is several of a common
width (`EncoderSpec.chunk`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_ablm.model.experts import narrow_experts
from moe_ablm.model.spec import EncoderSpec

# BALM's linear maps from D to F, in the order of the fused kernel, and its map back to D
_INNER = {"swiglu": ("activation.gate_linear", "activation.value_linear"), "gelu": ("wi",)}
_OUTER = "wo"


class Ffn(NamedTuple):
    """One FFN: `up` and `up_bias` of one or two maps `[F, D]`, `[F]`; `down [F, D]`, `[D]`."""

    up: tuple[np.ndarray, ...]
    up_bias: tuple[np.ndarray, ...]
    down: np.ndarray
    down_bias: np.ndarray


def joined(parts: Sequence[Ffn]) -> Ffn:
    """The FFN that equals the sum of several FFNs, since an FFN is a sum over its hidden units."""
    return Ffn(
        tuple(np.concatenate(maps) for maps in zip(*(p.up for p in parts), strict=True)),
        tuple(np.concatenate(maps) for maps in zip(*(p.up_bias for p in parts), strict=True)),
        np.concatenate([p.down for p in parts]),
        np.sum([p.down_bias for p in parts], axis=0),
    )


def cut(ffn: Ffn, width: int) -> list[Ffn]:
    """FFNs of one width whose sum equals an FFN; only the first has the bias of `down`."""
    count = len(ffn.down) // width
    pieces = []
    for i in range(count):
        part = slice(i * width, (i + 1) * width)
        pieces.append(
            Ffn(
                tuple(a[part] for a in ffn.up),
                tuple(a[part] for a in ffn.up_bias),
                ffn.down[part],
                ffn.down_bias if i == 0 else np.zeros_like(ffn.down_bias),
            )
        )
    return pieces


def _read(prefix: str, tensors: Mapping[str, np.ndarray], activation: str) -> Ffn:
    """Reads an FFN of BALM; missing biases are 0."""

    def linear(name: str) -> tuple[np.ndarray, np.ndarray]:
        weight = tensors[f"{prefix}{name}.weight"]
        bias = f"{prefix}{name}.bias"
        return weight, tensors[bias] if bias in tensors else np.zeros(len(weight), np.float32)

    inner = [linear(name) for name in _INNER[activation]]
    down, down_bias = linear(_OUTER)
    return Ffn(tuple(w for w, _ in inner), tuple(b for _, b in inner), down.T, down_bias)


def _write(prefix: str, ffn: Ffn, activation: str) -> dict[str, np.ndarray]:
    tensors = {f"{prefix}{_OUTER}.weight": ffn.down.T, f"{prefix}{_OUTER}.bias": ffn.down_bias}
    for name, weight, bias in zip(_INNER[activation], ffn.up, ffn.up_bias, strict=True):
        tensors |= {f"{prefix}{name}.weight": weight, f"{prefix}{name}.bias": bias}
    return tensors


def _kernels(ffn: Ffn) -> dict[str, np.ndarray]:
    """The encoder's arrays for a dense FFN."""
    return {
        "up/kernel": np.concatenate(ffn.up).T,
        "up/bias": np.concatenate(ffn.up_bias),
        "down/kernel": ffn.down,
        "down/bias": ffn.down_bias,
    }


def _from_kernels(
    up: np.ndarray,
    up_bias: np.ndarray,
    down: np.ndarray,
    down_bias: np.ndarray,
    activation: str,
) -> Ffn:
    maps = len(_INNER[activation])
    split = tuple(np.split(up.T, maps)), tuple(np.split(up_bias, maps))
    return Ffn(*split, down, down_bias)


def _shared_widths(spec: EncoderSpec) -> list[int]:
    """Width of each shared expert; all have the same."""
    count = spec.moe.shared if spec.moe else 0
    return [spec.shared_ffn // max(count, 1)] * count


def _modules(layer: str, spec: EncoderSpec, sparse: bool) -> dict[str, int]:
    """Prefix and width of every FFN of a layer."""
    if not sparse:
        return {f"{layer}ffn.": spec.ffn}
    kinds = {"experts": spec.expert_widths, "shared_experts": _shared_widths(spec)}
    return {
        f"{layer}sparse_ffn.{kind}.{i}.": width
        for kind, widths in kinds.items()
        for i, width in enumerate(widths)
    }


def expected_ffns(
    layer: str, spec: EncoderSpec, sparse: bool, biases: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer's FFNs, by BALM's name.

    Args:
      layer: prefix of the layer's names.
      spec: the encoder.
      sparse: whether the layer has experts.
      biases: whether the FFNs have biases.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, width in _modules(layer, spec, sparse).items():
        inner = (width, spec.d_model)
        for name in _INNER[spec.activation]:
            shapes[f"{prefix}{name}.weight"] = inner
            shapes |= {f"{prefix}{name}.bias": (width,)} if biases else {}
        shapes[f"{prefix}{_OUTER}.weight"] = inner[::-1]
        shapes |= {f"{prefix}{_OUTER}.bias": (spec.d_model,)} if biases else {}
    return shapes


def ffns_from_balm(
    layer: str, tensors: Mapping[str, np.ndarray], spec: EncoderSpec, sparse: bool
) -> dict[str, np.ndarray]:
    """The encoder's arrays for a layer's FFN or experts, without the router.

    Args:
      layer: prefix of BALM's names.
      tensors: by BALM's name.
      spec: the encoder.
      sparse: whether the layer has experts.

    Returns:
      Arrays by path within the layer.
    """
    by_module = {p: _read(p, tensors, spec.activation) for p in _modules(layer, spec, sparse)}
    if not sparse:
        return {f"ffn/{name}": a for name, a in _kernels(*by_module.values()).items()}
    ffns = list(by_module.values())
    count = len(spec.expert_widths)
    experts, shared = ffns[:count], ffns[count:]
    narrow = [_kernels(piece) for expert in experts for piece in cut(expert, spec.chunk)]
    arrays = {
        "ffn/up": np.stack([k["up/kernel"] for k in narrow]),
        "ffn/up_bias": np.stack([k["up/bias"] for k in narrow]),
        "ffn/down": np.stack([k["down/kernel"] for k in narrow]),
        "ffn/down_bias": np.stack([expert.down_bias for expert in experts]),
    }
    if shared:
        together = _kernels(joined(shared))
        arrays |= {f"ffn/shared/{name}": a for name, a in together.items()}
    return arrays


def ffns_to_balm(
    layer: str, arrays: Mapping[str, np.ndarray], spec: EncoderSpec, sparse: bool
) -> dict[str, np.ndarray]:
    """BALM's tensors of a layer's FFN or experts; the inverse of `ffns_from_balm`."""
    activation = spec.activation

    def dense(path: str) -> Ffn:
        up, down = (arrays[f"{path}/{name}/kernel"] for name in ("up", "down"))
        up_bias, down_bias = (arrays[f"{path}/{name}/bias"] for name in ("up", "down"))
        return _from_kernels(up, up_bias, down, down_bias, activation)

    if not sparse:
        return _write(f"{layer}ffn.", dense("ffn"), activation)
    zero = np.zeros(spec.d_model, np.float32)
    narrow = [
        _from_kernels(*kernels, zero, activation)
        for kernels in zip(arrays["ffn/up"], arrays["ffn/up_bias"], arrays["ffn/down"], strict=True)
    ]
    ffns = []
    for e, pieces in enumerate(narrow_experts(spec.expert_widths, spec.chunk)[:-1]):
        whole = joined([narrow[i] for i in pieces if i < len(narrow)])
        ffns.append(whole._replace(down_bias=arrays["ffn/down_bias"][e]))
    if shared := _shared_widths(spec):
        ffns += cut(dense("ffn/shared"), shared[0])
    tensors: dict[str, np.ndarray] = {}
    for prefix, ffn in zip(_modules(layer, spec, sparse), ffns, strict=True):
        tensors |= _write(prefix, ffn, activation)
    return tensors
