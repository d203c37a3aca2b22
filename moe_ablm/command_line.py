"""The trainer's command line: flags, and one line for each error."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_ablm import config as configs
from moe_ablm.config import Config
from moe_ablm.errors import UserError


def parse(argv: list[str]) -> tuple[Config, Path, int | None]:
    """Checked config, work directory and `--extend-to` of a command line.

    Raises:
      UserError: a flag is missing or wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_integer("extend-to", None, "Its steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    config = _read(argv, values)
    if not config or not values.workdir:
        missing = "--workdir" if config else "--config"
        raise UserError(f"{missing} is missing: --config=FILE.py --workdir=DIR")
    return config, Path(values.workdir), values["extend-to"].value


def read_config(argv: Sequence[str]) -> Config:
    """The checked config of a training command, from its arguments that begin with `--config`.

    Raises:
      UserError: there is none, or the config file, a key or a value is wrong.
    """
    argv = ["train", *(a for a in argv if a.startswith("--config"))]
    config = _read(argv, flags.FlagValues())
    if not config:
        raise UserError("--config is missing: --config=FILE.py")
    return config


def _read(argv: list[str], values: flags.FlagValues) -> Config | None:
    """The config of a command line, with the values of its other flags; None: there is none."""
    help_ = "Config file, with arguments after a colon."
    config_flags.DEFINE_config_file("config", None, help_, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
        config = values.config and configs.from_mapping(values.config)
    except UserError:
        raise
    except Exception as error:  # flags, the config file itself, and ml_collections raise many kinds
        raise UserError(f"config or flag: {_one_line(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --")
    return config


def _one_line(error: Exception) -> str:
    """The message of an error of absl or ml_collections, which like to quote and to wrap."""
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split()).strip("'\" ")
