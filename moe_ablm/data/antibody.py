"""An antibody as letters, and the row of tokens in which the encoder reads its chains."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import MASK, MASKED, VOCABULARY, Layout

_TOKEN = {t: i for i, t in enumerate(VOCABULARY) if len(t) == 1} | {MASKED: MASK}
_ENCODE = np.zeros(256, np.uint8)
_ENCODE[[ord(letter) for letter in _TOKEN]] = list(_TOKEN.values())


@dataclass(frozen=True)
class Antibody:
    """Chains in upper-case letters, "" where there is none; `MASKED` stands for a masked residue.

    Attributes:
      name: its id, or the number of its row.
      heavy, light: the chains.
      where: its place in the source, for messages.
      cdr_masks: `cdr_mask_aa` of both chains, where the source has it; else "".
    """

    name: str
    heavy: str
    light: str
    where: str = ""
    cdr_masks: tuple[str, str] = ("", "")

    def chains(self) -> list[tuple[str, str]]:
        """(name, letters) of the chains that are there."""
        both = zip(CHAINS, (self.heavy, self.light), strict=True)
        return [(chain, letters) for chain, letters in both if letters]

    @property
    def residues(self) -> int:
        """Residues of both chains."""
        return len(self.heavy) + len(self.light)


class Row(NamedTuple):
    """An antibody as the encoder reads it.

    Attributes:
      tokens: uint8 `[n]`, special tokens and residues.
      places: int64 `[residues]`, index in `tokens` of each residue, heavy chain first.
    """

    tokens: np.ndarray
    places: np.ndarray


def row_of(antibody: Antibody, layout: Layout) -> Row:
    """The row of an antibody in a layout."""
    chains = [
        _ENCODE[np.frombuffer(letters.encode(), np.uint8)]
        for letters in (antibody.heavy, antibody.light)
    ]
    heavy, light = (np.array([len(chain)]) for chain in chains)
    tokens = np.empty(row_sizes(heavy, light, layout)[0], np.uint8)
    first = write_special_tokens(tokens, np.zeros(1, np.int64), heavy, light, layout)
    places = np.concatenate([at + np.arange(len(c)) for at, c in zip(first, chains, strict=True)])
    tokens[places] = np.concatenate(chains)
    return Row(tokens, places)


def tokens_of(antibody: Antibody, layout: Layout) -> int:
    """Tokens of an antibody, special ones included."""
    heavy, light = (np.array([len(letters)]) for letters in (antibody.heavy, antibody.light))
    return int(row_sizes(heavy, light, layout)[0])


def row_sizes(heavy: np.ndarray, light: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens of rows, special ones included, from the residues of their chains (int64 `[n]`)."""
    around = len(layout.before) + len(layout.after)
    return heavy + light + around + ((heavy > 0) & (light > 0)) * len(layout.between)


def write_special_tokens(
    tokens: np.ndarray, start: np.ndarray, heavy: np.ndarray, light: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the special tokens of n rows, and says where their residues go.

    Args:
      tokens: uint8 `[N]`, written to.
      start: int64 `[n]`, place in `tokens` of the first token of each row.
      heavy, light: int64 `[n]`, residues of the chains; 0 where there is none.
      layout: special tokens around the chains.

    Returns:
      Places of the first residue of the heavy and of the light chain of each row, int64 `[n]`.
    """
    both = (heavy > 0) & (light > 0)
    heavy_at = start + len(layout.before)
    light_at = heavy_at + heavy + both * len(layout.between)
    for i, token in enumerate(layout.before):
        tokens[start + i] = token
    for i, token in enumerate(layout.lone_light):
        tokens[(start + i)[heavy == 0]] = token
    for i, token in enumerate(layout.between):
        tokens[(heavy_at + heavy + i)[both]] = token
    for i, token in enumerate(layout.after):
        tokens[light_at + light + i] = token
    return heavy_at, light_at
