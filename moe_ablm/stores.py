"""What lies at `gs://` and `s3://` addresses, as files of this machine and back.

A store has no locks, no renames and nothing that could be mapped into memory. So what is read is
fetched into the user's cache, and what is written is made there and copied up once it is whole;
`mirror.py` does so for a work directory. The drivers are fsspec's (extra `stores`): their variables
name credentials and endpoints.
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from moe_ablm.cache import cache_directory
from moe_ablm.endings import is_full_disk
from moe_ablm.errors import UserError, counted
from moe_ablm.files import address_of, in_store, locked, replacing, write_json

DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}  # packages by the scheme of addresses
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST")
COMMITTED = "commit_success.txt"  # the last file of a checkpoint in a store, as orbax has it
LEASE = ".lease.json"  # of a work directory in a store (`mirror.py`)
# what tells versions of an object apart; stores have different ones
_VERSION = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created", "size")
_STEP = re.compile(r"checkpoints/(\d+)/(.+)")
# of a run, what nobody reads who does not compute with it
_BULKY = ("checkpoints", "tensorboard", "profile", "damaged")
# how drivers say that they, or their credentials, are refused
_REFUSED = re.compile("credential|denied|forbidden|unauthori[sz]ed|anonymous caller", re.IGNORECASE)
# flags of verbs: what is read, and what is written
_INPUTS, _OUTPUTS = ("run", "input", "data", "contigs", "germlines"), ("out", "figures", "report")
_ADDRESS = re.compile(rf"(?:^|(?<=[=,:]))(?:{'|'.join(DRIVERS)}):/+[^,]+")
_CURVES = ("report", "fit", "curves")  # verbs that read no parameters


class StoreError(UserError):
    """A store refuses, or cannot be reached."""


class Gone(StoreError):
    """An object, or its bucket, is not there."""


class Found(NamedTuple):
    """An object: what tells its content from any before, and its size."""

    version: str
    bytes: int


class Store:
    """What lies under one address; every error is a `StoreError`.

    Args:
      address: as `files.address_of` gives it.
      flag: flag or config key that gave it, for messages.
    """

    def __init__(self, address: str, flag: str):
        self.address, self.what = address, f"{flag} {address}"
        scheme, _, path = address.partition("://")
        if scheme not in DRIVERS:
            raise UserError(f"{flag} {in_store(address)}")
        if not path:
            raise UserError(f"{self.what} names no bucket: expected {scheme}://BUCKET/NAME")
        if not {"", ".", ".."}.isdisjoint(path.split("/")):  # they would leave the cache
            raise UserError(f"{self.what}: expected {scheme}://BUCKET/NAME without '.', '..', '//'")
        try:
            import fsspec

            with self._told():
                # listings of before are of no use: others write there, too
                self._fs = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            raise UserError(
                f"{self.what} needs the package {DRIVERS[scheme]}: pip install 'moe_ablm[stores]'"
            ) from error
        self._root = str(self._fs._strip_protocol(address)).rstrip("/")

    def listing(self) -> dict[str, Found]:
        """Objects by their names under the address; "" is the address itself, a file."""
        with self._told():
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                if self._fs.exists(self._root.partition("/")[0]):
                    return {}
                raise
        listed = {}
        for path, info in found.items():
            name = path.removeprefix(self._root).removeprefix("/")
            if info["type"] != "file" or name.endswith("/"):  # stands for an empty directory
                continue
            if name and not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise StoreError(f"{self.what}: the object {name!r} has no name of a file")
            version = "|".join(str(info.get(key)) for key in _VERSION)
            listed[name] = Found(version, int(info["size"] or 0))
        return listed

    def get(self, name: str, target: Path, size: int) -> None:
        """Fetches an object of so many bytes into a file, which has all of them or is not there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            with self._told():
                self._fs.get_file(self._path(name), str(temporary))
            if temporary.stat().st_size != size:
                raise Gone(f"{self.what}: {name} has changed while it was fetched")

    def put(self, path: Path, name: str) -> None:
        """Copies a file up; readers see the old object or the new one."""
        try:
            with self._told():
                self._fs.put_file(str(path), self._path(name))
        except StoreError:
            path.stat()  # an error of the file, which may just have been removed, is its own
            raise

    def write(self, name: str, text: str) -> None:
        """Writes a small object."""
        with self._told():
            self._fs.pipe_file(self._path(name), text.encode())

    def read(self, name: str) -> str | None:
        """The text of a small object; None if it is not there."""
        with suppress(Gone), self._told():
            return self._fs.cat_file(self._path(name)).decode(errors="replace")
        return None

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""
        with suppress(Gone), self._told():
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of drivers, which are of many kinds, in one line."""
        try:
            yield
        except (StoreError, ImportError):
            raise
        except Exception as error:
            if is_full_disk(error):
                raise
            text = " ".join(str(error).split())[:200] or type(error).__name__
            if isinstance(error, FileNotFoundError):
                raise Gone(f"{self.what} is not there ({text}): check bucket and name") from error
            if isinstance(error, PermissionError) or _REFUSED.search(f"{type(error)} {text}"):
                raise StoreError(
                    f"{self.what}: access refused ({text}): check the credentials "
                    "(docs/stores.md names their variables) and their rights"
                ) from error
            raise StoreError(f"{self.what} cannot be reached ({text})") from error


def place_of(kind: str, address: str) -> Path:
    """Where the files of an address are in the cache; what keeps account of them lies beside it.

    Args:
      kind: "read", "out" or "run".
      address: in a store; the same one at another endpoint is another place.
    """
    about = "\n".join([address, *(os.environ.get(name, "") for name in ENDPOINTS)])
    digest = hashlib.sha256(about.encode()).hexdigest()[:16]
    return cache_directory() / "stores" / kind / digest / address.rpartition("/")[2]


def fetched(path: Path | str, flag: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """What is at a path on this machine: itself, or the copy of what lies at an address.

    Only what has changed since is fetched again.

    Args:
      path: of a file or directory, or an address.
      flag: flag or config key that gave it, for messages.
      wanted: which objects are needed, by their names under the address.

    Raises:
      UserError: there is nothing, the store refuses or cannot be reached, or is of a kind that is
        not read.
    """
    address = address_of(path)
    if address is None:
        return Path(path)
    store, place = Store(address, flag), place_of("read", address)
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_name(f"{place.name}.lock"), wait=True):
        for last in (False, False, True):  # whoever writes there may be at work
            try:
                _update(store, place, wanted)
                break
            except Gone:
                if last:
                    raise
    return place


def _update(store: Store, place: Path, wanted: Callable[[str], bool]) -> None:
    there, account = store.listing(), place.with_name(f"{place.name}.versions")
    there.pop(LEASE, None)  # it changes all the time
    if not there:
        raise Gone(f"{store.what} is not there: nothing lies under this address")
    have = _read_account(account)
    for name in [*have]:
        path = place / name if name else place
        if name not in there or have[name] != there[name].version or not path.is_file():
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
            del have[name]
    missing = sorted(name for name in there if wanted(name) and name not in have)
    if place.is_dir() and "" in there or place.is_file() and "" not in there:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    if missing:
        say(store.address, "fetching", [there[name].bytes for name in missing])
    for name in missing:
        store.get(name, place / name if name else place, there[name].bytes)
        have[name] = there[name].version
        write_json(account, have)


def _read_account(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def say(address: str, what: str, sizes: list[int]) -> None:
    """Tells on stderr how much is copied."""
    print(
        f"{address}: {what} {counted(len(sizes), 'file')}, {sum(sizes) / 1e6:,.1f} MB",
        file=sys.stderr,
    )


def split_checkpoints(names: Iterable[str]) -> dict[int, list[str]]:
    """Names of the objects or files of each checkpoint of a run, by step."""
    steps: dict[int, list[str]] = {}
    for name in names:
        if match := _STEP.fullmatch(name):
            steps.setdefault(int(match[1]), []).append(name)
    return steps


def whole_steps(names: Mapping[str, Any]) -> set[int]:
    """Steps of the checkpoints in a store that are whole.

    Of a run that was copied there by other means, all of them.
    """
    steps = split_checkpoints(names)
    if LEASE not in names:
        return set(steps)
    return {step for step in steps if f"checkpoints/{step}/{COMMITTED}" in names}


def fetched_run(run: Path | str, flag: str) -> Path:
    """As `fetched`, of a model: of a run's checkpoints only that which `load_model` takes."""
    address = address_of(run)
    if address is None:
        return Path(run)
    store = Store(address, flag)
    steps = whole_steps(store.listing())
    while True:
        place, best = _fetch_best(run, flag, steps)
        now = whole_steps(store.listing())
        if best is None or best in now:
            return place
        steps = now  # the run went on meanwhile, and no longer keeps that checkpoint


def _fetch_best(run: Path | str, flag: str, steps: set[int]) -> tuple[Path, int | None]:
    """The copy of a run, and which of these checkpoints it has as a whole; None: there are none."""

    def described(name: str) -> bool:
        match = _STEP.fullmatch(name)
        if match:
            return int(match[1]) in steps and not match[2].startswith("state/")
        return _is_small(name)

    place = fetched(run, flag, described)
    for folder in (place / "checkpoints").glob("*"):  # whole once, and being replaced
        if folder.name.isdecimal() and int(folder.name) not in steps:
            shutil.rmtree(folder)
    if not steps:
        return place, None
    from moe_ablm.interop.load import best_step
    from moe_ablm.training.checkpoint import read_records

    best = best_step(read_records(place / "checkpoints"))
    place = fetched(
        run, flag, lambda name: described(name) or name.startswith(f"checkpoints/{best}/")
    )
    return place, best


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
            return str(fetched(match[0], f"--{name}", _is_small))
        return str((fetched_run if name == "run" else fetched)(match[0], f"--{name}"))

    return type(value)(_ADDRESS.sub(copy, str(value)))


def _is_small(name: str) -> bool:
    return not set(name.split("/")[:-1]) & set(_BULKY)


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
