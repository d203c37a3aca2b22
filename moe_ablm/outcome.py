"""How a training process ended, in a file for whoever started it.

A launcher names the file in `$MOE_ABLM_OUTCOME` and removes it when an attempt begins; without the
variable nothing is written. Of several processes the first says how the run ended. One that fails
says so unless a word is there: the first failure is the cause of the others.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_ablm.files import write_json

VARIABLE = "MOE_ABLM_OUTCOME"
COMPLETE, STOPPED = "complete", "stopped"
FINAL = DIVERGED, COLLAPSED = "diverged", "collapsed"  # the same command would end so again
REFUSED, FAILED = "refused", "failed"  # the input is wrong; anything else
CODES = {COMPLETE: 0, STOPPED: 0, DIVERGED: 1, COLLAPSED: 1, REFUSED: 2, FAILED: 1}


@dataclass(frozen=True)
class Ending:
    """The content of the file, a JSON object with these keys.

    Attributes:
      status: a key of `CODES`.
      exit_code: of the process; negative: the signal that killed it.
      message: what is wrong, one line.
      step: updates done, if known.
    """

    status: str
    exit_code: int
    message: str = ""
    step: int | None = None

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return self.status not in (COMPLETE, STOPPED)


def read(path: Path) -> Ending | None:
    """The outcome in a file; None where none was left, a failure where it cannot be read."""
    try:
        content = json.loads(path.read_text())
        found = Ending(**{key: content[key] for key in Ending.__dataclass_fields__})
        types = (type(found.exit_code), type(found.message))
        if found.status not in CODES or types != (int, str):
            raise ValueError(f"it holds {content!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Ending(FAILED, 1, one_line(f"{path} is damaged ({error!r})"))
    return found


def leave(path: Path, outcome: Ending, *, replace: bool = False) -> Ending:
    """Writes an outcome as a whole, unless there is one or `replace`; returns what holds then."""
    if not replace and (found := read(path)):
        return found
    with contextlib.suppress(OSError):  # what ended the process is worse, and said elsewhere, too
        write_json(path, asdict(outcome))
    return outcome


@contextmanager
def told(status_of: Callable[[Exception], str]) -> Iterator[Callable[..., None]]:
    """Leaves the outcome of a block that raises; gives what leaves that of one that does not.

    Args:
      status_of: an exception -> its status; that of an error of the program is `FAILED`.

    Returns:
      A function of status, and step and message if there are any.
    """
    name = os.environ.get(VARIABLE)

    def end(status: str, step: int | None = None, message: str = "") -> None:
        if name:
            outcome = Ending(status, CODES[status], one_line(message), step)
            leave(Path(name), outcome, replace=True)

    try:
        yield end
    except Exception as error:
        if name:
            status = status_of(error)
            kind = f"{type(error).__name__}: " if status == FAILED else ""
            leave(Path(name), Ending(status, CODES[status], one_line(f"{kind}{error}")))
        raise


def one_line(text: str) -> str:
    """Text without line ends and other control characters, at most 300 characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
