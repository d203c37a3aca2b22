"""Loads a config file, a Python file with `get_config`; reports its errors in one line."""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_ablm.errors import UserError, suggestion


def load(given: str, flag: str = "--config", example: str = "configs/base.py") -> Any:
    """What `get_config` of a file returns.

    Args:
      given: `FILE.py`, or `FILE.py:ARGUMENT`, which `get_config` is then called with.
      flag: that named the file, for errors.
      example: a file of the kind, for errors.

    Raises:
      UserError: there is no such file, it raises an error, or it has no `get_config` that takes
        what is given.
    """
    name, colon, argument = given.partition(":")
    path = _file(name, flag, example)
    try:
        get_config = getattr(_module(path), "get_config", None)
        if get_config is None:
            raise UserError(f"{flag}={given}: {name} has no function get_config")
        arguments = (argument,) if colon else ()
        _check_takes(get_config, arguments, given, flag)
        return get_config(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file may raise
        raise UserError(f"{flag}={name}{_line(error, path)}: {_said(error)}") from error


def _file(name: str, flag: str, example: str) -> Path:
    path = Path(name)
    if path.is_file() and path.suffix == ".py":
        return path
    known = [str(p) for place in (path.parent, Path("configs")) for p in sorted(place.glob("*.py"))]
    near = suggestion(name if path.suffix else f"{name}.py", [] if path.is_dir() else known)
    found = "a directory" if path.is_dir() else "no Python file" if path.exists() else "not there"
    raise UserError(f"{flag}={name} is {found}{near}: expected a file such as {example}")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _check_takes(get_config: Any, arguments: tuple[str, ...], given: str, flag: str) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        name = given.partition(":")[0]
        if arguments:
            expected = f"get_config of {name} takes no argument: leave out {':' + arguments[0]!r}"
        else:
            expected = f"get_config of {name} needs an argument: {flag}={name}:ARGUMENT"
        raise UserError(f"{flag}={given}: {expected}") from error


def _line(error: BaseException, path: Path) -> str:
    """ ", line N" of the file where an error arose."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path.resolve():
        return f", line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else error.args[0] if error.args else ""
    return f"{type(error).__name__}: {' '.join(str(text).split())[:300]}".removesuffix(": ")
