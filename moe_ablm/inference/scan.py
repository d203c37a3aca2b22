"""All single mutants of an antibody, scored against the wild type."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, Row, row_of
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS, AMINO_ACIDS, FIRST_AMINO_ACID
from moe_ablm.inference.antibodies import labels
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.logits import OnePosition
from moe_ablm.inference.score import (
    masked_log_probabilities,
    scored_places,
    unmasked_log_probabilities,
)

METHODS = ("masked-marginal", "wild-type-marginal", "mutant-marginal")


def scan(
    engine: Engine, antibodies: Sequence[Antibody], method: str = "masked-marginal"
) -> list[np.ndarray]:
    """Log-odds of every amino acid against the wild type at every position.

    The scoring rules are those of ESM-1v (Meier et al. 2021, section 3): log p(mutant) - log p(wild
    type) at the position, given the sequence with the position masked ("masked-marginal"),
    unchanged ("wild-type-marginal"), or mutated ("mutant-marginal", 19 passes per residue).

    Args:
      engine: the model.
      antibodies: any number of them.
      method: one of `METHODS`.

    Returns:
      float32 `[residues, 20]` for each antibody, in the order of `AMINO_ACIDS`; 0 for the wild
      type, NaN where the wild type is none of the 20.
    """
    rows = [row_of(antibody, engine.model.layout) for antibody in antibodies]
    if method == "mutant-marginal":
        return _mutant_marginals(engine, rows)
    masked = method == "masked-marginal"
    compute = masked_log_probabilities if masked else unmasked_log_probabilities
    return [
        log_probabilities[:, AMINO_ACID_TOKENS]
        - np.take_along_axis(log_probabilities, row.tokens[row.places, None].astype(int), axis=1)
        for row, log_probabilities in zip(rows, compute(engine, rows), strict=True)
    ]


def _mutant_marginals(engine: Engine, rows: Sequence[Row]) -> list[np.ndarray]:
    log_odds = [np.full((len(row.places), len(AMINO_ACIDS)), np.nan, np.float32) for row in rows]
    copies, at, owner = [], [], []
    for i, row in enumerate(rows):
        for place in scored_places(row).tolist():
            position = row.places[place]
            wild = int(row.tokens[position]) - FIRST_AMINO_ACID
            log_odds[i][place, wild] = 0
            for mutant in sorted(set(range(len(AMINO_ACIDS))) - {wild}):
                copy = row.tokens.copy()
                copy[position] = FIRST_AMINO_ACID + mutant
                copies.append(copy)
                at.append(position)
                owner.append((i, place, wild, mutant))
    for number, log_probabilities in engine.run(OnePosition(), copies, at):
        i, place, wild, mutant = owner[number]
        odds = log_probabilities[AMINO_ACID_TOKENS]
        log_odds[i][place, mutant] = odds[mutant] - odds[wild]
    return log_odds


def passes(antibody: Antibody, method: str) -> int:
    """Number of rows that pass through the encoder for one antibody."""
    each = {"masked-marginal": 1, "wild-type-marginal": 0, "mutant-marginal": len(AMINO_ACIDS) - 1}
    return max(1, antibody.residues * each[method])


def table(antibodies: Sequence[Antibody], scores: Sequence[np.ndarray]) -> pa.Table:
    """A table with a line per mutant: wild type `residue`, `mutant`, and its log-odds `score`."""
    columns = {name: np.array(values) for name, values in labels(antibodies).items()}
    log_odds = np.concatenate(scores)
    letters = np.array(list(AMINO_ACIDS))
    # NaN: the wild type is none of the 20 amino acids, so there are no mutants
    mutants = (columns["residue"][:, None] != letters) & ~np.isnan(log_odds)
    residue, mutant = np.nonzero(mutants)
    columns = {name: values[residue] for name, values in columns.items()}
    return pa.table(columns | {"mutant": letters[mutant], "score": log_odds[mutants]})
