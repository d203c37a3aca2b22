"""Memory of a device as `launch.meshes` plans it, beside the compiler's own plan.

    .venv-aot/bin/python -m launch.compare

compiles fifteen steps for hardware that is not here and prints a line of a Markdown table for each,
as docs/launch.md has them; half an hour on two cores. Exit code 1 where a plan is further from the
compiler's than `TOLERANCE`.
"""

import sys

import jax

from launch.compile import GB, compile_step
from launch.hardware import hardware
from launch.meshes import ROUTERS, rung
from moe_ablm.endings import Parser, end
from moe_ablm.preemption import Interrupts

NAME = "launch.compare"
TOLERANCE = 0.15
ROWS = 64  # a device: as many as make activations weigh more than the state
CASES = [(name, "8m", router) for name in ("h100x8", "v5e-8") for router in ROUTERS]
CASES += [("h100x8", "35m", router) for router in ("none", "top2", "soft")]
CASES += [("h100x8", "150m", "none"), ("v5e-8", "35m", "none")]


def line(name: str, size: str, router: str) -> tuple[str, float]:
    """A line of the table, and planned over compiled, less 1.

    Raises:
      UserError: as `compile_step`.
    """
    where = hardware(name)
    found = compile_step(rung(size, router, train__batch=ROWS * where.devices), where)
    planned, total = found.plan.needed.total, found.memory.total
    off = planned / total - 1
    cells = name, size, router, f"{planned / GB:.2f}", f"{total / GB:.2f}", f"{off:+.0%}"
    return f"| {' | '.join(cells)} |", off


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    with Interrupts(NAME):
        return end(lambda: _run(argv), NAME)


def _run(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m launch.compare",
        description=__doc__,
    )
    parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # whatever is here is not what is asked for
    print("| hardware | size | router | planned GB | compiled GB | |\n|---|---|---|--:|--:|--:|")
    far = 0
    for case in CASES:
        text, off = line(*case)
        print(text, flush=True)
        far += abs(off) > TOLERANCE
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
