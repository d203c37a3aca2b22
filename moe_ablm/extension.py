"""A run that goes on beyond its last update (`--extend-to`).

With a constant rate the longer run is the shorter one and more; under "wsd" the two part where the
shorter one begins to decay, and the checkpoint of that update is kept. From there a run is extended
exactly: it ends, bit for bit, as one that was as long from the start, and has its fingerprint.
Other schedules have reached a rate of 0. There the schedule begins anew (`train.restarts`), which
is another run than a long one from the start, and its fingerprint says so.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from moe_ablm import config as configs
from moe_ablm import outcome
from moe_ablm.config_schema import Config
from moe_ablm.data.mixture import parse_regime
from moe_ablm.errors import UserError
from moe_ablm.results import SHORTER
from moe_ablm.training.tracking import STATE as SENT


@dataclass(frozen=True)
class Extension:
    """What is to be done with the run of a work directory.

    Attributes:
      before: the run that is there.
      config: the run that it becomes.
      back_to: checkpoint with which to go on; those after it are set aside. None: the newest.
      note: a line for the user; empty where there is nothing to say.
    """

    before: Config
    config: Config
    back_to: int | None = None
    note: str = ""


def plan_extension(given: Config, workdir: Path, steps: int) -> Extension:
    """How the run of a work directory comes to have `steps` updates.

    Args:
      given: the config of the command line; its `train.steps` and `train.restarts` do not matter.
      workdir: of the run.
      steps: `train.steps` of the longer run. That of the run itself: it is extended already, and
        just goes on.

    Raises:
      UserError: there is no such run, it is not shorter, or it cannot be extended.
    """
    asked = f"--extend-to {steps}: {workdir}"
    there = _stored(workdir, asked)
    before = _with(given, there.train.steps, there.train.restarts)
    if steps == there.train.steps:
        return Extension(before, before)
    if steps < there.train.steps:
        raise UserError(f"{asked} has {there.train.steps} updates: expected more")
    if parse_regime(before.data.regime).kind == "curriculum":
        raise UserError(
            f"{asked} has data.regime={before.data.regime!r}, whose course is spread over all "
            "train.steps: train a new run in another --workdir"
        )
    newest = _newest(workdir, asked)
    _check_ended_by_its_steps(workdir, there.train.steps, asked)
    longer = _with(before, steps, before.train.restarts)
    parting = before.train.decay_start if before.train.schedule == "wsd" else None
    if before.train.schedule == "constant":
        return Extension(before, longer)
    if parting is not None and (newest <= parting or _has(workdir, parting)):
        note = f"going on from step {parting}, where the rate of the shorter run began to fall"
        return Extension(before, longer, parting, note if newest > parting else "")
    if newest < there.train.steps:
        raise UserError(
            f"{asked} is at step {newest} of {there.train.steps}: let it end first (the same "
            "command without --extend-to)"
        )
    restarts = (*before.train.restarts, there.train.steps)
    note = (
        f"the rate of {before.train.schedule!r} fell to 0 at step {there.train.steps}: it rises "
        f"again over train.warmup={before.train.warmup} updates and falls to 0 at step {steps} "
        f"(train.restarts={restarts}); a run of {steps} updates from the start ends elsewhere"
    )
    return Extension(before, _with(before, steps, restarts), note=note)


def set_aside(workdir: Path, extension: Extension) -> None:
    """Keeps what the shorter run left in `ended-at-STEPS/`, a run of its own for those who read it.

    It moves `run.json` and checkpoints that the longer run does not have. Interrupted, it can be
    repeated as long as `config.json` is that of the shorter run.
    """
    aside = workdir / f"{SHORTER}{extension.before.train.steps}"
    aside.mkdir(exist_ok=True)
    for name in ("config.json", "results.jsonl"):
        if (workdir / name).exists():
            shutil.copy(workdir / name, aside / name)
    if (workdir / "run.json").exists():
        (workdir / "run.json").replace(aside / "run.json")
    if extension.back_to is None:
        return
    (aside / "checkpoints").mkdir(exist_ok=True)
    dropped = [step for step in _steps(workdir) if step > extension.back_to]
    if dropped and (workdir / SENT).exists():
        # a tracker takes no update back: the longer run becomes a run of its own there
        (workdir / SENT).replace(aside / SENT)
    for step in dropped:
        target = aside / "checkpoints" / str(step)
        # of a copy from a store, to which this was going up when it was broken off
        shutil.rmtree(target, ignore_errors=True)
        (workdir / "checkpoints" / str(step)).rename(target)


def _stored(workdir: Path, asked: str) -> Config:
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{asked} holds no run to extend (it has no config.json)")
    try:
        return configs.from_mapping(json.loads(file.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{asked}: config.json cannot be read ({error})") from error


def _with(config: Config, steps: int, restarts: tuple[int, ...]) -> Config:
    """The config with another length; UserError where its other keys do not allow that."""
    train = dataclasses.replace(config.train, steps=steps, restarts=restarts)
    return configs.from_mapping(configs.to_dict(dataclasses.replace(config, train=train)))


def _check_ended_by_its_steps(workdir: Path, steps: int, asked: str) -> None:
    try:
        run = json.loads((workdir / "run.json").read_text())
        status, step = run["status"], run["step"]
    except FileNotFoundError:
        return  # it has not ended
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{asked}: run.json cannot be read ({error})") from error
    if status in outcome.FINAL or (status == outcome.COMPLETE and step < steps):
        why = "train.patience" if status == outcome.COMPLETE else f"its status, {status}"
        raise UserError(
            f"{asked} ended at step {step} of {steps} by {why}: more steps would not change that; "
            "change what ended it and train in another --workdir"
        )


def _steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def _has(workdir: Path, step: int) -> bool:
    return step in _steps(workdir)


def _newest(workdir: Path, asked: str) -> int:
    steps = _steps(workdir)
    if not steps:
        raise UserError(f"{asked} has no checkpoint yet: let it run first")
    return steps[-1]
