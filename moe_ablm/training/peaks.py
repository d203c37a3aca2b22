"""Peak FLOP/s of accelerators from the vendors' data sheets; does not need JAX."""

# dense bfloat16 matmuls of one device as JAX counts devices: a GPU, a TPU chip
PEAKS = {
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h100-nvl": 835e12,
    "h200": 989e12,
    "h200-nvl": 835e12,
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
}
# by JAX's `device_kind`, as whole names, since parts (MIG) and other variants of a chip are slower
KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA GH200 120GB": "h100",
    "NVIDIA GH200 480GB": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def data_sheet_peak(kind: str, operands: str) -> float | None:
    """Peak FLOP/s of a device; None where the table has none.

    Args:
      kind: JAX's `device_kind`.
      operands: dtype of matmul operands; the table has only "bfloat16".
    """
    name = KINDS.get(kind)
    return PEAKS[name] if name and operands == "bfloat16" else None
