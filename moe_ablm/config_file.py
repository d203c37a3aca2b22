"""A config file: Python with a function that makes a config; its errors are told with a line."""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_ablm.errors import UserError, suggestion


def load(given: str) -> Any:
    """What `get_config` of a file returns.

    Args:
      given: `FILE.py`, or `FILE.py:ARGUMENT`, which `get_config` is then called with.

    Raises:
      UserError: there is no such file, it raises an error, or it has no `get_config` that takes
        what is given.
    """
    name, colon, argument = given.partition(":")
    path = _file(name)
    try:
        get_config = getattr(_module(path), "get_config", None)
        if get_config is None:
            raise UserError(f"--config={given}: {name} has no function get_config")
        arguments = (argument,) if colon else ()
        _check_takes(get_config, arguments, given)
        return get_config(*arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a file may raise
        raise UserError(f"{name}{_line(error, path)}: {_said(error)}") from error


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_file() and path.suffix == ".py":
        return path
    known = [str(p) for place in (path.parent, Path("configs")) for p in sorted(place.glob("*.py"))]
    near = suggestion(name if path.suffix else f"{name}.py", [] if path.is_dir() else known)
    found = "a directory" if path.is_dir() else "no Python file" if path.exists() else "not there"
    raise UserError(f"--config={name} is {found}{near}: expected a file such as configs/base.py")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _check_takes(get_config: Any, arguments: tuple[str, ...], given: str) -> None:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        name = given.partition(":")[0]
        if arguments:
            expected = f"get_config of {name} takes no argument: leave out {':' + arguments[0]!r}"
        else:
            expected = f"get_config of {name} needs an argument: --config={name}:ARGUMENT"
        raise UserError(f"--config={given}: {expected}") from error


def _line(error: Exception, path: Path) -> str:
    """ ", line N" of the file where an error arose."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path.resolve():
        return f", line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    return f", line {lines[-1]}" if lines else ""


def _said(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else error.args[0] if error.args else ""
    return f"{type(error).__name__}: {' '.join(str(text).split())[:300]}".removesuffix(": ")
