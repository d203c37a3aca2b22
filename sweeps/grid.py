"""Grid expressions: lists of points, a point a dict from the name of an axis to a value.

product(size=["8m", "35m"], seed=range(3))                  every size with every seed: 6 points
zip(size=["8m", "35m"], lr=[4e-4, 2e-4])                    side by side: 2 points
product(zip(size=["8m", "35m"], lr=[4e-4, 2e-4]), seed=range(3))                     6 points
where(points, lambda p: p["router"] != "dense" or p["experts"] == 1)                 a part
product(a) + product(b)                                     one after the other
"""

import builtins
import itertools
from collections.abc import Callable, Iterable

Point = dict[str, object]


def product(*grids: list[Point], **axes: Iterable) -> list[Point]:
    """Every point of each grid with every value of each axis; the last one varies fastest.

    Raises:
      ValueError: an axis appears twice.
    """
    parts = [*grids, *([{name: value} for value in values] for name, values in axes.items())]
    return [_joined(points) for points in itertools.product(*parts)]


def zip(**axes: Iterable) -> list[Point]:
    """Axes side by side: the first values make a point, the second ones, and so on.

    Raises:
      ValueError: axes of different lengths.
    """
    return [
        dict(builtins.zip(axes, values, strict=True))
        for values in builtins.zip(*axes.values(), strict=True)
    ]


def where(points: list[Point], holds: Callable[[Point], bool]) -> list[Point]:
    """The points of which something holds."""
    return [point for point in points if holds(point)]


def _joined(points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for name, value in point.items():
            if name in joined:
                raise ValueError(f"axis {name!r} appears twice")
            joined[name] = value
    return joined
