"""Points of a grid -> cells: command, checked config, fingerprint, name, cost.

A cell's config is parsed from its command line by the trainer's own rules, so that the fingerprint
is the one that the trainer will write.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.base import get_config
from launch.cell import Cell, config_of
from moe_ablm import config as configs
from moe_ablm.config_schema import Config
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.errors import UserError
from moe_ablm.feed import Feed
from moe_ablm.model import flops
from moe_ablm.model.families import RowShape
from moe_ablm.store_copies import fetched
from sweeps.grid import Point, Recipe
from sweeps.planned import Planned

_COUNTED_STEPS = 200  # enough to know the tokens of a step
# any: what is drawn does not depend on it
_MODEL = configs.from_mapping(get_config()).model
_NAME = 80  # longest part of a cell's name before the fingerprint


def plan(
    points: Iterable[Point],
    recipe: Callable[[Point], Recipe],
    out: Path,
    extra: Sequence[str] = (),
    tuned: Callable[[Planned], Mapping[str, object]] = lambda _: {},
) -> tuple[list[Planned], list[str]]:
    """Cells of the points under the folder `out`, in their order, and lines to print.

    Args:
      points: of the grid.
      recipe: makes a point a config.
      out: folder of the sweep.
      extra: `--config.KEY=VALUE` for every cell; those of its recipe come after them.
      tuned: what the size and tokens of a cell decide, by config key.

    Raises:
      UserError: a config or its dataset is wrong; the message names the cell.
    """
    made: dict[str, Planned] = {}
    twins = []
    for point in points:
        axes = {name: str(value) for name, value in point.items()}
        label = _label(point)
        try:
            config = recipe(point)
            planned = _planned(label, axes, config, out, extra)
            if more := tuned(planned):
                config = replace(config, overrides={**config.overrides, **more})
                planned = _planned(label, axes, config, out, extra)
        except UserError as error:
            raise UserError(f"cell {label}: {error}") from error
        first = made.setdefault(planned.cell.fingerprint, planned)
        if first is not planned:
            twins.append(f"{label} is the same run as {first.cell.name} and left out")
    return list(made.values()), twins


def _label(point: Point) -> str:
    """Values joined; numbers with the names of their axes, at the end."""
    words = [str(v) for v in point.values() if not isinstance(v, int)]
    return "-".join(words + [f"{n}{v}" for n, v in point.items() if isinstance(v, int)])


def _planned(
    label: str, axes: dict[str, str], recipe: Recipe, out: Path, extra: Sequence[str]
) -> Planned:
    file = f"{recipe.config}:{recipe.argument}" if recipe.argument else recipe.config
    own = [f"--config.{key}={value}" for key, value in recipe.overrides.items()]
    _require_apart(recipe.overrides, extra)
    argv = ["-m", "moe_ablm.train", f"--config={file}", *extra, *own]
    config = config_of(argv)
    steps = min(config.train.steps, _COUNTED_STEPS)
    # what does not change the counts is made the same, so that few feeds are built
    data = _data(replace(config, seed=0, model=_MODEL, train=replace(config.train, steps=steps)))
    fingerprint = configs.fingerprint(config, data.identity)
    name = re.sub(r"[^A-Za-z0-9.=-]", ".", label)[:_NAME].strip(".-=") + f"-{fingerprint[:8]}"
    workdir = out.resolve() / name
    spec = config.model.spec()
    tokens = data.tokens_per_step * config.train.steps
    cell = Cell(
        name=name,
        argv=(*argv, f"--workdir={workdir}"),
        workdir=workdir,
        fingerprint=fingerprint,
        tokens=tokens,
        flops=tokens * flops.train_flops_per_token(spec, data.row),
    )
    return Planned(
        cell=cell,
        axes=axes,
        steps=config.train.steps,
        seed=config.seed,
        params_total=flops.params_total(spec),
        params_active=flops.params_active(spec),
        experts=spec.moe.experts if spec.moe else 1,
        router=config.model.moe.router,
        corpus_tokens=data.corpus_tokens,
        unique_tokens=data.unique_tokens,
    )


def _require_apart(own: Mapping[str, object], extra: Sequence[str]) -> None:
    """UserError where `--config.KEY` would be lost, since the study sets the key itself.

    The schedule is an exception: cells of other lengths derive theirs from what is given.
    """
    for argument in extra:
        key = argument.partition("=")[0].removeprefix("--config.")
        if key in own and key not in ("train.steps", "train.warmup"):
            raise UserError(f"--config.{key} is what this study varies: leave it out")


@dataclass(frozen=True)
class _Data:
    identity: str
    corpus_tokens: int
    unique_tokens: int
    row: RowShape
    tokens_per_step: float


@functools.lru_cache(maxsize=1024)
def _data(config: Config) -> _Data:
    """What a run draws from."""
    paths = config.data.path or simulated_dataset(config.data.simulated_pairs)
    feed = Feed(config, *map(_open, paths if isinstance(paths, tuple) else (paths,)))
    steps = config.train.steps
    return _Data(
        identity=feed.identity,
        corpus_tokens=feed.corpus_tokens,
        unique_tokens=feed.mixture.unique_tokens(),
        row=feed.row,
        tokens_per_step=feed.mixture.epochs(steps) * feed.corpus_tokens / steps,
    )


@functools.lru_cache(maxsize=32)
def _open(path: str | Path) -> Dataset:
    return Dataset(fetched(path, "config.data.path"))


def unplanned_flags(rest: Sequence[str]) -> list[str]:
    """The arguments that argparse did not know: overrides of config keys.

    Raises:
      UserError: something is not `--config.KEY=VALUE`.
    """
    for argument in rest:
        key, equals, _ = argument.partition("=")
        if not re.fullmatch(r"--config(\.\w+)+", key) or not equals:
            raise UserError(
                f"{argument!r} is not understood: expected one of the options of --help, or "
                "--config.KEY=VALUE for every cell"
            )
        if option := {"--config.seed": "--seeds", "--config.data.path": "--data"}.get(key):
            raise UserError(f"{key} is the sweep's own: use {option}")
    return list(rest)
