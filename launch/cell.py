"""One run of a sweep, as launchers see it: a command, a place, an identity and what it costs.

A launcher is a module of `launch/` with

    add_arguments(parser: argparse.ArgumentParser) -> None   its options
    launch(cells: list[Cell], options: argparse.Namespace) -> int   exit code

It gets the cells that are not finished, and need not ask whether one is: the command of a finished
cell does nothing. Commands run in the root of the repository. What a cell prints, both streams,
is appended to `Cell.log`. How it ended is in `Cell.outcome` (`moe_ablm/outcome.py`): the launcher
removes it, names it in the environment and writes it for a process that was killed (`ended.py`).
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_ablm.command_line import read_config
from moe_ablm.config_schema import Config

REPOSITORY = Path(__file__).resolve().parents[1]  # where commands run
LOGS = "logs"


@dataclass(frozen=True)
class Cell:
    """A run that is planned.

    Attributes:
      name: unique within its sweep; letters, digits and `.=-` only, at most 100 of them, so that
        it may stand in names of files and jobs. Its work directory has the same name.
      argv: of the training command without the interpreter, from "-m", "moe_ablm.train" on. Each
        element is one argument and must reach the process unchanged (it may hold blanks, quotes
        and line ends).
      workdir: absolute path of the run, the same as in `argv`.
      fingerprint: what identifies the run (`moe_ablm.config.fingerprint`).
      tokens: that it will see, padding not counted, about.
      flops: of its matmuls, forward and backward, about.
      environment: variables of its process, beside those that the launcher's own process has.
    """

    name: str
    argv: tuple[str, ...]
    workdir: Path
    fingerprint: str
    tokens: float
    flops: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where the output of all attempts goes."""
        return self.workdir.parent / LOGS / f"{self.name}.log"

    @property
    def outcome(self) -> Path:
        """What the newest attempt says of its end."""
        return self.log.with_name(f"{self.name}.outcome.json")


def config_of(argv: Sequence[str]) -> Config:
    """The checked config of a training command, as the trainer reads it.

    Raises:
      UserError: the config file, a key or a value is wrong.
    """
    with contextlib.chdir(REPOSITORY):
        return read_config(argv)
