"""The objects at `gs://` and `s3://` addresses, and where they are on this machine.

A store has no locks, no renames and nothing that could be mapped into memory. So what is read is
fetched into the user's cache (`store_copies.py`), and what is written is made there and copied up
once it is whole: of verbs by `store_flags.py`, of a run by `mirror.py`. The drivers are fsspec's
(extra `stores`): their variables name credentials and endpoints.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from moe_ablm.cache import cache_directory
from moe_ablm.endings import is_full_disk
from moe_ablm.errors import UserError, counted
from moe_ablm.files import in_store, replacing

DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}  # packages by the scheme of addresses
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST")
LEASE = ".lease.json"  # of a work directory in a store (`mirror.py`)
# what tells versions of an object apart; stores have different ones
_VERSION = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created", "size")
# how drivers say that they, or their credentials, are refused
_REFUSED = re.compile("credential|denied|forbidden|unauthori[sz]ed|anonymous caller", re.IGNORECASE)


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


def say(address: str, what: str, sizes: list[int]) -> None:
    """Tells on stderr how much is copied."""
    print(
        f"{address}: {what} {counted(len(sizes), 'file')}, {sum(sizes) / 1e6:,.1f} MB",
        file=sys.stderr,
    )
