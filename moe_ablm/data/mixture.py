"""Which rows a step shows: regimes by name, shares of several datasets, the curriculum.

A form of the data (pairs as stored, re-paired pairs, chains alone) of one dataset, and in one
length bucket, is a stream. A step's rows come from the streams in fixed shares; how many from which
is a function of the seed and the step alone, and every stream gives each of its sequences once an
epoch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moe_ablm.data import sequences as forms
from moe_ablm.data.antibody import row_sizes
from moe_ablm.data.chains import different
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import mix
from moe_ablm.data.packing import first_fit_decreasing, seat
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.sequences import Sequences
from moe_ablm.data.tokenizer import LAYOUTS, Layout
from moe_ablm.errors import UserError

REGIMES = (
    "paired",
    "shuffled",
    "unpaired",
    "unpaired:doubled",
    "mixed:SHARE",
    "curriculum:sigmoid",
    "curriculum:sigmoid(START,DROP,SLOPE,MIDDLE)",
)
BATCHINGS = ("padded", "bucketed", "packed")
# P(unpaired) = .7 - .4 sigmoid(15 (t - .8166)) of brineylab's curriculum study; its mean is .625
CURRICULUM = (0.7, 0.4, 15.0, 0.8166)

_NUMBER = r"(\d+\.?\d*|\.\d+)"
_MIXED = re.compile(f"mixed:{_NUMBER}")
_SIGMOID = re.compile(rf"curriculum:sigmoid(?:\({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\))?")

_EPOCHS_KEPT = 2  # a batch may hold the end of one epoch and the start of the next
# Shares are integers of this unit: hosts whose exp differs in the last bit still agree.
_UNIT = 1 << 20
_GOLDEN = 648_055  # odd, nearest to _UNIT times the golden ratio's fraction


@dataclass(frozen=True)
class Regime:
    """How chains are shown.

    Attributes:
      kind: paired, shuffled, unpaired, mixed or curriculum.
      doubled: twice as many rows a step (unpaired: as many residues as pairs would have).
      curve: (start, drop, slope, middle) of the share of unpaired sequences,
        start - drop sigmoid(slope (t - middle)) at training fraction t (mixed and curriculum).
    """

    kind: str
    doubled: bool = False
    curve: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def unpaired_share(self, t: np.ndarray) -> np.ndarray:
        """Share of unpaired sequences at training fractions `t`, any shape."""
        start, drop, slope, middle = self.curve
        return start - drop / (1 + np.exp(-slope * (np.asarray(t) - middle)))

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of the data: stored, repaired, chains, or chains and pairs."""
        return _FORMS[self.kind]

    @property
    def evaluated(self) -> str:
        """The form of the validation set: native pairs where the regime shows pairs at all."""
        return {"repaired": "stored"}.get(self.forms[-1], self.forms[-1])


_FORMS = {
    "paired": ("stored",),
    "shuffled": ("repaired",),
    "unpaired": ("chains",),
    "mixed": ("chains", "pairs"),
    "curriculum": ("chains", "pairs"),
}


def parse_regime(text: str) -> Regime:
    """Regime from its name, one of `REGIMES`; ValueError if it is malformed."""
    if text in ("paired", "shuffled", "unpaired"):
        return Regime(text)
    if text == "unpaired:doubled":
        return Regime("unpaired", doubled=True)
    if match := _MIXED.fullmatch(text):
        share = float(match[1])
        if not 0 < share < 1:
            raise ValueError(f"SHARE={share:g} of unpaired sequences, expected between 0 and 1")
        return Regime("mixed", curve=(share, 0.0, 0.0, 0.0))
    if match := _SIGMOID.fullmatch(text):
        start, drop, slope, middle = map(float, match.groups()) if match[1] else CURRICULUM
        if not 0 <= start - drop <= start <= 1:
            raise ValueError("START and START - DROP are shares: expected 0 to 1")
        return Regime("curriculum", curve=(start, drop, slope, middle))
    raise ValueError(f"expected one of {', '.join(REGIMES)}")


def form_of(
    dataset: Dataset, form: str, rows: np.ndarray, seed: int
) -> tuple[Sequences, str | None]:
    """Records in a form, and a note for the user or None."""
    if form != "repaired":
        return {"stored": forms.stored, "chains": forms.chains, "pairs": forms.pairs}[form](
            dataset, rows
        ), None
    sequences, met, left = forms.repaired(dataset, rows, seed)
    both = int(((sequences.heavy != forms.NONE) & (sequences.light != forms.NONE)).sum())
    return sequences, (
        f"{dataset.path}: {met:,} of {both:,} re-paired antibodies ({met / both:.3%}) met a native "
        f"pair by chance and were drawn again; {left:,} native pairs remain"
    )


@dataclass(frozen=True)
class Batching:
    """How sequences become rows: `kind` out of `BATCHINGS`, rows of at most `length` tokens.

    `buckets` are the rising lengths of bucketed batches, the last one `length`.
    """

    kind: str
    rows: int
    length: int
    layout: str
    buckets: tuple[int, ...] = ()


_NAMES = {
    "stored": "antibody",
    "repaired": "re-paired antibody",
    "chains": "chain",
    "pairs": "antibody with both chains",
}


def require_some(
    datasets: Sequence[Dataset], split: str, form: str, sequences: Sequence[Sequences], length: int
) -> None:
    """UserError when no dataset has a sequence of a form in `length` tokens."""
    if not any(map(len, sequences)):
        paths = ", ".join(str(d.path) for d in datasets)
        raise UserError(
            f"dataset {paths}: no {_NAMES[form]} of the {split} split (or of config.data.fraction) "
            f"fits in config.data.length={length}: raise it or prepare more data"
        )


def dataset_weights(weights: Sequence[float] | None, counts: Sequence[int]) -> np.ndarray:
    """Shares `[datasets]` of datasets that hold `counts` sequences of a form; sum 1.

    Without weights every sequence counts the same. A dataset that alone holds the form gives all
    of it, whatever its weight.
    """
    held = np.array(counts) > 0
    given = np.array(counts if weights is None else weights, np.float64) * held
    if given.sum() == 0 and held.sum() == 1:
        given = held.astype(np.float64)
    if given.sum() == 0:
        raise UserError(
            "config.data.weights: the datasets with a weight above 0 have no sequences of this "
            f"regime (each has {', '.join(map(str, counts))})"
        )
    return given / given.sum()


class Drawn(NamedTuple):
    """Sequences of some rows, row after row; arrays `[n]`.

    Attributes:
      row: index of the position in the request.
      sequence: index in the stream's sequences.
      epoch: how often the stream gave each of its sequences before.
      start: token of the row at which it begins.
    """

    row: np.ndarray
    sequence: np.ndarray
    epoch: np.ndarray
    start: np.ndarray


class Stream:
    """Rows out of sequences of one dataset, one sequence or, packed, several in a row.

    Attributes:
      dataset, sequences: the pool that is drawn from.
      size: int64 `[n]`, tokens of each sequence, at most `length` (longer ones are cropped).
      length: tokens of a row.
      rows: rows of an epoch, the same in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequences: Sequences,
        layout: Layout,
        length: int,
        seed: int,
        number: int = 0,
        packed: bool = False,
    ):
        """Args: the run's seed; `number` distinguishes the streams of a run."""
        self.dataset, self.sequences, self.length = dataset, sequences, length
        self._layout = layout
        self.size = np.minimum(sequences.tokens(dataset, layout), length)
        self._seed, self._spawn = seed, (number,) if number else ()
        self._packing = first_fit_decreasing(self.size, length) if packed else None
        self.rows = len(sequences) if self._packing is None else len(self._packing)
        self._order = lru_cache(_EPOCHS_KEPT)(self._make_order)

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of an epoch in order; packed also the sequence of each place."""
        entropy = np.random.SeedSequence([self._seed, epoch], spawn_key=self._spawn)
        rng = np.random.default_rng(entropy)
        rows = rng.permutation(self.rows)
        if self._packing is None:
            return rows, None
        return rows, seat(self._packing, self.size, rng.permutation(len(self.sequences)))

    def draw(self, position: np.ndarray) -> Drawn:
        """The rows at some positions (int64 `[B]`) of the endless order."""
        epoch, within = np.divmod(position, self.rows)
        parts = []
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            rows, seated = self._order(int(e))
            parts.append(self._draw_epoch(here, rows[within[here]], seated, int(e)))
        if len(parts) == 1:
            return parts[0]
        both = Drawn(*map(np.concatenate, zip(*parts, strict=True)))
        order = np.argsort(both.row, kind="stable")
        return Drawn(*(x[order] for x in both))

    def shown(self, rows: int) -> np.ndarray:
        """The sequences (int64, each once) of the first `rows` rows of the endless order."""
        if rows >= self.rows:
            return np.arange(len(self.sequences))
        if rows == 0:
            return np.zeros(0, np.int64)
        return np.unique(self.draw(np.arange(rows)).sequence)

    def chains(self, shown: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Hashes (uint64) and tokens (int64) of the chains of some sequences, `[n]` each.

        0 for no chain. Of a pair the heavy chain has the special tokens that it has alone, the
        light chain the rest.
        """
        some = self.sequences.take(shown)
        heavy, light = some.residues(self.dataset)
        size = self.size[shown]
        alone = row_sizes(heavy, np.zeros_like(light), self._layout)
        first = np.where(light > 0, alone * (heavy > 0), size)
        rows, sizes = (some.heavy, some.light), (first, size - first)
        return {
            chain: (np.where(r == forms.NONE, 0, self.dataset.chain_hashes[chain][r]), its)
            for chain, r, its in zip(CHAINS, rows, sizes, strict=True)
        }

    def _draw_epoch(
        self, here: np.ndarray, rows: np.ndarray, seated: np.ndarray | None, epoch: int
    ) -> Drawn:
        if self._packing is None or seated is None:
            return Drawn(here, rows, np.full(len(rows), epoch), np.zeros(len(rows), np.int64))
        first = self._packing.first[rows]
        count = self._packing.first[rows + 1] - first
        begin = np.cumsum(count) - count
        place = np.repeat(first - begin, count) + np.arange(count.sum())
        return Drawn(
            np.repeat(here, count),
            seated[place],
            np.full(len(place), epoch),
            self._packing.start[place],
        )


class Mixture:
    """The training rows of a run.

    Attributes:
      streams: `[S]`.
      left_out: sequences that are longer than `Batching.length`.
      notes: lines to print at the start of a run.
      sequences: number of sequences of all streams.
      corpus_tokens: their tokens, those of an epoch: a chain counts as often as records have it. Of
        a dataset that is shown in two forms, the larger sum.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        rows: Sequence[np.ndarray],
        regime: Regime,
        batching: Batching,
        *,
        seed: int,
        steps: int,
        weights: Sequence[float] | None = None,
    ):
        """Args: for each dataset the rows to draw from; steps of the run (the curriculum's end)."""
        self.batching, self._seed = batching, seed
        self.streams: list[Stream] = []
        self.notes: list[str] = []
        self.left_out = 0
        form_number, share, tokens = [], [], np.zeros((len(regime.forms), len(datasets)), np.int64)
        chains = np.zeros_like(tokens)
        for f, form in enumerate(regime.forms):
            parts = [self._form(d, form, r) for d, r in zip(datasets, rows, strict=True)]
            require_some(datasets, "train", form, parts, batching.length)
            shares = dataset_weights(weights, [len(p) for p in parts])
            for d, (dataset, part) in enumerate(zip(datasets, parts, strict=True)):
                added = self._add_streams(dataset, part) if shares[d] > 0 else []
                form_number += [f] * len(added)
                share += [shares[d] * len(s.sequences) / len(part) for s in added]
                tokens[f, d] = sum(int(s.size.sum()) for s in added)
                chains[f, d] = sum(_chains(s) for s in added)
        self.sequences = sum(len(s.sequences) for s in self.streams)
        self.corpus_tokens = int(tokens.max(0).sum())
        self._chains_of_epoch = int(chains.max(0).sum())
        self._chains_per_row = np.array([_chains(s) / s.rows for s in self.streams])
        form_share = np.ones((steps, 1))
        if len(regime.forms) == 2:
            unpaired = regime.unpaired_share(np.arange(steps) / steps)
            form_share = np.stack([unpaired, 1 - unpaired], 1)
        per_row = np.array([len(s.sequences) / s.rows for s in self.streams])
        units = 1 if batching.kind == "bucketed" else batching.rows
        shares = form_share[:, form_number] * (np.array(share) / per_row)
        self._before = rows_before(shares, units, seed)

    def _form(self, dataset: Dataset, form: str, rows: np.ndarray) -> Sequences:
        sequences, note = form_of(dataset, form, rows, self._seed)
        self.notes += [note] if note else []
        kept, left_out = forms.fitting(
            dataset, sequences, LAYOUTS[self.batching.layout], self.batching.length
        )
        self.left_out += left_out
        return kept

    def _add_streams(self, dataset: Dataset, sequences: Sequences) -> list[Stream]:
        b, layout = self.batching, LAYOUTS[self.batching.layout]
        parts = [(b.length, sequences)]
        if b.kind == "bucketed":
            size = np.minimum(sequences.tokens(dataset, layout), b.length)
            bucket = np.searchsorted(b.buckets, size)
            parts = [
                (length, sequences.take(np.flatnonzero(bucket == i)))
                for i, length in enumerate(b.buckets)
            ]
        added: list[Stream] = []
        for length, part in parts:
            if len(part):
                number = len(self.streams) + len(added)
                packed = b.kind == "packed"
                added.append(Stream(dataset, part, layout, length, self._seed, number, packed))
        self.streams += added
        return added

    def __len__(self) -> int:
        """Steps."""
        return len(self._before) - 1

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream and position in it of each row of a step, int64 `[B]` each."""
        b = self.batching.rows
        counts = self._before[step + 1] - self._before[step]
        if self.batching.kind == "bucketed":
            chosen = int(np.argmax(counts))
            return np.full(b, chosen), self._before[step, chosen] * b + np.arange(b)
        stream = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        position = np.arange(b) + (self._before[step] - first)[stream]
        if len(counts) == 1:
            return stream, position
        # interleave the streams so that every host and micro-batch gets its share
        with np.errstate(over="ignore"):
            order = np.argsort(mix(mix(np.uint64(self._seed) + mix(np.uint64(step)))
                                   + np.arange(b, dtype=np.uint64)))  # fmt: skip
        return stream[order], position[order]

    def epochs(self, step: int) -> float:
        """Chains shown before `step`, over those of the mixture's records."""
        shown = self._rows_before(step)
        return float(shown @ self._chains_per_row / self._chains_of_epoch)

    def _rows_before(self, step: int) -> np.ndarray:
        unit = self.batching.rows if self.batching.kind == "bucketed" else 1
        return self._before[step] * unit

    def unique_tokens(self, step: int | None = None) -> int:
        """Tokens of the different chains shown before `step` (None: of all), each counted once.

        Special tokens are counted as in `Stream.chains`; of a chain that is shown in two forms, the
        larger number.
        """
        rows = [s.rows for s in self.streams] if step is None else self._rows_before(step)
        found = [s.chains(s.shown(int(n))) for s, n in zip(self.streams, rows, strict=True)]
        total = 0
        for chain in CHAINS:
            hashes, sizes = map(np.concatenate, zip(*(f[chain] for f in found), strict=True))
            total += different(hashes, sizes)[1]
        return total

    def chain_hashes(self, chain: str) -> np.ndarray:
        """Hashes (uint64) of that chain of all sequences, 0 for none."""
        return np.concatenate(
            [s.chains(np.arange(len(s.sequences)))[chain][0] for s in self.streams]
        )

    @property
    def row_means(self) -> tuple[float, float, float]:
        """Means over the rows of the run: length with padding, tokens without, sequences."""
        rows = self._before[-1]
        each = [(s.length, s.size.sum() / s.rows, len(s.sequences) / s.rows) for s in self.streams]
        length, tokens, sequences = rows @ np.array(each) / rows.sum()
        return float(length), float(tokens), float(sequences)


def _chains(stream: Stream) -> int:
    s = stream.sequences
    return int((s.heavy != forms.NONE).sum() + (s.light != forms.NONE).sum())


def rows_before(shares: np.ndarray, units: int, seed: int) -> np.ndarray:
    """Units that each stream gave before each step, int64 `[steps + 1, S]`.

    A step's units are points (b + u) / units, b = 0..units - 1, on a line that the shares divide
    (systematic sampling): each stream gets its share, rounded up or down. u moves by the golden
    ratio from step to step, so that rounding evens out over a few steps.

    Args:
      shares: `[steps, S]`, not negative; each step's are normalised.
      units: rows (or batches) a step.
      seed: moves the first u.
    """
    steps = len(shares)
    bounds = np.cumsum(shares, axis=1)
    bounds = np.rint(bounds / bounds[:, -1:] * _UNIT).astype(np.int64)
    first = int(mix(np.uint64(seed))) % _UNIT
    u = (first + np.arange(steps, dtype=np.int64) * _GOLDEN) % _UNIT
    below = -((u[:, None] - units * bounds) // _UNIT)  # ceil((units bounds - u) / unit)
    counts = np.diff(below, axis=1, prepend=0)
    return np.concatenate([np.zeros((1, shares.shape[1]), np.int64), np.cumsum(counts, axis=0)])
