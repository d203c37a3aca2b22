"""The sequences that a run sees, and their batches for training and validation."""

import functools
import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from moe_ablm.config_schema import Config
from moe_ablm.data import pipeline
from moe_ablm.data import sequences as forms
from moe_ablm.data.assemble import Batch, Masking
from moe_ablm.data.chains import SEEN, levels, seen_places, whole_split
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import UNIFORM, MaskPolicy, parse_policy
from moe_ablm.data.mixture import (
    Batching,
    Mixture,
    Regime,
    dataset_weights,
    parse_regime,
    require_some,
)
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.sequences import NONE, Sequences
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.model.families import RowShape

EVALUATION_SEED = 20_240_601  # of the validation masks: the same for every run, whatever its seed
EVALUATION_MASK_RATE = 0.15
_MULTIPLE = 32  # of tokens, for the length of validation rows beside packed training rows


class Feed:
    """Training and validation batches of one run.

    Attributes:
      train_rows: row numbers of the training records, dataset after dataset.
      mixture: the rows of each step; its `notes` are printed.
      left_out: training sequences that are longer than `data.length`.
      corpus_tokens: tokens of all training sequences, special tokens included: those of an epoch.
    """

    def __init__(self, config: Config, *datasets: Dataset, start: str = ""):
        d = config.data
        self._datasets, self._config, self._start = datasets, config, start
        regime, policy = parse_regime(d.regime), parse_policy(d.mask)
        rows = [dataset.rows("train", d.fraction) for dataset in datasets]
        batch = config.train.batch * (2 if regime.doubled else 1)
        batching = Batching(d.batching, batch, d.length, d.layout, d.buckets)
        self.mixture = Mixture(
            datasets,
            rows,
            regime,
            batching,
            seed=config.seed,
            steps=config.train.steps,
            weights=d.weights,
        )
        _require_annotation(policy, d.mask, self.mixture)
        self._masking = Masking(policy, d.mask_rate, config.seed)
        self.train_rows = np.concatenate(rows)
        self.left_out = self.mixture.left_out
        self.corpus_tokens = self.mixture.corpus_tokens
        self._valid = self._valid_samples(regime)

    @property
    def identity(self) -> str:
        """SHA-256 over the content of the datasets, in their order, and of what a run starts from.

        `start` of the constructor is the SHA-256 of those parameters, "" where they are random.
        """
        names = [dataset.identity for dataset in self._datasets] + [self._start] * bool(self._start)
        return names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()

    @property
    def row(self) -> RowShape:
        """Shape of the training rows, from which FLOPs follow."""
        return RowShape(*self.mixture.row_means, packed=self.mixture.batching.kind == "packed")

    def train_batches(self, first_step: int) -> Iterator[Batch]:
        """This process's rows of the batches of `first_step` and later.

        `antibody` and `position` are there when rows are shared (packed), and only then: without
        them the encoder takes the faster way of one sequence a row.
        """
        process = (jax.process_index(), jax.process_count())
        source = pipeline.TrainBatches(self.mixture, self._masking, process)
        threads = self._config.compute.loader_threads
        batches = pipeline.train_iterator(source, first_step, threads)
        return batches if self.mixture.batching.kind == "packed" else map(_one_a_row, batches)

    def valid_batches(self) -> Iterator[Batch]:
        """This process's rows of the validation batches: the same rows and masks every time.

        One sequence a row, masked uniformly, whatever the training regime does. Beside the arrays
        of `data.assemble`, `seen` uint8 `[B, L]`: whether training has the chain (`data.chains`).
        """
        b = self.mixture.batching
        shape = b.rows, b.length
        if b.kind == "packed":
            layout = LAYOUTS[b.layout]
            longest = max(int(s.tokens(d, layout).max()) for d, s in self._valid if len(s))
            length = min(-(-longest // _MULTIPLE) * _MULTIPLE, b.length)
            shape = b.rows * (b.length // length), length
        part = shape[0] // jax.process_count()
        mine = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
        masking = Masking(UNIFORM, EVALUATION_MASK_RATE, EVALUATION_SEED)
        found = pipeline.evaluation_batches(self._valid, shape, b.layout, masking)
        for number, batch in enumerate(found):
            of_chains = self.valid_levels[number * shape[0] : (number + 1) * shape[0]]
            of_chains = np.pad(of_chains, ((0, shape[0] - len(of_chains)), (0, 0)))
            batch["seen"] = seen_places(batch["segment"], of_chains)
            yield {name: array[mine] for name, array in _one_a_row(batch).items()}

    @functools.cached_property
    def valid_levels(self) -> np.ndarray:
        """Whether training has the chains of the validation sequences, uint8 `[n, 2]`.

        Heavy, light; `data.chains.levels`, for the training sequences that this run draws from, and
        for the whole training split of its datasets.
        """
        columns = []
        for chain in CHAINS:
            hashes = [
                np.where(rows == NONE, 0, d.chain_hashes[chain][rows])
                for d, sequences in self._valid
                for rows in [getattr(sequences, chain)]
            ]
            part, whole = self.mixture.chain_hashes(chain), whole_split(self._datasets, chain)
            columns.append(levels(np.concatenate(hashes), part, whole))
        return np.stack(columns, axis=1)

    @property
    def seen_shares(self) -> dict[str, float]:
        """Share of the validation chains that the run's training sequences have, by chain."""
        shares = {}
        for column, chain in enumerate(CHAINS):
            there = np.concatenate([getattr(s, chain) != NONE for _, s in self._valid])
            if there.any():
                shares[chain] = float((self.valid_levels[there, column] == SEEN).mean())
        return shares

    def _valid_samples(self, regime: Regime) -> list[tuple[Dataset, Sequences]]:
        """`eval.pairs` validation sequences, shared out among the datasets as in training."""
        d = self._config.data
        form = {"stored": forms.stored, "pairs": forms.pairs, "chains": forms.chains}
        found = [
            forms.fitting(
                dataset,
                form[regime.evaluated](dataset, dataset.rows("valid")),
                LAYOUTS[d.layout],
                d.length,
            )[0]
            for dataset in self._datasets
        ]
        require_some(self._datasets, "valid", regime.evaluated, found, d.length)
        shares = dataset_weights(d.weights, [len(s) for s in found])
        counts = np.diff(np.rint(np.cumsum(shares) * self._config.eval.pairs), prepend=0)
        return [
            (dataset, pipeline.evaluation_sample(sequences, int(count)))
            for dataset, sequences, count in zip(self._datasets, found, counts, strict=True)
        ]


def _one_a_row(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if name not in ("antibody", "position")}


def _require_annotation(policy: MaskPolicy, name: str, mixture: Mixture) -> None:
    """UserError when the policy prefers residues that the datasets do not mark."""
    marked = {"cdr3": forms.has_cdr3, "nongermline": forms.has_mutations}.get(policy.kind)
    if marked and not any(marked(s.dataset, s.sequences) for s in mixture.streams):
        what = "CDR3" if policy.kind == "cdr3" else "mutated residue"
        paths = ", ".join(sorted({str(s.dataset.path) for s in mixture.streams}))
        raise UserError(
            f"config.data.mask={name!r}: dataset {paths} has no annotated {what}; "
            "prepare it with annotation or use data.mask='uniform'"
        )
