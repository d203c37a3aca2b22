"""The trainer's command line: flags, and one line for each error."""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_ablm import config as configs
from moe_ablm.config_file import load
from moe_ablm.config_keys import expected, require_key
from moe_ablm.config_schema import Config
from moe_ablm.errors import UserError

_WRONG_VALUE = re.compile(r"flag --(config\.[\w.]+)=(.*?): ", re.DOTALL)


def parse(argv: list[str]) -> tuple[Config, Path, int | None]:
    """Checked config, work directory and `--extend-to` of a command line.

    Raises:
      UserError: a flag is missing or wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_integer("extend-to", None, "Its steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    config = _read(argv, values)
    if not values.workdir:
        raise UserError("--workdir is missing: --config=FILE.py --workdir=DIR")
    return config, Path(values.workdir), values["extend-to"].value


def read_config(argv: Sequence[str]) -> Config:
    """The checked config of a training command, from its arguments that begin with `--config`.

    Raises:
      UserError: there is none, or the config file, a key or a value is wrong.
    """
    return _read(["train", *(a for a in argv if a.startswith("--config"))], flags.FlagValues())


def _read(argv: list[str], values: flags.FlagValues) -> Config:
    """The config of a command line; `values` get its other flags."""
    file, argv = taken("config", argv)
    if not file:
        raise UserError("--config is missing: --config=FILE.py")
    tree = load(file)
    if not isinstance(tree, ConfigDict):
        found = type(tree).__name__
        raise UserError(f"--config={file}: get_config returned {found}, expected a ConfigDict")
    _check_keys(argv)
    config_flags.DEFINE_config_dict("config", tree, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except Exception as error:  # flags and ml_collections raise many kinds
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --")
    return configs.from_mapping(values.config)


def taken(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, the last one, and the arguments without it."""
    found, rest, words = None, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else next(words, None)
        else:
            rest.append(word)
    return found, rest


def _check_keys(argv: list[str]) -> None:
    for word in argv[1:]:
        name = re.match(r"--?(config\.[^=\[]*)", word)
        if name:
            require_key(name[1])


def _one_line(error: Exception) -> str:
    """The message of an error of absl or ml_collections, which like to quote and to wrap."""
    text = str(error.args[0]) if error.args else type(error).__name__
    if found := _WRONG_VALUE.match(text):
        return f"{found[1]}={found[2]!r}: expected {expected(found[1])}"
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
