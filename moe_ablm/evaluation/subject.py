"""What is evaluated: a model, the antibodies of a dataset, and other files by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_ablm.data.antibody import tokens_of
from moe_ablm.data.dataset import Dataset
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
      null: "" or the kind of null model that the engine's router stands for (`nulls.ROUTED`).
    """

    engine: Engine
    dataset: Dataset | None
    work: Path
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    seed: int = 0
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
        found = annotated(self.dataset, sample_rows(self.dataset, split, count, self.seed, within))
        both = [a for a in found if a.paired or not paired]
        layout, longest = self.engine.model.layout, self.engine.model.length
        kept = [a for a in both if tokens_of(a.antibody, layout) <= longest]
        notes = []
        if len(both) < len(found):
            notes.append(f"{len(found) - len(both):,} of {len(found):,} have one chain: left out")
        if len(kept) < len(both):
            notes.append(
                f"{len(both) - len(kept):,} are longer than the {longest} tokens that the model "
                "was trained for: left out"
            )
        if not kept:
            what = "pair" if paired else "antibody"
            raise Skipped(f"split {split} of {self.dataset.path} holds no {what} that fits")
        return kept, notes

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
