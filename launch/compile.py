"""Compiles the training step of a run for TPUs and GPUs that are not here.

    python -m launch.compile --hardware=h100x8 --config=configs/ladder.py:size=650m
    python -m launch.compile --hardware=v5e-8 --config=configs/ladder.py:size=35m,router=top2

compiles the trainer's own step and prints, before a job is queued, the memory that a device needs,
whether that fits, and what the step does: collectives, kernels, copies. Mesh and remat are those of
`launch.mesh_plan`, unless the config or the command line sets them.

Exit codes: 0 it fits; 2 it does not, or the input is wrong, with one line that says why.
"""

import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from launch import hlo, topology
from launch.hardware import NAMES, Hardware, hardware
from launch.mesh_plan import MeshPlan, given_keys, plan
from moe_ablm.command_line import read_config
from moe_ablm.config_schema import Config
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError
from moe_ablm.files import write_json
from moe_ablm.parallel.mesh import make_mesh
from moe_ablm.preemption import Interrupts
from moe_ablm.program import abstract_arguments, execution_on, make_program

GB = 10**9
NAME = "launch.compile"


@dataclass(frozen=True)
class Memory:
    """Bytes of a device.

    Attributes:
      arguments: the state and a batch.
      temporaries: most that is needed beside them at a time.
      output: what the step returns, less what takes the place of arguments.
      code: the program.
    """

    arguments: int
    temporaries: int
    output: int
    code: int

    @property
    def total(self) -> int:
        """Bytes that a device needs."""
        return self.arguments + self.temporaries + self.output + self.code


@dataclass(frozen=True)
class Compiled:
    """A step, compiled.

    Attributes:
      plan: mesh and remat that it was compiled with, and what was expected.
      memory: of a device.
      counts: what it does.
      seconds: that the compiler took.
    """

    plan: MeshPlan
    memory: Memory
    counts: hlo.Counts
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.plan.hardware.usable


def compile_step(config: Config, where: Hardware, given: Collection[str] = ()) -> Compiled:
    """Compiles the step of a run.

    Args:
      config: of the run.
      where: it is to run.
      given: config keys of its command line (`mesh_plan.given_keys`).

    Raises:
      UserError: the compiler is not installed, the batch or the devices cannot be split, or the
        compiler refuses a step that does not fit.
    """
    found = plan(config, where, given)
    config = replace(config, compute=replace(config.compute, remat=found.remat))
    mesh = make_mesh(found.data, found.expert, found.fsdp, topology.devices(where))
    state, batch = abstract_arguments(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = make_program(config, execution_on(config, where.kind)).step.lower(state, batch)
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options(where))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"it does not fit {where.name}: {_one_line(error)}") from error
    seconds = time.perf_counter() - start
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    assert sizes is not None and text is not None  # both platforms have them
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        output=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    return Compiled(found, memory, hlo.count(text), seconds)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def to_json(c: Compiled) -> dict:
    """Everything that is printed, in bytes, counts and seconds."""
    where = c.plan.hardware
    return {
        "hardware": where.name,
        "jax": jax.__version__,
        **c.plan.overrides,
        "rows_per_device": c.plan.rows,
        "memory": {**asdict(c.memory), "total": c.memory.total, "usable": int(where.usable)},
        "planned": int(c.plan.needed.total),
        "fits": c.fits,
        "collectives": {
            name: {"count": n, "bytes": size} for name, (n, size) in c.counts.traffic().items()
        },
        "kernels": c.counts.kernels,
        "copies": {"count": c.counts.copies, "bytes": c.counts.copied},
        "packed": c.counts.packed,
        "custom_calls": c.counts.custom_calls,
        "loops": {"count": c.counts.loops, "of_unknown_length": c.counts.open_loops},
        "compile_seconds": round(c.seconds, 1),
    }


def table(c: Compiled) -> Table:
    """What a step takes and does, a line each."""
    made = Table(box=None, show_header=False)
    p, m, n = c.plan, c.memory, c.counts
    mesh = f"{p.data} x {p.expert} x {p.fsdp} (data x expert x fsdp), {p.rows} rows a device"
    made.add_row("mesh", f"{mesh}, remat {p.remat}")
    made.add_row(
        "memory a device",
        f"{m.total / GB:.2f} GB: arguments {m.arguments / GB:.2f}, temporaries "
        f"{m.temporaries / GB:.2f}, output {m.output / GB:.2f}, code {m.code / GB:.2f}",
    )
    made.add_row("it has", f"{p.hardware.memory / GB:.0f} GB, {p.hardware.usable / GB:.2f} to use")
    made.add_row("planned", f"{p.needed.total / GB:.2f} GB (launch.meshes)")
    for name, (count, size) in sorted(n.traffic().items()):
        made.add_row(name, f"{count:,} a step, {size / GB:.3f} GB")
    made.add_row("kernels", f"{n.kernels:,} a step")
    made.add_row(
        "copies",
        f"{n.copies:,} a step, {n.copied / GB:.3f} GB; {n.packed:,} more for collectives",
    )
    for name, count in sorted(n.custom_calls.items()):
        made.add_row("custom call", f"{name}: {count:,} a step")
    unknown = f", {n.open_loops:,} of unknown length: counted once" if n.open_loops else ""
    made.add_row("loops", f"{n.loops:,}{unknown}")
    made.add_row("compiled in", f"{c.seconds:.0f} s")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with Interrupts(NAME):
        return end(lambda: _run(argv), NAME)


def _run(argv: list[str] | None) -> int:
    parser = Parser(
        prog="python -m launch.compile",
        description=__doc__,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hardware", required=True, metavar="NAME", help=NAMES.removesuffix(", cpu"))
    add("--json", type=Path, metavar="FILE", help="write the same, for programs")
    options, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # whatever is here is not what is asked for
    if unknown := [a for a in rest if not a.startswith("--config")]:
        raise UserError(f"{unknown[0]!r} is not understood: expected --config... or --help")
    found = compile_step(read_config(rest), hardware(options.hardware), given_keys(rest))
    if options.json:
        _write(options.json, to_json(found))
    Console(width=None if sys.stdout.isatty() else 120).print(table(found))
    if found.fits:
        print(f"it fits {options.hardware}")
        return 0
    print(
        f"{NAME}: it does not fit {options.hardware}: {found.memory.total / GB:.2f} GB a "
        f"device, of {found.plan.hardware.usable / GB:.2f} that can be used: use more devices, "
        "train.accumulate, or a smaller batch",
        file=sys.stderr,
    )
    return 2


def _write(file: Path, content: dict) -> None:
    try:
        write_json(file, content)
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
