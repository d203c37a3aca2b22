"""Mutated residues of one chain, masked, beside partners that say more or less about them.

Burbach & Briney 2024, Figure 3: the masked chain with its native partner, with the partner's
mutations reverted to germline, with the partner of another antibody, and alone.
"""

from collections.abc import Sequence

import numpy as np

from moe_ablm.data.antibody import Antibody, row_of, tokens_of
from moe_ablm.data.masking import mix
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import AMINO_ACIDS, FIRST_AMINO_ACID, MASK, encode
from moe_ablm.evaluation.cohort import Annotated, Chain
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.logits import EveryPosition

PARTNERS = ("native", "reverted", "random", "none")
# what is summed over the masked residues of an antibody; probabilities of the residue that is
# there, of the germline's, of any amino acid but those two
SUMS = ("cross_entropy", "mutated", "germline", "other", "residues")


def mutated_places(chain: Chain) -> np.ndarray:
    """Indices of the residues that are mutated and whose germline residue is known, int64 `[m]`."""
    differs = encode_letters(chain.letters) != encode_letters(chain.germline)
    return np.flatnonzero((chain.mutated > 0) & differs)


def encode_letters(letters: str) -> np.ndarray:
    """Tokens of amino acids, uint8 `[n]`."""
    return encode(np.frombuffer(letters.encode(), np.uint8))


def other(masked: str) -> str:
    """Name of the chain that is the partner of `masked`."""
    return CHAINS[1 - CHAINS.index(masked)]


def random_partners(
    everyone: Sequence[Annotated], masked: str, longest: int, seed: int
) -> list[int | None]:
    """For each pair another one, whose chain becomes the partner of its chain `masked`.

    Drawn by a hash of both records (rendezvous hashing), so that it depends neither on the model
    nor on who else is there. Never of the same clonal cluster, never with the same sequence.

    Args:
      everyone: pairs.
      masked: "heavy" or "light".
      longest: most residues of the two chains.
      seed: of the draw.

    Returns:
      Numbers of antibodies; None where no other one qualifies.
    """
    letters = [getattr(a, other(masked)).letters for a in everyone]
    keys = np.array([a.key for a in everyone], np.uint64)
    _, units = np.unique([a.unit for a in everyone], return_inverse=True)
    _, sequences = np.unique(letters, return_inverse=True)
    lengths = np.array([len(text) for text in letters])
    drawn: list[int | None] = []
    for i, annotated in enumerate(everyone):
        room = longest - len(getattr(annotated, masked))
        fits = (units != units[i]) & (sequences != sequences[i]) & (lengths <= room)
        at = np.flatnonzero(fits)
        with np.errstate(over="ignore"):
            of_seed = mix(np.asarray(seed + CHAINS.index(masked), np.uint64))
            salt = mix(keys[i : i + 1] + of_seed)
            order = mix(keys[at] ^ salt)
        drawn.append(int(at[order.argmin()]) if len(at) else None)
    return drawn


def partner_letters(
    everyone: Sequence[Annotated], masked: str, partner: str, drawn: Sequence[int | None]
) -> list[str | None]:
    """Sequence beside each masked chain: "" for none, None where there is no random partner."""
    beside = [getattr(a, other(masked)) for a in everyone]
    if partner == "random":
        return [None if j is None else beside[j].letters for j in drawn]
    known = {"native": "letters", "reverted": "germline"}
    return [getattr(chain, known[partner]) if partner in known else "" for chain in beside]


def masked_sums(
    subject: Subject, everyone: Sequence[Annotated], masked: str, partners: Sequence[str | None]
) -> np.ndarray:
    """Predictions where all mutated residues of a chain are masked at once.

    Args:
      subject: the model.
      everyone: antibodies.
      masked: "heavy" or "light".
      partners: the other chain of each; None: left out.

    Returns:
      float64 `[n, 5]`, sums over the masked residues of each antibody, as `SUMS`: minus
      log-probability in nats, probabilities, and their number.
    """
    kept, rows, at = [], [], []
    for i, beside in enumerate(partners):
        if beside is None:
            continue
        own = getattr(everyone[i], masked)
        pair = (own.letters, beside) if masked == "heavy" else (beside, own.letters)
        row = row_of(Antibody(everyone[i].name, *pair), subject.engine.model.layout)
        first = 0 if masked == "heavy" else len(beside)
        kept.append(i)
        at.append(row.places[first + mutated_places(own)])
        tokens = row.tokens.copy()
        tokens[at[-1]] = MASK
        rows.append(tokens)
    sums = np.zeros((len(everyone), len(SUMS)))
    for number, log_probabilities in subject.engine.run(EveryPosition(), rows):
        own = getattr(everyone[kept[number]], masked)
        sums[kept[number]] = _sums(log_probabilities[at[number]].astype(np.float64), own)
    return sums


def _sums(log_probabilities: np.ndarray, chain: Chain) -> np.ndarray:
    """`SUMS` from float64 `[m, V]` at the mutated residues of a chain."""
    places, index = mutated_places(chain), np.arange(len(log_probabilities))
    truth, germline = (encode_letters(s)[places] for s in (chain.letters, chain.germline))
    probabilities = np.exp(log_probabilities)
    mutated, reverted = probabilities[index, truth], probabilities[index, germline]
    any_amino_acid = probabilities[:, FIRST_AMINO_ACID:][:, : len(AMINO_ACIDS)].sum(1)
    others = any_amino_acid - mutated - reverted
    loss = -log_probabilities[index, truth]
    return np.array([*(x.sum() for x in (loss, mutated, reverted, others)), len(places)])


def room(subject: Subject) -> int:
    """Most residues of a pair that the model reads."""
    model = subject.engine.model
    return model.length - (tokens_of(Antibody("", "A", "A"), model.layout) - 2)
