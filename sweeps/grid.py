"""Grid expressions: lists of points, each a dict from the name of an axis to a value.

product(size=["8m", "35m"], seed=range(3))                  every size with every seed: 6 points
product([{"size": "8m", "lr": 4e-4}, {"size": "35m", "lr": 2e-4}], seed=range(3))    6 points
[p for p in points if p["router"] != "dense" or p["experts"] == 1]                   a part
product(a) + product(b)                                     one after the other
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Point = dict[str, object]


@dataclass(frozen=True)
class Recipe:
    """The config of a point.

    Attributes:
      config: config file, relative to the repository.
      argument: of the config file, what stands after the colon.
      overrides: value by dotted config key.
    """

    config: str
    argument: str = ""
    overrides: Mapping[str, object] = field(default_factory=dict)


def product(*grids: list[Point], **axes: Iterable) -> list[Point]:
    """Every point of each grid with every value of each axis; the last one varies fastest.

    Raises:
      ValueError: an axis appears twice.
    """
    parts = [*grids, *([{name: value} for value in values] for name, values in axes.items())]
    return [_joined(points) for points in itertools.product(*parts)]


def _joined(points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for name, value in point.items():
            if name in joined:
                raise ValueError(f"axis {name!r} appears twice")
            joined[name] = value
    return joined
