"""What an accelerator makes of this project: speed, memory and exactness, in one run of minutes.

    pip install -e . && python benchmarks/accelerator.py --minutes 8 --out accelerator.jsonl

On a machine that reaches no package index, in a checkout, with jax, flax and optax at least (an
entry that needs more fails and says what it misses). What the trainer needs can come as wheels for
the Python there: `pip download --no-deps -d wheels grain array-record ml_collections portpicker`.

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=.:site python benchmarks/accelerator.py --minutes 8 --out accelerator.jsonl

Entries, most wanted first (`--minutes 0` lists them and what they are expected to take):

    float32/ attention/ grouped/ encoder/   kernels against float64 and CPU, with limits
    dense/SIZE         the training step as the trainer runs it; dense/SIZE/REMAT[-scan] otherwise
    sparse/SIZE/...    experts in every layer, beside a dense encoder of the active FLOPs of top-2
    torch/SIZE[/compile]   transformers' EsmForMaskedLM: SDPA, bfloat16 autocast, fused AdamW
    trainer            a minute of `python -m moe_ablm.train`, on --data or simulated antibodies

Times are medians of rounds, after the compilation and warm steps. Programs of a wave are compiled
side by side (`compiled_together`); for the compile time of one alone, run it alone:
`--only dense/650m`. With `--trace DIR`, each step that runs leaves a profile of three updates there
(`--only dense/35m` for one). `--tiny` runs all of it on CPU, in minutes: times mean nothing then.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TextIO

from accelerator_entries import REAL, TINY, waves
from accelerator_tables import line, tables
from waves import Budget, Runner, Wave, Worker, serve

from moe_ablm.results import versions

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "libtpu", "flax", "optax", "numpy", "tokamax", "torch", "transformers",
)  # fmt: skip


def hello(kind: str) -> dict:
    """What a worker says of the device that it sees."""
    if kind == "jax":
        import jax

        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "memory": (device.memory_stats() or {}).get("bytes_limit"),
            "software": device.client.platform_version.splitlines()[0],
        }
    if kind == "torch":
        with suppress(ImportError):  # every entry will say so
            import torch

            cuda = torch.cuda.is_available()
            return {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    return {}


def chosen(all_waves: Sequence[Wave], patterns: Sequence[str]) -> list[Wave]:
    """The entries whose names, or the first parts of them, match one of the patterns."""

    def matches(name: str) -> bool:
        return any(fnmatch(name, p) or fnmatch(name, f"{p}/*") for p in patterns)

    return [kept for w in all_waves if (kept := [e for e in w if matches(e.name)])]


class Report:
    """Prints results as they come and appends them to the file."""

    def __init__(self, out: TextIO | None):
        self._out = out
        self.results: dict[str, dict] = {}

    def write(self, result: dict) -> None:
        """Takes a header, or the result of an entry."""
        if self._out is not None:
            self._out.write(json.dumps(result) + "\n")
            self._out.flush()
        if "entry" in result:
            self.results[result["entry"]] = result
        print(line(result), flush=True)


def start(kind: str, arguments: argparse.Namespace, folder: str, log: TextIO) -> Worker:
    """A worker that runs this file with the same arguments."""
    defaults = {
        # so that what follows a worker that died need not compile all anew
        "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / kind),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # as the launchers set it
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    forced = {"JAX_PLATFORMS": "cpu"} if arguments.tiny else {}
    if arguments.tiny:  # most of its time would go into optimising what hardly runs
        defaults["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    command = [sys.executable, __file__, "--worker", kind]
    command += ["--tiny"] if arguments.tiny else []
    command += ["--data", str(arguments.data)] if arguments.data else []
    command += ["--trace", str(arguments.trace)] if arguments.trace else []
    return Worker(command, defaults | os.environ | forced, log)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--out", type=Path, help="JSON-lines file; logs go to OUT.log")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="entries")
    parser.add_argument("--data", type=Path, help="prepared dataset of the trainer's minute")
    parser.add_argument("--trace", type=Path, help="folder for profiles of three updates")
    parser.add_argument("--tiny", action="store_true", help="tiny encoders, on CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("data", "trace", "out"):  # the trainer runs in another directory
        if path := getattr(arguments, name):
            setattr(arguments, name, path.resolve())
    return arguments


def main() -> int:
    """Runs; 1 where a check is beyond its limit or nothing could be measured."""
    arguments = parse()
    budget = Budget(60 * arguments.minutes)
    every = waves(TINY if arguments.tiny else REAL, arguments.data, arguments.trace)
    if arguments.worker:
        serve({entry.name: entry for wave in every for entry in wave}, hello(arguments.worker))
        return 0
    wanted = chosen(every, arguments.only)
    if not wanted:
        names = " ".join(entry.name for wave in every for entry in wave)
        print(f"--only {' '.join(arguments.only)}: expected some of {names}", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        out = stack.enter_context(arguments.out.open("w")) if arguments.out else None
        log = Path(f"{arguments.out}.log" if out else os.devnull)
        log = stack.enter_context(log.open("w"))
        report = Report(out)
        installed = {"python": platform.python_version(), **versions(*PACKAGES)}
        report.write({"arguments": sys.argv[1:], "versions": installed})
        worker = partial(start, arguments=arguments, folder=folder, log=log)
        Runner(worker, budget, report.write).run(wanted)
    print(tables(report.results))
    done = [r["values"] for r in report.results.values() if r["status"] == "done"]
    wrong = any(not values.get("passed", True) for values in done)
    return int(wrong or (not done and arguments.minutes > 0))


if __name__ == "__main__":
    sys.exit(main())
