"""A run on disk: who owns a work directory and what it holds."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moe_ablm import config as configs
from moe_ablm import outcome
from moe_ablm.config_schema import Config
from moe_ablm.errors import UserError
from moe_ablm.extension import Extension, set_aside
from moe_ablm.files import locked, write_json

log = logging.getLogger(__name__)
PATIENCE = 1.0  # seconds for which another process may hold the lock


@contextmanager
def work_directory(
    workdir: Path,
    config: Config,
    dataset: str,
    licence: str | None = None,
    extension: Extension | None = None,
) -> Iterator[None]:
    """Takes a work directory for one process; makes it, with `config.json`, when it is new.

    Args:
      workdir: the directory.
      config: of the run.
      dataset: identity of its data.
      licence: of the weights that it starts from, for the model cards of its exports.
      extension: by which the shorter run that is there becomes this one.

    Raises:
      UserError: it holds a different run (the differing keys are named), is in use, or is no
        place to write.
    """
    _check_same_run(workdir, extension.before if extension else config, dataset)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    with ExitStack() as stack:
        _lock(stack, workdir)
        if extension and extension.before != extension.config:
            set_aside(workdir, extension)
        content = {
            "fingerprint": configs.fingerprint(config, dataset),
            "dataset": dataset,
            "licence": licence,
            "config": configs.to_dict(config),
        }
        write_json(workdir / "config.json", content)
        yield


def _lock(stack: ExitStack, workdir: Path) -> None:
    """Locks a work directory; patient, since `sweeps.status` holds the lock while it looks."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            stack.enter_context(locked(workdir / ".lock"))
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise UserError(f"--workdir {workdir} is in use by another process") from error
        except OSError as error:
            raise UserError(
                f"--workdir {workdir} cannot be locked ({error.strerror}): use a file system with "
                "flock"
            ) from error
        time.sleep(0.05)


def _check_same_run(workdir: Path, config: Config, dataset: str) -> None:
    file = workdir / "config.json"
    if not file.exists():
        _check_own(workdir)
        return
    try:
        content = json.loads(file.read_text())
        before = configs.identity(configs.from_mapping(content["config"]), content["dataset"])
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{file} cannot be read ({error}): use another --workdir") from error
    now = configs.identity(config, dataset)
    differing = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        keys = {line.partition(":")[0] for line in differing}
        longer = max(before["train.steps"], now["train.steps"])
        extend = f", or --extend-to={longer}" if keys <= {"train.steps", "train.restarts"} else ""
        raise UserError(
            f"--workdir {workdir} holds a different run ({'; '.join(differing)}): "
            f"use another --workdir{extend}"
        )


def _check_own(workdir: Path) -> None:
    """Refuses to mix a new run with what somebody else put there; hidden files are locks."""
    if not workdir.is_dir():
        return
    foreign = sorted(p.name for p in workdir.iterdir() if not p.name.startswith("."))
    if foreign:
        raise UserError(
            f"--workdir {workdir} is no run (it has no config.json), but holds "
            f"{', '.join(foreign[:3])}{' ...' if foreign[3:] else ''}: name a new or an empty "
            "directory"
        )


def finished_run(workdir: Path, fingerprint: str) -> dict | None:
    """The content of `run.json` if the run is complete, None if there is more to do.

    A damaged `run.json`, or that of another run, counts as none, with a warning: the checkpoints
    tell the rest.
    """
    file = workdir / "run.json"
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if content["fingerprint"] != fingerprint:
            raise ValueError(f"it is of run {content['fingerprint']!r}, not {fingerprint}")
        complete = content["status"] == outcome.COMPLETE
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): writing it again", file, error)
        complete = False
    if not complete:
        file.unlink()
        return None
    return content
