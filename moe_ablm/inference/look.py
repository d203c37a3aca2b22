"""One antibody seen through a model, all at once: what the page of `moe-ablm app` shows."""

from dataclasses import dataclass

import numpy as np

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.positions import selection
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS
from moe_ablm.errors import UserError
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.infill import infill
from moe_ablm.inference.numbers import chosen, masked, nothing_chosen, numbered_labels
from moe_ablm.inference.route import Choices, route
from moe_ablm.inference.sampling import Sampling
from moe_ablm.inference.score import masked_log_probabilities, unmasked_log_probabilities


@dataclass(frozen=True)
class Seen:
    """What a model says of an antibody; R residues, heavy chain first, M layers with experts.

    Attributes:
      labels: columns of `inference.numbers.numbered_labels`, lists of R.
      log_likelihoods: float32 `[R]`, nats; NaN where a residue is none of the 20 amino acids.
      log_odds: float32 `[R, 20]` of each amino acid against the residue.
      experts: int `[R, M]`, the one of the largest weight, -1 for none; None: a dense model.
      layers: numbers of the layers with experts.
    """

    labels: dict[str, list]
    log_likelihoods: np.ndarray
    log_odds: np.ndarray
    experts: np.ndarray | None
    layers: tuple[int, ...]


def look(engine: Engine, antibody: Antibody, numbering: str, one_pass: bool = False) -> Seen:
    """Everything the page shows of an antibody, before any infilling.

    Perplexity and scan come from the same passes: each residue masked in turn, or none with
    `one_pass`.
    """
    row = row_of(antibody, engine.model.layout)
    compute = unmasked_log_probabilities if one_pass else masked_log_probabilities
    (found,) = compute(engine, [row])
    own = np.take_along_axis(found, row.tokens[row.places, None].astype(int), axis=1)
    return Seen(
        numbered_labels([antibody], numbering, engine.germlines),
        own[:, 0],
        found[:, AMINO_ACID_TOKENS] - own,
        strongest(engine, antibody) if engine.model.spec.moe_layers else None,
        tuple(engine.model.spec.moe_layers),
    )


def strongest(engine: Engine, antibody: Antibody) -> np.ndarray:
    """The expert of the largest weight of each residue and layer, int `[R, M]`; -1 for none."""
    (routing,) = route(engine, [antibody])
    if not isinstance(routing, Choices):
        return routing.combine.sum(-1).argmax(-1)
    best = routing.gates.argmax(-1)[..., None]
    expert = np.take_along_axis(routing.experts, best, axis=-1)[..., 0]
    taken = np.take_along_axis(routing.gates, best, axis=-1)[..., 0] > 0
    return np.where(taken, expert, -1)


def completions(
    engine: Engine, antibody: Antibody, where: str, numbering: str, samples: int
) -> list[list[str]]:
    """Rows of the chosen residues redesigned, and the log-probability; the first is the likeliest.

    Args:
      engine: the model.
      antibody: whose residues are masked.
      where: regions and positions, "CDRH3" or "H105-H117,CDRL3".
      numbering: scheme of the positions.
      samples: draws after the first.

    Raises:
      UserError: nothing is chosen, or a name is none.
    """
    parts = [part.strip() for part in where.split(",") if part.strip()]
    regions = [part for part in parts if part.upper().startswith(("CDR", "FR"))]
    positions = [part for part in parts if part not in regions]
    picked = selection(regions or None, positions or None, numbering, engine.germlines)
    if picked is None:
        raise UserError("nothing to redesign: name regions or positions, CDRH3 or H105-H117")
    if reason := nothing_chosen(antibody, picked):
        raise UserError(reason)
    places = np.flatnonzero(chosen(antibody, picked))
    hidden = [masked(antibody, picked)]
    found = infill(engine, hidden) + infill(engine, hidden, Sampling(samples))
    rows = []
    for completion in found if samples else found[:1]:
        letters = completion.antibody.heavy + completion.antibody.light
        text = "".join(letters[place] for place in places)
        rows.append([text, f"{completion.log_probability:.2f}"])
    return rows
