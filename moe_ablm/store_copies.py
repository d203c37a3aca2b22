"""Copies on this machine of what is read from a store, fetched again only where it has changed."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_ablm.files import address_of, locked, write_json
from moe_ablm.stores import LEASE, Gone, Store, place_of, say

COMMITTED = "commit_success.txt"  # the last file of a checkpoint in a store, as orbax has it
_STEP = re.compile(r"checkpoints/(\d+)/(.+)")
# of a run, what nobody reads who does not compute with it
_BULKY = ("checkpoints", "tensorboard", "profile", "damaged")


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
        return is_small(name)

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


def is_small(name: str) -> bool:
    """Whether a file of a run is one that is read without computing with the run."""
    return not set(name.split("/")[:-1]) & set(_BULKY)
