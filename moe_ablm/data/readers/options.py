"""How sources are read, beside their format: what the flags of every verb that reads files say."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_ablm.data.germline import HUMAN
from moe_ablm.errors import UserError

# name -> what it is, for help and for dataset cards
FORMATS = {
    "table": "CSV, TSV or parquet with a column for each chain",
    "joined": "CSV or parquet with both chains in `sequence`, a separator between them",
    "lines": "lines without a header, each with both chains and a separator, or one chain",
    "oas-paired": "OAS paired CSV",
    "oas-unpaired": "OAS unpaired CSV",
    "airr": "AIRR or Change-O rearrangement table, chains joined by `cell_id`",
    "10x": "10x contig annotations, CSV or JSON, chains joined by `barcode`",
    "fasta": "FASTA of antibody chains (`id|H` and `id|L`, or two files)",
    "protein": "FASTA of general proteins",
}


@dataclass(frozen=True)
class Reading:
    """Choices of the user.

    Attributes:
      columns: names of columns by keys of `columns.GIVEN`; None: known names.
      nucleotides: whether chains of nucleotides are refused or translated; None: translated where
        a repertoire table or FASTA holds nothing else.
      keep_flagged: keep rows that say of themselves that they are not productive, no cell, of low
        confidence or not of full length.
      dominance: how many times as abundant as the next a heavy chain must be to be its cell's.
      contigs: FASTA of the contigs of a 10x table without regions (Cell Ranger before 5).
      germlines: "human", folders of others, or several (see `germline.load_germlines`): what V
        domains are looked for by.
    """

    columns: Mapping[str, str] | None = None
    nucleotides: Literal["refuse", "translate"] | None = None
    keep_flagged: bool = False
    dominance: float = 10.0
    contigs: Path | None = None
    germlines: tuple[str, ...] = (HUMAN,)

    def __post_init__(self):
        if not self.dominance > 1:
            raise UserError(f"--dominance {self.dominance:g}: expected more than 1")


AS_USUAL = Reading()
