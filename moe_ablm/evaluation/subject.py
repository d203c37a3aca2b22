"""The subject of an evaluation: a model, the antibodies of a dataset, other files by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from moe_ablm.data.antibody import tokens_of
from moe_ablm.data.chains import hash_sequences
from moe_ablm.data.dataset import FRACTIONS, Dataset
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.tokenizer import encode
from moe_ablm.evaluation.cohort import Annotated, annotated, sample_rows
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.inference.buckets import Engine


@dataclass(frozen=True)
class Subject:
    """A model and the data it is evaluated on.

    Attributes:
      engine: the model.
      dataset: antibodies, held out from training in its split "test"; None: none were given.
      files: other inputs by name: "specificity", "therapeutic", "fitness", "proteins".
      work: folder where unfinished results are kept; results of long computations are resumed
        from there.
      seed: of all draws.
      on_bad_row: whether malformed rows of files stop an evaluation or are left out with a note.
      null: "" or the kind of null model that the engine's router stands for (`nulls.ROUTED`).
    """

    engine: Engine
    dataset: Dataset | None
    work: Path
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    seed: int = 0
    on_bad_row: Literal["fail", "skip"] = "fail"
    null: str = ""

    def antibodies(
        self,
        count: int,
        paired: bool = False,
        split: str = "test",
        within: np.ndarray | None = None,
    ) -> tuple[list[Annotated], list[str]]:
        """Held-out antibodies, the same ones for every model, and notes on those left out.

        Args:
          count: how many are drawn; those that do not qualify are left out of them.
          paired: only such with both chains.
          split: of the dataset.
          within: rows of it that qualify, instead of all.

        Raises:
          Skipped: there are none.
        """
        if self.dataset is None:
            raise Skipped("no dataset was given (--input DIR)")
        candidates = annotated(
            self.dataset, sample_rows(self.dataset, split, count, self.seed, within)
        )
        both = [a for a in candidates if a.paired or not paired]
        layout, longest = self.engine.model.layout, self.engine.model.length
        kept = [a for a in both if tokens_of(a.antibody, layout) <= longest]
        notes = []
        if len(both) < len(candidates):
            notes.append(
                f"{len(candidates) - len(both):,} of {len(candidates):,} have one chain: left out"
            )
        if len(kept) < len(both):
            notes.append(
                f"{len(both) - len(kept):,} are longer than the {longest} tokens that the model "
                "was trained for: left out"
            )
        if not kept:
            what = "pair" if paired else "antibody"
            raise Skipped(f"split {split} of {self.dataset.path} holds no {what} that fits")
        return kept, notes

    def seen(self, antibodies: list[Annotated]) -> tuple[np.ndarray, str]:
        """Whether training has each chain of some antibodies, and a note on what training is.

        Of a run on this dataset training is the part (`data.fraction`) that it took; of other
        models the whole training split.

        Returns:
          bool `[n, 2]`, heavy and light, False where there is no chain; and the note.
        """
        if self.dataset is None:
            raise Skipped("no dataset was given (--input DIR)")
        data = self.engine.model.facts.get("data") or {}
        own = data.get("sha256") == self.dataset.identity and data.get("fraction") in FRACTIONS
        fraction = data["fraction"] if own else "full"
        rows = self.dataset.rows("train", fraction)
        by_chain = []
        for chain in CHAINS:
            letters = [getattr(a, chain).letters for a in antibodies]
            tokens = encode(np.frombuffer("".join(letters).encode(), np.uint8))
            hashes = hash_sequences(tokens, np.cumsum([0, *map(len, letters)]))
            by_chain.append(np.isin(hashes, self.dataset.chain_hashes[chain][rows]) & (hashes != 0))
        whose = (
            f"{fraction}, as of the model's run" if own else "all of it: the model is no run on it"
        )
        note = f"seen chains: those that the training split of {self.dataset.path} has ({whose})"
        return np.stack(by_chain, axis=1), note

    def files_of(self, name: str) -> tuple[Path, ...]:
        """Files given under a name.

        Raises:
          Skipped: there are none.
        """
        if not self.files.get(name):
            raise Skipped(f"no file was given (--data {name}=FILE)")
        return self.files[name]

    def generator(self, purpose: str) -> np.random.Generator:
        """Random numbers for a purpose: the same for every model."""
        return np.random.default_rng([self.seed, *purpose.encode()])


def require_regions(antibodies: list[Annotated]) -> None:
    """Raises `Skipped` where no residue has a region."""
    if not any(chain.region.any() for a in antibodies for _, chain in a.chains()):
        raise Skipped("the dataset has no regions: prepare it with annotation")
