"""Settings of a cluster: options of a launcher, else `~/.config/moe_ablm/launch.toml`.

    [slurm]
    partition = "gpu"
    account = "antibodies"
    gpus = 8
    time = "24:00:00"

    [jobset]
    image = "europe-docker.pkg.dev/lab/images/moe_ablm:1"
    claim = "runs"

Keys are the names of the options. Put no secrets in it: values end up in scripts and manifests.
"""

import argparse
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_ablm.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
      pattern: of the whole value; what it lets through is safe in a script and a manifest.
      help: of the option; says what is expected, too.
      default: where neither option nor file gives it.
    """

    pattern: str
    help: str
    default: str | None = None


def settings_file() -> Path:
    """`launch.toml` in the user's folder of configurations."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / (
        "moe_ablm/launch.toml"
    )


def add_options(parser: argparse.ArgumentParser, settings: dict[str, Setting]) -> None:
    """An option for every key."""
    for name, setting in settings.items():
        default = f" (default {setting.default})" if setting.default else ""
        parser.add_argument(f"--{name}", metavar="X", help=setting.help + default)


def resolve(
    options: argparse.Namespace, section: str, settings: dict[str, Setting]
) -> dict[str, str | None]:
    """Value of every key: option, file or default, in this order.

    Raises:
      UserError: the file cannot be read or has an unknown key, or a value has a wrong form.
    """
    file = settings_file()
    stored = _section(file, section, settings)
    values = {}
    for name, setting in settings.items():
        value = getattr(options, name.replace("-", "_"), None)
        where = f"--{name}"
        if value is None and name in stored:
            value, where = str(stored[name]), f"{file}: {section}.{name}"
        if value is None:
            value = setting.default
        if value is not None and not re.fullmatch(setting.pattern, value):
            raise UserError(f"{where}={value!r}: expected {setting.help}")
        values[name] = value
    return values


def given(values: Mapping[str, str | None], name: str) -> str:
    """The value of a key that a launcher cannot do without.

    Raises:
      UserError: it is not given.
    """
    value = values[name]
    if value is None:
        raise UserError(f"--{name} is missing: give the option, or the key in {settings_file()}")
    return value


def _section(file: Path, section: str, settings: dict[str, Setting]) -> dict:
    try:
        content = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    found = content.get(section, {})
    if not isinstance(found, dict):
        raise UserError(f"{file}: {section} is {found!r}, expected a table [{section}]")
    for key, value in found.items():
        if key not in settings:  # its value may be a secret
            raise UserError(f"{file}: {section}.{key} is no key: expected {', '.join(settings)}")
        if isinstance(value, dict | list | bool):
            raise UserError(f"{file}: {section}.{key}={value!r}: expected a word or number")
    return found
