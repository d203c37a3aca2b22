"""Files that others read: written whole or not at all. And locks between processes.

The ground floor: every room may use it.
"""

import fcntl
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moe_ablm.errors import UserError

# object stores by the scheme of their addresses, and what copies from them
STORES = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive", "s3a": "", "az": "",
          "abfs": "", "abfss": "", "hdfs": "hdfs dfs -get"}  # fmt: skip


def address_of(path: Path | str) -> str | None:
    """The address that a path names in an object store, also where a `Path` has lost a slash.

    None of any other path.
    """
    scheme, colon, rest = str(path).partition(":/")
    if not colon or scheme not in STORES:
        return None
    return f"{scheme}://{rest.strip('/')}"


def in_store(path: Path | str) -> str | None:
    """What to say of a path that names an object store, which has no locks and no renames.

    None of any other path.
    """
    address = address_of(path)
    if address is None:
        return None
    scheme = address.partition(":")[0]
    how = f" ({STORES[scheme]} {address} DIR)" if STORES[scheme] else ""
    return (
        f"{address} is in an object store, and files are locked, renamed and mapped here: name a "
        f"directory of a file system, and copy to and from it{how}"
    )


def require_local(path: Path | str, name: str) -> None:
    """Raises `UserError` where a path, given by `name`, is of an object store."""
    if reason := in_store(path):
        raise UserError(f"{name} {reason}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` if the block ends without an error.

    A reader sees the old content or the new, never a part; after an error nothing is left. The
    suffix is that of `path`: some writers choose the format by it.
    """
    temporary = path.with_name(f".{path.stem}.{_process()}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def all_or_none(out: Path) -> Iterator[Path]:
    """A directory to write files in, which move to `out` if the block ends without an error.

    Files of other names in `out` stay; after an error everything is as it was before.

    Raises:
      UserError: there is no place to write.
    """
    made = [place for place in (out, *out.parents) if not place.exists()]
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"  # nobody else's
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"{out} cannot be written: {reason}; name another place") from error
        yield temporary
        for path in sorted(temporary.rglob("*")):
            target = out / path.relative_to(temporary)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for place in made:
            with suppress(OSError):  # it is not empty: what was wanted is there
                place.rmdir()


def _process() -> str:
    """A name of this process; those of two machines, or containers, may have one number."""
    return f"{os.uname().nodename}.{os.getpid()}"


def write_atomically(path: Path, text: str) -> None:
    """Replaces the content of a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON as a whole; as `json_text`."""
    write_atomically(path, json_text(content, indent=1) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON with null for every number that is not finite: JSON has neither NaN nor infinity."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def shortened(value: Any) -> Any:
    """A float with the fewest digits that tell its float32 from others; all else as it is.

    For tables of what was computed in float32, whose further digits mean nothing. Whole numbers
    stay what they are.
    """
    if not isinstance(value, float) or not math.isfinite(value) or value.is_integer():
        return value
    packed = struct.pack("f", value)
    single = struct.unpack("f", packed)[0] or value  # too small for float32: six digits
    fewer = (float(f"{single:.{digits}g}") for digits in (6, 7, 8, 9))  # nine tell all apart
    return next(number for number in fewer if struct.pack("f", number) == packed)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[IO[str]]:
    """Holds the lock of a file, which ends with the block or the process.

    Args:
      path: of the lock; made if absent, unless shared.
      shared: whether others may hold it shared, too.
      wait: for others to release it, instead of raising.

    Raises:
      BlockingIOError: another process holds it.
      OSError: the file cannot be opened, or its file system has no locks.
    """
    with path.open("r" if shared else "a+") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        yield file
