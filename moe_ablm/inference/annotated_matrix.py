"""Embeddings as AnnData, which scanpy reads: vectors in `X`, what they belong to in `obs`."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from moe_ablm.data.antibody import Antibody
from moe_ablm.errors import UserError
from moe_ablm.inference import embed
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.frames import is_frame, owners, renamed_by_number, to_pandas
from moe_ablm.inference.output import matrix_of

if TYPE_CHECKING:
    from anndata import AnnData

_NAMES = ("sequence_id", "chain", "position")  # columns that name a line


def require_anndata(what: str) -> None:
    """UserError where anndata is not installed; `what` needs it."""
    if importlib.util.find_spec("anndata") is None:
        raise UserError(f"{what} needs the package anndata: pip install 'moe_ablm[anndata]'")


def annotated(table: pa.Table) -> "AnnData":
    """AnnData of a table with one column of vectors, such as that of `inference.embed.table`.

    Returns:
      `X` float32 `[lines, D]`, the other columns in `obs`. Its index is `sequence_id`, and chain
      and position where a line has them ("mab-heavy-7"), made unique as anndata does it.
    """
    import pandas
    from anndata import AnnData
    from anndata.utils import make_index_unique

    (vectors,) = (f.name for f in table.schema if pa.types.is_fixed_size_list(f.type))
    obs = table.drop_columns(vectors).to_pandas()
    named = [obs[name].astype(str) for name in _NAMES if name in obs] or [obs.index.astype(str)]
    lines = pandas.Index(["-".join(parts) for parts in zip(*named, strict=True)])
    return AnnData(matrix_of(table[vectors]), obs=obs.set_axis(make_index_unique(lines)))


def embedded(
    engine: Engine, antibodies: Sequence[Antibody], level: str, layer: int, caller: Any
) -> "AnnData":
    """`annotated` embeddings; of a data frame of the caller `obs` has its columns, and its index.

    Args:
      engine: the model.
      antibodies: any number of them.
      level, layer: as in `inference.embed.embed`.
      caller: what the antibodies were made of, such as a data frame.
    """
    table = embed.table(engine, renamed_by_number(antibodies), level, layer)
    owner, names = owners(table), [a.name or str(i) for i, a in enumerate(antibodies, start=1)]
    frame = to_pandas(caller) if is_frame(caller) else None
    if frame is not None and frame is caller:
        names = [str(name) for name in frame.index]
    table = table.set_column(0, "sequence_id", pa.array([names[i] for i in owner], pa.string()))
    found = annotated(table)
    if frame is not None:
        beside = frame.iloc[owner].set_axis(found.obs_names)
        if "sequence_id" in beside:  # the caller's own; the index has that of the frame
            found.obs["sequence_id"] = beside["sequence_id"]
        found.obs = found.obs.join(beside[[n for n in beside if n not in found.obs]])
    return found
