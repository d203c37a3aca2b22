"""The exception for input that the user can mend, that of a diverged run, and near misses."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Wrong input: its message is one line that says what, where, found, expected and what to do.

    The command line prints it on stderr and exits with code 2.
    """


class ArgumentError(UserError):
    """A value that an argument cannot have: a flag of a command, or an argument in Python.

    Attributes:
      in_python: the same line for a caller of `moe_ablm.api`.
    """

    def __init__(self, name: str, value: Any, expected: str):
        super().__init__(f"--{name.replace('_', '-')} {value}: {expected}")
        self.in_python = f"{name}={value!r}: {expected}"
        self._given = name, value, expected

    def __reduce__(self):  # it may come from a process of a pool
        return type(self), self._given


class Diverged(Exception):
    """A metric of a run is no longer finite."""


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 row", "2,000 rows"."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
