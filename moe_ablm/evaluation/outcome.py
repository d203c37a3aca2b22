"""The result of an evaluation, and `Skipped`, where it cannot be done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from moe_ablm.evaluation.estimates import Number, Sample


class Skipped(Exception):
    """An evaluation that these data or this model do not allow; the message says why."""


@dataclass(frozen=True)
class Table:
    """How numbers are laid out for a reader.

    Attributes:
      title: with units.
      metrics: those shown; several become columns.
      rows: labels that make a line, in the order of their first appearance.
      columns: label whose values become columns, or "".
      where: labels that a number must have to be shown here.
    """

    title: str
    metrics: tuple[str, ...]
    rows: tuple[str, ...] = ()
    columns: str = ""
    where: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Picture:
    """A figure: `name` for its file, `caption` for a reader, `draw` makes it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Outcome:
    """Results of one evaluation.

    Attributes:
      samples: means with every antibody's part.
      numbers: results of another form, with intervals of their own.
      tables: what of them is shown.
      pictures: figures.
      notes: what a reader must know: how many antibodies, what was left out and why.
    """

    samples: Sequence[Sample] = ()
    numbers: Sequence[Number] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = field(default_factory=tuple)
