"""Completion of masked residues, with the most probable residues or with draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.germline import HUMAN
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS, AMINO_ACIDS, FIRST_AMINO_ACID, MASK, MASKED
from moe_ablm.inference.antibodies import LETTERS
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.inference.numbers import numbered_labels
from moe_ablm.inference.output import in_float32
from moe_ablm.inference.sampling import Sampling

INFILLED = LETTERS + MASKED  # letters that `infill` reads
LEVELS = ("antibody", "residue")


@dataclass(frozen=True)
class Filled:
    """A residue that was filled in.

    Attributes:
      place: index among the residues, heavy chain first.
      residue: the new residue.
      probability: its probability among the 20 amino acids, given all residues filled in before.
      candidates: (residue, probability) of the `Sampling.top` most probable ones, best first.
    """

    place: int
    residue: str
    probability: float
    candidates: tuple[tuple[str, float], ...]


@dataclass
class Completion:
    """An antibody without masks, and the steps that filled it in.

    Attributes:
      antibody: the completed antibody.
      sample: number of the completion, from 0, among those of the same antibody.
      filled: the residues, in the order in which they were filled in.
    """

    antibody: Antibody
    sample: int
    filled: list[Filled] = field(default_factory=list)

    @property
    def log_probability(self) -> float:
        """Sum of the log-probabilities of the residues filled in, in nats."""
        return float(sum(np.log(f.probability) for f in self.filled))


def infill(
    engine: Engine, antibodies: Sequence[Antibody], sampling: Sampling | None = None
) -> list[Completion]:
    """Fills in all `MASKED` residues of each antibody one at a time, the most certain one first.

    Args:
      engine: the model.
      antibodies: with masked residues.
      sampling: how residues are chosen; None: the defaults of `Sampling`.

    Returns:
      `max(samples, 1)` completions of each antibody, in the order of the antibodies.
    """
    sampling = sampling or Sampling()
    done, rows, draws = [], [], []
    for antibody in antibodies:
        row = row_of(antibody, engine.model.layout)
        for sample in range(max(sampling.samples, 1)):
            done.append(Completion(antibody, sample))
            rows.append((row.tokens.copy(), row.places))
            draws.append(_generator(row.tokens, sample, sampling.seed))
    open_rows = [i for i, (tokens, _) in enumerate(rows) if (tokens == MASK).any()]
    while open_rows:
        for number, log_probabilities in engine.run(
            EveryPosition(), [rows[i][0] for i in open_rows]
        ):
            i = open_rows[number]
            tokens, places = rows[i]
            masked = np.flatnonzero(tokens[places] == MASK)
            draw = draws[i] if sampling.samples else None
            filled = _fill_one(
                log_probabilities[places[masked], AMINO_ACID_TOKENS], masked, sampling, draw
            )
            tokens[places[filled.place]] = FIRST_AMINO_ACID + AMINO_ACIDS.index(filled.residue)
            done[i].filled.append(filled)
        open_rows = [i for i in open_rows if (rows[i][0] == MASK).any()]
    for completion in done:
        completion.antibody = _completed(completion)
    return done


def _generator(tokens: np.ndarray, sample: int, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(tokens.tobytes()).digest()
    words = np.frombuffer(digest, "<u4").tolist()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample, *words])))


def _fill_one(
    log_probabilities: np.ndarray,
    masked: np.ndarray,
    sampling: Sampling,
    draw: np.random.Generator | None,
) -> Filled:
    """Chooses a place and its residue from log-probabilities `[masked, 20]`.

    `masked` has the places; `draw` None takes the most probable residue.
    """
    logits = log_probabilities.astype(np.float64)
    probabilities = _softmax(logits)
    which = int(np.argmax(probabilities.max(1)))
    chosen = int(np.argmax(probabilities[which]))
    if draw is not None:
        levels = np.cumsum(_softmax(logits[which] / sampling.temperature))
        chosen = int(np.searchsorted(levels, draw.random() * levels[-1], side="right"))
        chosen = min(chosen, len(AMINO_ACIDS) - 1)
    best = np.argsort(-probabilities[which], kind="stable")[: sampling.top]
    candidates = tuple((AMINO_ACIDS[b], float(probabilities[which, b])) for b in best)
    probability = float(probabilities[which, chosen])
    return Filled(int(masked[which]), AMINO_ACIDS[chosen], probability, candidates)


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _completed(completion: Completion) -> Antibody:
    antibody = completion.antibody
    letters = list(antibody.heavy + antibody.light)
    for filled in completion.filled:
        letters[filled.place] = filled.residue
    cut = len(antibody.heavy)
    return replace(antibody, heavy="".join(letters[:cut]), light="".join(letters[cut:]))


def table(
    engine: Engine,
    antibodies: Sequence[Antibody],
    level: str,
    sampling: Sampling,
    numbering: str = "imgt",
    germlines: Sequence[str] = (HUMAN,),
) -> pa.Table:
    """A table of the completed chains, or at level "residue" of the residues and candidates."""
    done = infill(engine, antibodies, sampling)
    if level == "antibody":
        return in_float32(
            {
                "sequence_id": [c.antibody.name for c in done],
                "sample": [c.sample for c in done],
                "heavy": [c.antibody.heavy for c in done],
                "light": [c.antibody.light for c in done],
                "filled": [len(c.filled) for c in done],
                "log_probability": [c.log_probability for c in done],
            }
        )
    each = [(c, f) for c in done for f in c.filled]
    labels = numbered_labels([c.antibody for c in done], numbering, germlines)
    first = np.cumsum([0] + [c.antibody.residues for c in done])
    line = [int(first[i]) + f.place for i, c in enumerate(done) for f in c.filled]
    columns = {
        "sequence_id": pa.array([c.antibody.name for c, _ in each], pa.string()),
        "sample": pa.array([c.sample for c, _ in each], pa.int64()),
    }
    for name in ("chain", "position", "residue", "number", "region"):
        kind = pa.int64() if name == "position" else pa.string()
        columns[name] = pa.array([labels[name][i] for i in line], kind)
    columns["probability"] = pa.array([f.probability for _, f in each], pa.float64())
    for rank in range(sampling.top):
        best = [f.candidates[rank] for _, f in each]
        columns[f"candidate_{rank + 1}"] = pa.array([b for b, _ in best], pa.string())
        columns[f"probability_{rank + 1}"] = pa.array([p for _, p in best], pa.float64())
    return in_float32(columns)
