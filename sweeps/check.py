"""Which coefficients of a law a grid cannot identify, before it is run."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_ablm.scaling.design import Design, check_design
from moe_ablm.scaling.runs import Runs
from sweeps.planned import Planned

SEED_SD = 2e-3  # of ln L between seeds, an assumption


def as_runs(cells: Sequence[Planned]) -> Runs:
    """The cells as a table of runs without losses.

    A run shorter than an epoch has as many unique tokens as it sees.
    """
    tokens = np.array([p.cell.tokens for p in cells])
    columns = {
        "params": np.array([p.params_active for p in cells], float),
        "total_params": np.array([p.params_total for p in cells], float),
        "tokens": tokens,
        "unique_tokens": np.minimum([p.unique_tokens or p.corpus_tokens for p in cells], tokens),
        "experts": np.array([p.experts for p in cells], float),
        "router": np.array(["dense" if p.router == "none" else p.router for p in cells]),
    }
    return Runs(columns, tuple(p.cell.name for p in cells))


def design_lines(cells: Sequence[Planned], repairs: Mapping[str, Sequence[Planned]]) -> list[str]:
    """Warnings about the grid, and what each repair (cells to add, by name) would mend.

    The law is `joint` for several routers, `data_constrained_b2` for one.
    """
    design = _check(cells)
    left = _unidentified(design)
    lines = [f"design check, law {design.law}, seed sd of ln L {SEED_SD:g} assumed:"]
    lines += [f"  warning: {text}" for text in design.warnings[:-1]]  # the last one is the sd
    if not left:
        return [*lines, "  every coefficient can be identified"]
    lines += [f"  {name}: {design.verdicts[name]}" for name in left]
    for name, added in repairs.items():
        if not added:
            continue
        better = _unidentified(_check([*cells, *added]))
        mended = [coefficient for coefficient in left if coefficient not in better]
        share = sum(p.cell.flops for p in added) / sum(p.cell.flops for p in cells)
        lines.append(
            f"  --add={name} ({len(added)} cells, {share:+.1%} FLOPs) identifies "
            + (", ".join(mended) if mended else "none of them")
        )
    return lines


def _check(cells: Sequence[Planned]) -> Design:
    several = len({p.router for p in cells}) > 1
    return check_design(as_runs(cells), "joint" if several else "data_constrained_b2", SEED_SD)


def _unidentified(design: Design) -> list[str]:
    return [name for name, good in design.identifiable.items() if not good]
