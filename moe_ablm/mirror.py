"""A work directory in an object store: a directory of this machine, copied up as it grows.

The trainer locks, renames, appends and measures free space, none of which a store has, and orbax
0.12 writes to no `s3://`. So a run works in the cache. A thread copies up what has changed, in an
order that leaves the store at every moment with a run that resumes:

1. files, above all `results.jsonl`, which then has every line up to the newest checkpoint;
2. new checkpoints, each with its commit marker last: without one it does not count;
3. only then what is gone here is removed there, the marker of a checkpoint first;
4. `run.json`, which may say that the run is complete.

What was set aside (damaged, or since the run was extended) goes up first, and is then removed
where it was, before all that. Where files are gone that a run never removes, somebody has cleared
the copy: the store stays as it is.

In the place of the lock there is a lease: an object with the holder and a number that grows every
`BEAT` seconds. Another process takes the run when the number has stood still for `EXPIRY` seconds;
a holder that finds itself replaced copies nothing any more, and stops. Two that begin in the same
second may both take it for up to `BEAT` seconds: this is no lock.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax

from moe_ablm.errors import UserError, counted
from moe_ablm.files import address_of, json_text, locked, write_json
from moe_ablm.preemption import stop
from moe_ablm.results import SHORTER
from moe_ablm.store_copies import COMMITTED, split_checkpoints, whole_steps
from moe_ablm.stores import LEASE, Store, StoreError, place_of, say

log = logging.getLogger(__name__)
FLAG = "--workdir"
EVERY = 15.0  # seconds between looks at what has changed
BEAT = 20.0  # seconds between signs of life
EXPIRY = 60.0  # seconds without one after which another process may take the run
PATIENCE = 60.0  # seconds for which the end of a run tries to copy what is left
PAUSE = 5.0  # seconds between these attempts
SMALL = 1 << 16  # bytes up to which files are compared by content
CONFIG, RESULTS, END = "config.json", "results.jsonl", "run.json"
ASIDE = (SHORTER, "damaged/")  # how names of what was set aside begin


@contextmanager
def mirrored(workdir: Path) -> Iterator[Path]:
    """The directory in which a run works: `workdir` itself, or the mirror of an address.

    Raises:
      UserError: the store refuses or cannot be reached; the run is in use; the end of the run could
        not be copied up, what is left lies in the directory that is named.
    """
    address = address_of(workdir)
    if address is None:
        yield workdir
        return
    if jax.process_count() > 1:
        raise UserError(
            f"{FLAG} {address}: several processes share a work directory, which a store is not: "
            "name one on a shared file system, and copy it to the store when the run has ended"
        )
    mirror = Mirror(Store(address, FLAG), place_of("run", address), stop)
    with mirror.open() as place:
        yield place


class Mirror:
    """One work directory in a store and its copy here; `open` is its life.

    The session, a file beside the copy, has a name of the copy that no other has, the tokens of the
    leases under which it was the newest, and which state of each file is in the store.

    Args:
      place: directory of the copy.
      on_loss: called with why, perhaps more than once, when another process has taken the run.
    """

    def __init__(self, store: Store, place: Path, on_loss: Callable[[str], None] = lambda _: None):
        self._store, self.place, self._on_loss = store, place, on_loss
        self._account = place.with_name(f"{place.name}.session")
        self._token, self._beats = secrets.token_hex(8), 0
        self._copy_name = secrets.token_hex(8)
        self._tokens: list[str] = []
        self._sent: dict[str, str] = {}  # objects, by name: the state of the file that they hold
        self._lost = ""  # why the store is somebody else's now
        self._was_empty = False  # the store, when this process came
        self._failures, self._told = 0, ""

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Brings the run in; copies it up while the block works in it, and once more at its end."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.place.with_name(f"{self.place.name}.lock")))
            except BlockingIOError as error:
                raise UserError(
                    f"{FLAG} {self._store.address} is in use by another process of this machine"
                ) from error
            continued = self._take()
            left, failed = "", True
            try:
                with _repeated(BEAT, self._beat):
                    if not continued:  # this may take long, and others are to see that it lasts
                        self._bring_in()
                    self._begin()
                    left = "it was interrupted"
                    try:
                        with _repeated(EVERY, self._attempt):
                            yield self.place
                    finally:
                        left = self._copy_the_rest()
                failed = False
            finally:
                self._end(left, failed)

    # the beginning

    def _take(self) -> bool:
        """Takes the lease; returns whether the copy here is the newest state of the run."""
        earlier = self._read_session()
        there = self._store.listing()
        adopted = there.pop(LEASE, None) is None
        lease = {} if adopted else _parsed(self._store.read(LEASE))
        if there and CONFIG not in there:
            some = sorted(there)
            raise UserError(
                f"{FLAG} {self._store.address} is no run (it has no {CONFIG}), but holds "
                f"{', '.join(some[:3])}{' ...' if some[3:] else ''}: name an empty place"
            )
        self._wait_for(lease)
        self._was_empty = not there
        if adopted:  # a run that was copied there by other means: all its checkpoints count
            for step in split_checkpoints(there):
                self._store.write(_marker(step), "")
        continued = bool(lease) and lease.get("token") in earlier
        if continued:
            known = {name: self._sent.get(name, "") for name in there}
            continued = not self._is_cleared(self._files(), known)
            self._sent = known if continued else self._sent
        # before the lease is: otherwise a kill in between would make this copy an old one
        self._tokens = [*earlier, self._token] if continued else []
        self._write_session()
        self._write_lease()
        return continued

    def _begin(self) -> None:
        if self._lost:
            raise UserError(f"{FLAG} {self._store.address}: {self._lost}")
        self._tokens = [self._token]
        self._write_session()
        print(
            f"{self._store.address}: worked on in {self.place} and copied up every {EVERY:g} s. A "
            f"store has no locks (a lease that ends {EXPIRY:g} s after its last sign of life keeps "
            "others out), no free space to look at (that of the disk here counts), no renaming (a "
            "checkpoint counts once its commit marker is there) and no appending (results.jsonl "
            "and TensorBoard's files go up whole)"
        )

    def _read_session(self) -> list[str]:
        """Tokens of the leases of this copy; what of it is in the store."""
        session = _parsed(self._account.read_text() if self._account.exists() else None)
        tokens, self._sent = session.get("tokens"), dict(session.get("sent") or {})
        self._copy_name = session.get("copy") or self._copy_name
        return tokens if isinstance(tokens, list) else []

    def _write_session(self) -> None:
        content = {"copy": self._copy_name, "tokens": self._tokens, "sent": self._sent}
        write_json(self._account, content)

    def _wait_for(self, lease: dict) -> None:
        """Waits until a lease has ended.

        That of a process that worked in the same copy has: this process has the copy's lock. Host
        and path do not tell copies apart: containers often have the same.
        """
        here = {"host": os.uname().nodename, "copy": self._copy_name}
        if lease.get("ended", not lease) or here == {key: lease.get(key) for key in here}:
            return
        who = f"process {lease.get('process')} on {lease.get('host')}"
        end = time.monotonic() + EXPIRY
        print(f"{self._store.address}: waiting {EXPIRY:g} s for a sign of {who}", flush=True)
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, BEAT / 4))
            now = _parsed(self._store.read(LEASE))
            if now.get("ended", not now):
                return
            if now != lease:
                raise UserError(f"{FLAG} {self._store.address} is in use by {who}")

    def _write_lease(self, ended: bool = False) -> None:
        content = {
            "token": self._token,
            "host": os.uname().nodename,
            "process": os.getpid(),
            "copy": self._copy_name,
            "beats": self._beats,
            "ended": ended,
        }
        self._store.write(LEASE, json_text(content))

    def _bring_in(self) -> None:
        """Makes the copy anew: files, and the checkpoints that are whole."""
        if any(_state(path) != self._sent.get(name) for name, path in self._files().items()):
            aside = self.place.with_name(f"{self.place.name}.{secrets.token_hex(4)}")
            self.place.rename(aside)
            log.warning("%s is fetched anew: what was not copied up is %s", self.place, aside)
        shutil.rmtree(self.place, ignore_errors=True)
        there = self._store.listing()
        whole = whole_steps(there)
        there.pop(LEASE, None)
        partial = {
            name for step, names in split_checkpoints(there).items() if step not in whole
            for name in names
        }  # fmt: skip
        self._sent = dict.fromkeys(there, "")
        wanted = sorted(set(there) - partial)
        if wanted:
            say(self._store.address, "fetching", [there[name].bytes for name in wanted])
        # after a kill, a part of a copy must not look like work that was not copied up
        part = self.place.with_name(f".{self.place.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for name in wanted:
            self._store.get(name, part / name, there[name].bytes)
            self._sent[name] = _state(part / name)
        self._write_session()
        if wanted:
            part.rename(self.place)

    # copying up

    def _beat(self) -> None:
        with suppress(StoreError):  # copying says so
            if self._is_mine():
                self._beats += 1
                self._write_lease()

    def _is_mine(self) -> bool:
        now = _parsed(self._store.read(LEASE))
        if now and now.get("token") != self._token:
            self._lost = f"process {now.get('process')} on {now.get('host')} has taken the run"
        return not self._lost

    def _attempt(self) -> str:
        """Copies what has changed; returns why that failed, "" if it did not."""
        try:
            if self._is_mine():
                self._copy()
        except FileNotFoundError as error:  # it was just removed here, as old checkpoints are
            return str(error)
        except (StoreError, OSError) as error:
            self._failures += 1
            if not self._lost:
                self._warn("failed", "%s: the run goes on, copies wait in %s", error, self.place)
                return str(error)
        if self._lost:
            self._warn("lost", "%s: this one stops, and copies nothing up any more", self._lost)
            self._on_loss(self._lost)
            return self._lost
        if self._told:
            log.warning(
                "%s is reached again after %s: all is copied up",
                *(self._store.address, counted(self._failures, "failed attempt")),
            )
            self._told = ""
        return ""

    def _warn(self, about: str, line: str, *values: object) -> None:
        """Says a line once, until there is another one to say."""
        if self._told != about:
            log.warning(line, *values)
            self._told = about

    def _copy(self) -> None:
        # first, so that the results that are read afterwards know of each of these checkpoints
        files = self._files()
        if self._is_cleared(files, self._sent):
            raise StoreError(
                f"files of {self.place} are gone: {self._store.address} stays as it is"
            )
        steps, torn = split_checkpoints(files), self._torn(files, self._sent)
        whole = {step for step in steps if step not in torn}
        kept = {*files, *map(_marker, whole)} - set(map(_marker, torn))
        gone = sorted(set(self._sent) - kept, key=lambda name: COMMITTED not in name)
        if self._sent.get(CONFIG) and self._changed(files, CONFIG):
            first = gone
        else:  # of what comes after the newest one here, results may no longer tell
            late = split_checkpoints(gone)
            first = [name for step in late if step > max(whole, default=-1) for name in late[step]]
        of_checkpoints = {name for names in steps.values() for name in names}
        for name in sorted(files):
            if name.startswith(ASIDE):
                self._put(files, name)
        self._remove(first)
        for name in sorted(set(files) - of_checkpoints - {END}):
            self._put(files, name)
        for step in sorted(whole):
            if any(self._changed(files, name) for name in steps[step]):
                self._put_checkpoint(step, files, steps[step])
        self._remove([name for name in gone if name not in first])
        if END in files:
            self._put(files, END)

    def _torn(self, files: dict[str, Path], sent: dict[str, str]) -> set[int]:
        """Steps of checkpoints that are being removed here: files are missing, and none is new."""
        here = split_checkpoints(files)
        return {
            step
            for step, names in split_checkpoints(sent).items()
            if step in here
            and not set(names) - {_marker(step)} <= set(here[step])
            and all(sent.get(name) == _state(files[name]) for name in here[step])
        }

    def _is_cleared(self, files: dict[str, Path], sent: dict[str, str]) -> bool:
        """Whether files are gone that a run never removes, as where somebody empties the cache.

        Those are its config, its results, and its newest checkpoint, if it was not set aside.
        """
        if any(name in sent and name not in files for name in (CONFIG, RESULTS)):
            return True
        whole = set(split_checkpoints(files)) - self._torn(files, sent)
        aside = {
            part.partition(".")[0]
            for name in files
            if not name.startswith("checkpoints/")
            for part in name.split("/")[:-1]
        }
        return any(
            step > max(whole, default=-1) and str(step) not in aside
            for step in split_checkpoints(sent)
            if _marker(step) in sent
        )

    def _put_checkpoint(self, step: int, files: dict[str, Path], names: list[str]) -> None:
        marker = _marker(step)
        before = split_checkpoints(self._sent).get(step, [])
        stale = {name for name in before if name not in files or self._changed(files, name)}
        self._remove([marker] * (marker in before) + sorted(stale - {marker}))
        for name in sorted(set(names) - {marker}):
            self._put(files, name)
        if marker in files:
            self._put(files, marker)
        else:  # of an orbax that writes none on a file system
            self._store.write(marker, "")
            self._sent[marker] = ""

    def _changed(self, files: dict[str, Path], name: str) -> bool:
        return name in files and _state(files[name]) != self._sent.get(name)

    def _put(self, files: dict[str, Path], name: str) -> None:
        if self._lost:
            raise StoreError(self._lost)
        state = _state(files[name])
        if state != self._sent.get(name):
            self._sent[name] = ""
            self._store.put(files[name], name)
            self._sent[name] = state
            self._write_session()

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._store.delete(name)
            self._sent.pop(name, None)
        if names:
            self._write_session()

    def _files(self) -> dict[str, Path]:
        """What belongs into the store: no locks, and nothing that is still being written."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            parts = path.relative_to(self.place).parts
            if not any(p.startswith(".") or ".orbax-checkpoint-tmp" in p for p in parts):
                with suppress(OSError):
                    if path.is_file():
                        found["/".join(parts)] = path
        return found

    # the end

    def _copy_the_rest(self) -> str:
        """Copies what is left, patiently; returns why something is, "" if nothing."""
        end = None
        while (left := self._attempt()) and not self._lost:
            end = end or time.monotonic() + PATIENCE  # since the first failure, not the first byte
            if time.monotonic() >= end:
                break
            time.sleep(PAUSE)
        return left

    def _end(self, left: str, failed: bool) -> None:
        """Ends the lease, or says what is left; a run that has failed keeps its own error."""
        if not left:
            with suppress(StoreError):
                if self._is_mine():
                    self._write_lease(ended=True)
                    if self._was_empty and not self._sent:  # it was refused: nothing of it stays
                        self._store.delete(LEASE)
            if not failed:
                print(f"{self._store.address}: all is copied up ({self.place} may be removed)")
            return
        then = "" if self._lost else ", and the same command copies it up"
        line = (
            f"{FLAG} {self._store.address} lacks the end of the run ({left}; "
            f"{counted(self._failures, 'failed attempt')}): it is in {self.place}{then}"
        )
        if failed:
            log.warning(line)
        else:
            raise StoreError(line)


@contextmanager
def _repeated(seconds: float, what: Callable[[], object]) -> Iterator[None]:
    """Does something again and again while the block lasts, in a thread."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            what()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _marker(step: int) -> str:
    return f"checkpoints/{step}/{COMMITTED}"


def _state(path: Path) -> str:
    """What tells the content of a file from any before: of a small one its hash."""
    stat = path.stat()
    if stat.st_size <= SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _parsed(text: str | None) -> dict:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
