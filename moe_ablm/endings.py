"""How a command ends: an exit code, and one line on stderr where something is wrong.

0 done; 2 the input or the machine (disk, permissions, memory, devices) is wrong; 130 Ctrl-C; 1
anything else. Nothing is imported here that takes time: it works before jax is there.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from moe_ablm.errors import UserError, suggestion

INTERRUPTED = 130  # of a process that Ctrl-C ended, as shells have it
_AGAIN = "interrupted: give the same command again"
FULL = (errno.ENOSPC, errno.EDQUOT)
# how libraries write the number of an error that is no OSError: pyarrow, tensorstore, safetensors
_NUMBER = re.compile(r"(?:OS error|os error|[Ee]rrno) (\d+)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a module's docstring; wraps a text that is a single line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line, and which flag may have been meant."""

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        """Prints the line; ends with code 2."""
        if message.startswith("unrecognized arguments: "):
            message += suggestion(message.split()[2].partition("=")[0], self._flags())
        self.exit(2, f"{self._name()}: {message} ({self.prog} --help lists what there is)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse does not say when that fails

    def _name(self) -> str:
        return self.prog.removeprefix("python ").removeprefix("-m ").split()[0]

    def _flags(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._flags()


def end(command: Callable[[], int | None], name: str = "moe_ablm") -> int:
    """Carries out a command; returns its exit code.

    Args:
      command: returns an exit code, or None for 0.
      name: with which lines begin.
    """
    try:
        try:
            code = command() or 0
        except SystemExit as stop:  # of argparse
            if isinstance(stop.code, str):
                raise UserError(stop.code) from stop
            code = int(stop.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read stdout, as `head`, has seen enough
        _no_more_output()
        return 1
    except KeyboardInterrupt:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody has said a word
            print(f"{name}: {_AGAIN}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = obstacle(error)
        if line is None:
            raise
        _no_more_output()
        print(f"{name}: {line}", file=sys.stderr)
        return 2
    return code


def end_imports(package: Path) -> None:
    """Ctrl-C in a command of this folder ends it in one line, until `end` carries it out.

    To be called by the package, which Python imports before what the command imports: callbacks of
    libraries would swallow the exception, or it would be a traceback through all of them. Nothing
    is to be saved or tidied up there.
    """

    def answer(number: int, frame: FrameType | None) -> NoReturn:
        while frame is not None and frame.f_code is not end.__code__:
            frame = frame.f_back
        if frame is None:
            os.write(2, f"{package.name}: {_AGAIN}\n".encode())
            os._exit(INTERRUPTED)
        signal.signal(number, signal.default_int_handler)  # `end` says it
        raise KeyboardInterrupt

    worker = sys.modules.get("multiprocessing.process")
    if worker is not None and worker.parent_process() is not None:
        return  # a process of a pool imports the command, too
    # -m: Python is about to look for the command in the package
    if sys.argv[0] == "-m" or Path(sys.argv[0]).resolve().parent == package:
        signal.signal(signal.SIGINT, answer)


def obstacle(error: BaseException) -> str | None:
    """One line for what the user can mend; None for a fault of the program.

    Files are written whole or not at all, so that what an error of the system breaks off is not
    there afterwards.
    """
    if isinstance(error, UserError):
        return str(error)
    if is_full_disk(error):
        return f"{_place(error)}no space left on the disk: free some, then run the command again"
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{_place(error)}{error.strerror or text}"
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        reason = f" ({text[:200]})" if text else ""
        return f"out of memory{reason}: a smaller batch, a smaller model or a larger machine"
    if backend := _missing_backend(error, text):
        return f"{backend}: JAX_PLATFORMS=cpu, or the hardware's extra (README.md), helps"
    number = _NUMBER.search(text)
    if number and type(error).__module__.partition(".")[0] in ("safetensors", "pyarrow"):
        return f"{os.strerror(int(number[1]))} ({text[:200]})"
    return None


def _missing_backend(error: BaseException, text: str) -> str:
    """What JAX says of hardware that it cannot use; "" if that is not the error."""
    if isinstance(error, RuntimeError) and "nable to initialize backend" in text:
        return text[:300]
    # it asserts that it has found one where $JAX_PLATFORMS names what is not installed
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames and frames[-1].name == "backends":
        return f"JAX has no backend for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
    return ""


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an exception, or one behind it, says that there is no space left on the device."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return f"{name}: " if isinstance(name, str) else ""


def _no_more_output() -> None:
    """What is left in stdout's buffer goes nowhere, so that the end does not fail once more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
