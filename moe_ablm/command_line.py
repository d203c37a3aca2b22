"""The trainer's command line: flags, and errors told in one line."""

import errno
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_ablm import config as configs
from moe_ablm.config import Config
from moe_ablm.errors import UserError


def again() -> str:
    """The command line of this process, to be typed again."""
    return "python -m moe_ablm.train " + " ".join(map(shlex.quote, sys.argv[1:]))


FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config file, with arguments after a colon.")
flags.DEFINE_string("workdir", None, "Directory of the run.")


def parse(argv: list[str]) -> tuple[Config, Path]:
    """Command line -> checked config and work directory; UserError where it is wrong."""
    _let_configs_import_each_other(argv)
    try:
        rest = FLAGS(argv)
        config = FLAGS.config and configs.from_mapping(FLAGS.config)
    except UserError:
        raise
    except Exception as error:  # flags, the config file itself, and ml_collections raise many kinds
        raise UserError(f"config or flag: {_one_line(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --")
    if not config or not FLAGS.workdir:
        missing = "--workdir" if config else "--config"
        raise UserError(f"{missing} is missing: --config=FILE.py --workdir=DIR")
    return config, Path(FLAGS.workdir)


def _let_configs_import_each_other(argv: list[str]) -> None:
    """`from configs.base import ...` in a config file works from any current directory."""
    for argument in argv:
        if argument.lstrip("-").startswith("config="):
            file = Path(argument.partition("=")[2].partition(":")[0]).resolve()
            sys.path.insert(0, str(file.parent.parent))


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an exception, or one behind it, says that there is no space left on the device."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: Exception) -> str:
    """The message of an error of absl or ml_collections, which like to quote and to wrap."""
    text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.replace("\\n", " ").replace("\\'", "'").split()).strip("'\" ")
