"""Converts tables in Python to antibodies, and answers about data frames to data frames."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers.columns import CHAIN_PAIRS, chain_columns
from moe_ablm.data.regions import CHAINS
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import SingleChain
from moe_ablm.inference.output import flat

IDS = ("sequence_id", "name", "id")
SINGLE = ("sequence_aa", "sequence")  # columns of single chains, heavy or light
NOTHING = ("NAType", "NaTType", "NoneType")  # types of missing values; NaN is tested separately


class DataFrame(Protocol):
    """A data frame of pandas or polars, or a table of pyarrow."""

    @property
    def columns(self) -> Any:
        """Its columns, or their names."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...


FrameT = TypeVar("FrameT", bound=DataFrame)


def items_of(given: Any) -> list[Any]:
    """A list of chains, pairs, `SingleChain` or `Antibody` from whatever a caller passes.

    Args:
      given: one chain (a string), one pair (a tuple of two chains), one `Antibody`, several of
        these, or a table: a data frame, a dict of columns, a dict of one antibody, or a list of
        such dicts. Columns are named as in files (heavy and light, sequence_aa_heavy ..., or
        sequence; an id, cdr_mask_aa_heavy ...), in upper or lower case.

    Raises:
      UserError: `given` is none of these, or a table has no column of chains, columns of different
        lengths, or a value that is not a sequence.
    """
    if isinstance(given, (str, Antibody)) or _is_pair(given):
        return [given]
    if hasattr(given, "columns"):
        names = [str(name) for name in getattr(given, "column_names", given.columns)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"antibodies: column {twice} is there twice: rename or drop one")
    if isinstance(given, Mapping):
        if all(value is None or isinstance(value, str) for value in given.values()):
            return _antibodies([given], list(given))
        return _of_columns({str(name): list(values) for name, values in given.items()})
    if hasattr(given, "column_names"):  # pyarrow
        return _of_columns({name: given[name].to_pylist() for name in given.column_names})
    if hasattr(given, "columns"):  # pandas, polars
        return _of_columns({str(name): list(given[name]) for name in given.columns})
    if not isinstance(given, Iterable):
        raise UserError(f"antibodies: found {given!r}, expected chains, pairs or a table")
    items = list(given)
    if items and all(isinstance(item, Mapping) for item in items):
        return _antibodies(items, list(dict.fromkeys(name for item in items for name in item)))
    return items


def _is_pair(given: Any) -> bool:
    """Whether this is a pair: a tuple of two chains. A list of two strings is two single chains."""
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and all(chain is None or isinstance(chain, str) for chain in given)
    )


def _of_columns(columns: Mapping[str, list]) -> list[Any]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"antibodies: columns of different lengths {lengths}")
    rows = zip(*columns.values(), strict=True)
    return _antibodies([dict(zip(columns, row, strict=True)) for row in rows], list(columns))


def _antibodies(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Any]:
    known = {name.lower(): name for name in names}
    heavy, light = chain_columns(names)
    single = next((known[name] for name in SINGLE if name in known), None)
    if heavy is light is single is None:
        raise UserError(
            f"antibodies: a table with columns {', '.join(names)}; expected "
            f"{' or '.join(' and '.join(p) for p in CHAIN_PAIRS)}, or {SINGLE[-1]}"
        )
    identifier = next((known[name] for name in IDS if name in known), None)
    if heavy is light is None:
        return [
            SingleChain(_text(row, identifier, number, words=True), _text(row, single, number))
            for number, row in enumerate(rows, start=1)
        ]
    masks = [known.get(f"cdr_mask_aa_{chain}") for chain in CHAINS]
    return [
        Antibody(
            _text(row, identifier, number, words=True),
            _text(row, heavy, number),
            _text(row, light, number),
            cdr_masks=(_text(row, masks[0], number), _text(row, masks[1], number)),
        )
        for number, row in enumerate(rows, start=1)
    ]


def _text(row: Mapping[str, Any], column: str | None, number: int, words: bool = False) -> str:
    """A value as a string, "" if it is missing; `words` also allows numbers, as in ids."""
    value = None if column is None else row.get(column)
    if type(value).__name__ in NOTHING or value != value:  # NaN
        return ""
    if not isinstance(value, str) and not words:
        raise UserError(
            f"antibodies: row {number}, column {column}: found {value!r}, expected a sequence"
        )
    return str(value)


def is_frame(given: Any) -> bool:
    """Whether the answer about what a caller passes is a data frame.

    Raises:
      UserError: it is a data frame without rows, for which there is no answer.
    """
    if not hasattr(given, "columns"):
        return False
    if not len(given):
        raise UserError("antibodies: found a data frame without rows, expected at least one")
    return True


def renamed_by_number(antibodies: Iterable[Antibody]) -> list[Antibody]:
    """The antibodies with their numbers, from 0, as names, by which `as_frame_of` knows them."""
    return [replace(antibody, name=str(i)) for i, antibody in enumerate(antibodies)]


def as_frame_of(
    frame: FrameT, antibodies: Sequence[Antibody], table: pa.Table, alone: bool
) -> FrameT:
    """A table of answers as a data frame of the kind of the caller's.

    Args:
      frame: of the caller, of n rows; an index of pandas is kept.
      antibodies: those of its rows.
      table: any number of lines for each of `renamed_by_number`, which its `sequence_id` tells.
      alone: whether it has one line for each; then `sequence_id` is left out, so that the answers
        can be put beside the frame.
    """
    owner = owners(table)
    if alone:
        table = table.drop_columns("sequence_id")
    else:
        names = pa.array([antibodies[i].name for i in owner.tolist()], pa.string())
        table = table.set_column(0, "sequence_id", names)
    if isinstance(frame, pa.Table | pa.RecordBatch):
        return table  # type: ignore[return-value]  # of a batch a table, too
    if hasattr(frame, "iloc"):  # pandas
        return flat(table).to_pandas().set_axis(frame.index.take(owner))  # type: ignore[attr-defined]
    return type(frame)(flat(table))  # type: ignore[call-arg]  # polars reads Arrow as it is


def owners(table: pa.Table) -> np.ndarray:
    """The antibody of each line of a table about `renamed_by_number`, int64 `[lines]`."""
    return np.array(table["sequence_id"].to_pylist(), dtype=np.int64)


def to_pandas(frame: DataFrame) -> Any:
    """A data frame as that of pandas; one of pandas as it is."""
    return frame if hasattr(frame, "iloc") else frame.to_pandas()  # type: ignore[attr-defined]
