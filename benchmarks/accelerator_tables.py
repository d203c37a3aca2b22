"""Results of `accelerator.py` as text: a line when an entry is done, tables at the end."""

from collections.abc import Callable, Iterable

Results = dict[str, dict]
SHOWN = {
    "ms": "{:.1f} ms",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_share": "{:.1%} of the peak",
    "temporaries_gb": "{:.1f} GB temporaries",
    "peak_gb": "{:.1f} GB at most",
    "first_s": "{:.0f} s for the first step",
    "trace_s": "{:.0f} s trace",
    "compile_s": "{:.0f} s compile",
    "steps": "{} steps",
    "first_loss": "loss from {:.4f}",
    "last_loss": "to {:.4f}",
    "passed": "passed: {}",
}


def line(result: dict) -> str:
    """One result: of an entry, or what a process says of itself."""
    if "entry" not in result:
        return " ".join(f"{key}={value}" for key, value in result.items())
    name = f"{result['entry']:32} "
    if result["status"] != "done":
        return f"{name}{result['status']}: {result['reason']}"
    values = result["values"]
    told = [form.format(values[k]) for k, form in SHOWN.items() if values.get(k) is not None]
    if "passed" in values:
        told += [f"{k} {v:.1e}" for k, v in values.items() if isinstance(v, float)]
    return name + ", ".join(told)


def tables(results: Results) -> str:
    """Dense and sparse steps, then what was wrong, failed or was skipped."""
    parts = [_dense(results), *_sparse(results)]
    passed = [name for name, v in _done(results) if v.get("passed") is True]
    parts.append([f"{len(passed)} checks within their limits"])
    parts.append(
        _named("beyond the limit", (n for n, v in _done(results) if v.get("passed") is False))
    )
    for status in ("failed", "skipped"):
        parts.append(_named(status, (n for n, r in results.items() if r["status"] == status)))
    return "\n".join("\n".join(["", *part]) for part in parts if part)


def _done(results: Results) -> list[tuple[str, dict]]:
    return [(name, r["values"]) for name, r in results.items() if r["status"] == "done"]


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = " ".join(names)
    return [f"{what}: {found}"] if found else []


def _dense(results: Results) -> list[str]:
    done = dict(_done(results))
    ours = {name: v for name, v in done.items() if name.startswith("dense/")}
    if not ours:
        return []

    def cell(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    lines = [
        f"{'':24}{'ms':>9}{'tokens/s':>12}{'of peak':>9}{'temp. GB':>10}{'compile s':>11}"
        f"{'x torch':>9}{'x compiled':>12}"
    ]
    for name, v in ours.items():
        size = name.split("/")[1]
        others = (done.get(f"torch/{size}"), done.get(f"torch/{size}/compile"))
        faster = [other and v["tokens_per_second"] / other["tokens_per_second"] for other in others]
        lines.append(
            f"{name:24}{v['ms']:9.1f}{v['tokens_per_second']:12,.0f}"
            f"{cell(v.get('peak_share'), '{:.1%}'.format):>9}{v['temporaries_gb']:10.1f}"
            f"{v['compile_s']:11.0f}{cell(faster[0], '{:.2f}'.format):>9}"
            f"{cell(faster[1], '{:.2f}'.format):>12}"
        )
    return lines


def _sparse(results: Results) -> list[list[str]]:
    """A table for each size: times over that of the dense encoder of equal active FLOPs."""
    tables: dict[str, list[str]] = {}
    done = dict(_done(results))
    for name, v in done.items():
        if not name.startswith("sparse/"):
            continue
        _, size, what = name.split("/")
        base = done.get(f"sparse/{size}/dense")
        ratio = f"{v['ms'] / base['ms']:.2f}" if base else "-"
        heading = [
            f"{f'experts, {size}':24}{'ms':>9}{'x dense':>9}{'temp. GB':>10}{'compile s':>11}"
        ]
        tables.setdefault(size, heading).append(
            f"{what:24}{v['ms']:9.1f}{ratio:>9}{v['temporaries_gb']:10.1f}{v['compile_s']:11.0f}"
        )
    return list(tables.values())
