"""Addresses among the flags of a verb: fetched before it begins, copied up when it has ended."""

import argparse
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_ablm.errors import UserError
from moe_ablm.files import address_of
from moe_ablm.store_copies import fetched, fetched_run, is_small
from moe_ablm.stores import DRIVERS, Found, Store, StoreError, place_of, say

# flags of verbs: what is read, and what is written
_INPUTS, _OUTPUTS = ("run", "input", "data", "contigs", "germlines"), ("out", "figures", "report")
_ADDRESS = re.compile(rf"(?:^|(?<=[=,:]))(?:{'|'.join(DRIVERS)}):/+[^,]+")
_CURVES = ("report", "fit", "curves")  # verbs that read no parameters


@contextmanager
def at_hand(args: argparse.Namespace, goes_on: bool = False) -> Iterator[None]:
    """Around a verb: addresses among its flags become paths, and what it wrote is copied up.

    Args:
      args: flags of the verb, which are changed.
      goes_on: whether the verb goes on after what an earlier process did.

    Raises:
      UserError: a store refuses or cannot be reached, or something is there already.
    """
    given = vars(args)
    addresses = {name: address_of(given[name]) for name in _OUTPUTS if given.get(name)}
    outputs = {
        name: _Output(address, f"--{name}", bool(given.get("overwrite")), goes_on)
        for name, address in addresses.items()
        if address
    }
    read = [name for name in _INPUTS if _ADDRESS.search(_text(given.get(name)))]
    if read and given.get("watch"):
        raise UserError("--watch looks at files: not of a run in a store; without it, report reads")
    if read and args.verb in ("report", "describe") and given["out"] is None:
        raise UserError("--out is missing: of what is in a store, say where the figures are to go")
    for name in read:
        given[name] = _local(given[name], name, args.verb)
    given.update({name: output.place for name, output in outputs.items()})
    try:
        yield
        for output in outputs.values():
            output.copy_up()
    finally:
        for output in outputs.values():
            with suppress(OSError):  # not empty: the same command goes on there
                output.place.parent.rmdir()


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _local(value: Any, name: str, verb: str) -> Any:
    """The value of a flag with copies in the place of addresses."""
    if isinstance(value, list):
        return [_local(item, name, verb) for item in value]

    def copy(match: re.Match) -> str:
        if verb in _CURVES:
            return str(fetched(match[0], f"--{name}", is_small))
        return str((fetched_run if name == "run" else fetched)(match[0], f"--{name}"))

    return type(value)(_ADDRESS.sub(copy, str(value)))


class _Output:
    """A file or directory that a verb makes on this machine, to be copied up when it is whole.

    A verb that goes on after what is done finds it there.
    """

    def __init__(self, address: str, flag: str, overwrite: bool, goes_on: bool):
        self._store, self.place = Store(address, flag), place_of("out", address)
        there = self._store.listing()
        if there and not overwrite and not (goes_on and self._has_more_than(there)):
            raise UserError(f"{flag} {address} exists already: choose another name or remove it")
        # what cannot be written is said before anything is computed
        probe = Store(f"{address}.probe-{secrets.token_hex(4)}", flag)
        probe.write("", "")
        with suppress(StoreError):  # some may write, but not delete
            probe.delete("")
        if self.place.exists() and not goes_on:  # of a process that was killed while it copied
            print(
                f"{flag} {address}: an earlier result is now {self._move_aside()}", file=sys.stderr
            )
        self.place.parent.mkdir(parents=True, exist_ok=True)

    def _has_more_than(self, there: Mapping[str, Found]) -> bool:
        """Whether a result of before is here, of which copying up a part was all that was done."""
        names = {path.relative_to(self.place).as_posix() for path in _files(self.place)}
        return set(there) < names

    def _move_aside(self) -> Path:
        kept = self.place.parent.with_name(f"{self.place.parent.name}-{secrets.token_hex(4)}")
        self.place.parent.rename(kept)
        return kept / self.place.name

    def copy_up(self) -> None:
        """Copies what is there; the files that make a directory what it is, last."""
        if not self.place.exists():
            return
        files = [self.place] if self.place.is_file() else _files(self.place)
        try:
            for path in files:
                name = path.relative_to(self.place).as_posix() if path != self.place else ""
                self._store.put(path, name)
        except StoreError as error:
            kept = self._move_aside()
            raise StoreError(f"{error}: it is whole in {kept}, copy it from there") from error
        say(self._store.address, "copied", [path.stat().st_size for path in files])
        shutil.rmtree(self.place.parent, ignore_errors=True)


def _files(directory: Path) -> list[Path]:
    """All files of a directory; the JSON at its top, without which it is nothing, last."""
    found = sorted(p for p in directory.rglob("*") if p.is_file())
    return sorted(found, key=lambda p: p.parent == directory and p.suffix == ".json")
