"""ESM-2's vocabulary and the layouts in which a heavy and a light chain become one row.

The 33 tokens stand in the order of facebookresearch/esm (`Alphabet.from_architecture("ESM-1b")`),
so that weights move between ESM-2 and this package without a permutation.
"""

from dataclasses import dataclass, field

import numpy as np

VOCABULARY = (
    ("<cls>", "<pad>", "<eos>", "<unk>")
    + tuple("LAGVSERTIDPKQNFYMHWCXBUZO.-")
    + ("<null_1>", "<mask>")
)
CLS, PAD, EOS, UNK = range(4)
MASK = VOCABULARY.index("<mask>")
NULL = VOCABULARY.index("<null_1>")
MASKED = "_"  # letter of a masked residue
AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
FIRST_AMINO_ACID = VOCABULARY.index(AMINO_ACIDS[0])
AMINO_ACID_TOKENS = slice(FIRST_AMINO_ACID, FIRST_AMINO_ACID + len(AMINO_ACIDS))

_INVALID = 255
_ENCODE = np.full(256, _INVALID, np.uint8)
for _i, _letter in enumerate(AMINO_ACIDS):
    _ENCODE[ord(_letter)] = FIRST_AMINO_ACID + _i
_DECODE = np.frombuffer("".join(t if len(t) == 1 else "?" for t in VOCABULARY).encode(), np.uint8)


@dataclass(frozen=True)
class Layout:
    """Special tokens around the chains: `before H between L after`, or `before X after` for one.

    `lone_light`: as many instead of `before` where a light chain stands alone; (): `before`.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    # not in the repr, by which models are known: layouts of ours have none
    lone_light: tuple[int, ...] = field(default=(), repr=False)


LAYOUTS = {
    # ft-ESM and the AbLM scaling study: <cls> H <cls><cls> L <eos>
    "esm": Layout((CLS,), (CLS, CLS), (EOS,)),
    # BALM (RoBERTa style): <s> H </s> L </s>
    "balm": Layout((CLS,), (EOS,), (EOS,)),
    # one dedicated separator token that means nothing else
    "sep": Layout((CLS,), (NULL,), (EOS,)),
}


def encode(letters: np.ndarray) -> np.ndarray:
    """ASCII codes of amino acids (uint8, any shape) to token ids; other letters give 255."""
    return _ENCODE[letters]


def invalid(letters: np.ndarray) -> np.ndarray:
    """Mask of the ASCII codes that are none of the 20 amino-acid letters (upper case)."""
    return _ENCODE[letters] == _INVALID


def is_amino_acid(tokens: np.ndarray) -> np.ndarray:
    """Mask of the token ids that are one of the 20 amino acids, any shape."""
    return (tokens >= FIRST_AMINO_ACID) & (tokens < FIRST_AMINO_ACID + len(AMINO_ACIDS))


def decode(tokens: np.ndarray) -> str:
    """Token ids of one chain `[n]` to letters; special tokens become '?'."""
    return _DECODE[np.asarray(tokens, np.uint8)].tobytes().decode()
