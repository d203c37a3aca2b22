"""Pseudo-log-likelihood of antibodies: log-probabilities of each residue given all others."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, Row, row_of
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.regions import CHAINS, region_names
from moe_ablm.data.tokenizer import MASK, is_amino_acid
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.logits import EveryPosition, OnePosition
from moe_ablm.inference.numbers import numbered_labels, regions
from moe_ablm.inference.output import in_float32

LEVELS = ("antibody", "residue")


def scored_places(row: Row) -> np.ndarray:
    """Indices, among the residues, of those that are scored: the 20 amino acids."""
    return np.flatnonzero(is_amino_acid(row.tokens[row.places]))


def masked_log_probabilities(
    engine: Engine, rows: Sequence[Row], places: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """Log-probabilities of all tokens at every residue, with only this residue masked.

    Args:
      engine: the model.
      rows: any number of them.
      places: indices of the residues to do of each row; None: all `scored_places`.

    Returns:
      float32 `[residues, V]` for each row; NaN where a residue is none of the 20 amino acids, or is
      not among `places`.
    """
    tables = [np.full((len(r.places), engine.model.spec.vocabulary), np.nan, "f4") for r in rows]
    if places is None:
        places = [scored_places(row) for row in rows]
    owner = [(i, place) for i, chosen in enumerate(places) for place in chosen]
    at = [rows[i].places[place] for i, place in owner]
    copies = [masked_copy(rows[i], place) for i, place in owner]
    for copy, log_probabilities in engine.run(OnePosition(), copies, at):
        i, place = owner[copy]
        tables[i][place] = log_probabilities
    return tables


def masked_copy(row: Row, place: int) -> np.ndarray:
    """The tokens of the row with one residue masked."""
    tokens = row.tokens.copy()
    tokens[row.places[place]] = MASK
    return tokens


def unmasked_log_probabilities(engine: Engine, rows: Sequence[Row]) -> list[np.ndarray]:
    """Like `masked_log_probabilities`, but from one pass over the row with nothing masked."""
    tables: list = [None] * len(rows)
    for i, log_probabilities in engine.run(EveryPosition(), [row.tokens for row in rows]):
        row = rows[i]
        amino_acid = is_amino_acid(row.tokens[row.places])[:, None]
        tables[i] = np.where(amino_acid, log_probabilities[row.places], np.float32(np.nan))
    return tables


def score(
    engine: Engine, antibodies: Sequence[Antibody], one_pass: bool = False
) -> list[np.ndarray]:
    """Log-likelihood of every residue given all others, in nats.

    The pseudo-log-likelihood (Salazar et al. 2020, eq. 1) is their sum.

    Args:
      engine: the model.
      antibodies: any number of them.
      one_pass: mask nothing instead of every residue in turn. This is some 200 times faster and too
        optimistic, since the model sees the residue that it predicts.

    Returns:
      float32 `[residues]` for each antibody, heavy chain first; NaN where a residue is none of the
      20 amino acids.
    """
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    compute = unmasked_log_probabilities if one_pass else masked_log_probabilities
    return [
        np.take_along_axis(log_probabilities, row.tokens[row.places, None].astype(int), axis=1)[
            :, 0
        ]
        for row, log_probabilities in zip(rows, compute(engine, rows), strict=True)
    ]


def perplexity(log_likelihoods: np.ndarray) -> float:
    """exp(-mean) of the log-likelihoods, without NaN; NaN if there are none."""
    known = log_likelihoods[~np.isnan(log_likelihoods)].astype(np.float64)
    return float(np.exp(-known.mean())) if len(known) else float("nan")


def summary(
    antibodies: Sequence[Antibody],
    scores: Sequence[np.ndarray],
    by_region: bool = False,
    germlines: Sequence[str] = (HUMAN,),
) -> dict[str, list]:
    """Columns with one value per antibody.

    They are `sequence_id`, `residues` (how many are scored), `pll` (their pseudo-log-likelihood,
    nats) and `perplexity`, the last two also for each chain. `by_region` adds `perplexity_CDRH3`
    and so on. Values are NaN where there is no such residue.
    """
    columns: dict[str, list] = {
        "sequence_id": [a.name for a in antibodies],
        "residues": [int((~np.isnan(s)).sum()) for s in scores],
    }
    chains = [np.repeat((0, 1), (len(a.heavy), len(a.light))) for a in antibodies]
    parts = {"": [np.ones(len(s), bool) for s in scores]}
    parts |= {f"_{name}": [c == i for c in chains] for i, name in enumerate(CHAINS)}
    for name, inside in parts.items():
        chosen = [s[part] for s, part in zip(scores, inside, strict=True)]
        columns[f"pll{name}"] = [
            float(np.nansum(s, dtype=np.float64)) if len(s) else float("nan") for s in chosen
        ]
        columns[f"perplexity{name}"] = [perplexity(s) for s in chosen]
    if by_region:
        cells = regions(antibodies, germlines)
        for number, name in enumerate(region_names()):
            columns[f"perplexity_{name}"] = [
                perplexity(s[cell == number]) for s, cell in zip(scores, cells, strict=True)
            ]
    return columns


def table(
    engine: Engine,
    antibodies: Sequence[Antibody],
    level: str = "antibody",
    one_pass: bool = False,
    by_region: bool = False,
    numbering: str = "imgt",
    germlines: Sequence[str] = (HUMAN,),
) -> pa.Table:
    """`summary` as a table; at level "residue" numbers, regions and `log_likelihood`."""
    scores = score(engine, antibodies, one_pass)
    if level == "antibody":
        return in_float32(summary(antibodies, scores, by_region, germlines))
    columns = numbered_labels(antibodies, numbering, germlines)
    return pa.table(columns | {"log_likelihood": np.concatenate(scores)})
