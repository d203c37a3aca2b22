"""A dataset on disk: memory-mapped Arrow IPC shards and `dataset.json`.

One row is an antibody. Residues, germline residues, region codes, mutation mask and gene segments
of a chain are lists of equal length, so that one vectorised gather serves all of them. A dataset
appears under its name only when it is whole: it is written beside it and renamed.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data import tokenizer
from moe_ablm.data.chains import hash_chains
from moe_ablm.data.regions import CHAINS, regions_from_cdr_mask, segments_from_mask
from moe_ablm.errors import UserError
from moe_ablm.files import require_local, write_json

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")
FRACTIONS = {"quarter": 1 << 30, "half": 1 << 31, "full": 1 << 32}
ROWS_PER_BATCH = 65_536
BATCHES_PER_SHARD = 8
RESIDUE_COLUMNS = ("tokens", "germline", "region", "mutated", "segment")

_RESIDUES = pa.large_list(pa.uint8())
SCHEMA = pa.schema(
    [("id", pa.string()), ("key", pa.uint64())]
    + [(f"{c}_{column}", _RESIDUES) for c in CHAINS for column in RESIDUE_COLUMNS]
    + [(f"{c}_{gene}_gene", pa.string()) for c in CHAINS for gene in "vj"]
    + [
        ("cluster", pa.int64()),
        ("split", pa.uint8()),
        ("fraction_key", pa.uint32()),
        ("source", pa.string()),
        ("donor", pa.string()),
        ("label", pa.string()),
    ]
)


def flat(strings: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A string array as ASCII codes end to end (uint8 `[n]`) and offsets (int64 `[rows + 1]`)."""
    if isinstance(strings, pa.ChunkedArray):
        strings = strings.combine_chunks()
    strings = strings.cast(pa.large_string()).fill_null("")
    _, offsets, values = strings.buffers()
    offsets = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    values = np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def _encode_chain(batch: pa.RecordBatch, chain: str) -> dict[str, pa.Array]:
    letters, offsets = flat(batch[f"sequence_aa_{chain}"])
    if tokenizer.invalid(letters).any():
        raise ValueError("sequences must be checked before they are encoded")

    def residues(column: str, default: np.ndarray) -> np.ndarray:
        name = f"{column}_{chain}"
        if name not in batch.schema.names:
            return default
        values, its_offsets = flat(batch[name])
        if not np.array_equal(offsets, its_offsets):
            raise ValueError(f"{name} must be as long as sequence_aa_{chain} in every row")
        return values

    none = np.full(len(letters), ord("0"), np.uint8)
    codes = {
        "tokens": tokenizer.encode(letters),
        "germline": tokenizer.encode(residues("germline_aa", letters)),
        "region": regions_from_cdr_mask(residues("cdr_mask_aa", none), offsets),
        "mutated": residues("nongermline_mask_aa", none) - np.uint8(ord("0")),
        "segment": segments_from_mask(residues("gene_segment_mask_aa", none)),
    }
    ends = pa.array(offsets)
    return {
        f"{chain}_{name}": pa.LargeListArray.from_arrays(ends, pa.array(values))
        for name, values in codes.items()
    }


def encode_batch(
    batch: pa.RecordBatch,
    *,
    key: np.ndarray,
    cluster: np.ndarray,
    split: np.ndarray,
    fraction_key: np.ndarray,
) -> pa.RecordBatch:
    """Annotated rows (columns of the study, sequences already checked) as stored rows.

    Args:
      batch: `sequence_aa_{heavy,light}` and, where known, the other columns of the study.
      key: uint64 `[rows]`, the identity of each record (masks and epochs are drawn from it).
      cluster, split, fraction_key: `[rows]`, see `SCHEMA`; `split` indexes `SPLITS`, a record is
        in a fraction when `fraction_key < FRACTIONS[name]`.
    """
    names = batch.schema.names

    def text(name: str) -> pa.Array:
        if name in names:
            return batch[name].cast(pa.string()).fill_null("")
        return pa.array([""] * batch.num_rows, pa.string())

    columns = {"id": text("sequence_id"), "key": pa.array(key, pa.uint64())}
    for chain in CHAINS:
        columns |= _encode_chain(batch, chain)
        columns |= {f"{chain}_{gene}_gene": text(f"{gene}_gene_{chain}") for gene in "vj"}
    columns |= {
        "cluster": pa.array(cluster, pa.int64()),
        "split": pa.array(split, pa.uint8()),
        "fraction_key": pa.array(fraction_key, pa.uint32()),
        "source": text("source"),
        "donor": text("donor"),
        "label": text("label"),
    }
    return pa.RecordBatch.from_arrays([columns[n] for n in SCHEMA.names], schema=SCHEMA)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class DatasetWriter:
    """Writes a dataset under a temporary name; `finish` renames it when it is whole.

    Use as a context manager: an exception inside leaves nothing behind.
    """

    def __init__(self, out: Path):
        self.out = Path(out)
        if self.out.exists():
            raise UserError(f"--out {self.out} exists already: choose another name or remove it")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._dir = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
        self._dir.chmod(0o755)
        self._pending: list[pa.RecordBatch] = []
        self._rows_pending = 0
        self._file: pa.ipc.RecordBatchFileWriter | None = None
        self._shards: list[dict] = []
        self._counts = dict.fromkeys(SPLITS, 0)
        self._fractions = {s: dict.fromkeys(FRACTIONS, 0) for s in SPLITS}
        self._residues = dict.fromkeys(CHAINS, 0)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()
        shutil.rmtree(self._dir, ignore_errors=True)

    def add(self, batch: pa.RecordBatch) -> None:
        """Appends stored rows (schema `SCHEMA`, any number)."""
        split, fraction_key = np.asarray(batch["split"]), np.asarray(batch["fraction_key"])
        for code, name in enumerate(SPLITS):
            self._counts[name] += int((split == code).sum())
            for fraction, bound in FRACTIONS.items():
                self._fractions[name][fraction] += int(
                    ((split == code) & (fraction_key < bound)).sum()
                )
        for chain in CHAINS:
            self._residues[chain] += len(batch[f"{chain}_tokens"].flatten())
        while batch.num_rows:
            head = batch.slice(0, ROWS_PER_BATCH - self._rows_pending)
            self._pending.append(head)
            self._rows_pending += head.num_rows
            batch = batch.slice(head.num_rows)
            if self._rows_pending == ROWS_PER_BATCH:
                self._flush()

    def _flush(self) -> None:
        if not self._rows_pending:
            return
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.arrow"
            self._shards.append({"file": name, "rows": 0, "batches": 0})
            self._file = pa.ipc.new_file(self._dir / name, SCHEMA)
        table = pa.Table.from_batches(self._pending, SCHEMA).combine_chunks()
        self._file.write_table(table)
        shard = self._shards[-1]
        shard["rows"] += table.num_rows
        shard["batches"] += 1
        self._pending, self._rows_pending = [], 0
        if shard["batches"] == BATCHES_PER_SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        shard = self._shards[-1]
        path = self._dir / shard["file"]
        del shard["batches"]
        shard |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def finish(self, card: dict) -> dict:
        """Writes `dataset.json` (counts and `card`: sources, split rule, licence) and renames.

        Returns the content of `dataset.json`.
        """
        self._flush()
        self._close_shard()
        rows = sum(s["rows"] for s in self._shards)
        if rows == 0:
            raise UserError(f"no antibody is left to write to {self.out}")
        identity = hashlib.sha256("".join(s["sha256"] for s in self._shards).encode()).hexdigest()
        content = {
            "schema": SCHEMA_VERSION,
            "sha256": identity,
            "rows": rows,
            "residues": self._residues,
            "splits": self._counts,
            "fractions": self._fractions,
            **card,
            "shards": self._shards,
        }
        write_json(self._dir / "dataset.json", content)
        try:
            self._dir.rename(self.out)
        except OSError as error:
            raise UserError(f"--out {self.out} appeared meanwhile: {error.strerror}") from error
        return content


class Dataset:
    """A dataset opened for reading; `gather` takes rows from the memory map.

    Attributes:
      card: the content of `dataset.json`.
      key (uint64), split (uint8), fraction_key (uint32), cluster (int64): arrays `[rows]`.
      lengths: residues of each chain, `{chain: int64 [rows]}`.
    """

    key: np.ndarray
    split: np.ndarray
    fraction_key: np.ndarray
    cluster: np.ndarray

    def __init__(self, path: str | Path):
        """Opens and checks `path`; a UserError names what is missing, altered or unknown."""
        self.path = Path(path)
        self.card = _read_card(self.path)
        _check_shards(self.path, self.card["shards"])
        batches = [b for s in self.card["shards"] for b in _map_shard(self.path / s["file"])]
        self._batches = batches
        self._views = [_views(b) for b in batches]
        self._starts = np.cumsum([0] + [b.num_rows for b in batches])
        self.key, self.split, self.fraction_key, self.cluster = (
            np.concatenate([np.asarray(b[name]) for b in batches])
            for name in ("key", "split", "fraction_key", "cluster")
        )
        self.lengths = {
            chain: np.concatenate([np.diff(v[f"{chain}_offsets"]) for v in self._views])
            for chain in CHAINS
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def identity(self) -> str:
        """SHA-256 over the shards: equal for datasets of equal rows in equal order."""
        return self.card["sha256"]

    @functools.cached_property
    def chain_hashes(self) -> dict[str, np.ndarray]:
        """`chains.hash_sequences` of each chain, uint64 `[rows]`: equal for equal chains, 0: none.

        Computed at the first use, from the residues (1.6 CPU seconds for 319,124 pairs).
        """
        return {
            chain: np.concatenate([hash_chains(batch, chain) for batch in self._batches])
            for chain in CHAINS
        }

    def rows(self, split: str, fraction: str = "full") -> np.ndarray:
        """Row numbers (int64) of a split, restricted to a nested fraction of it."""
        inside = self.fraction_key < np.uint64(FRACTIONS[fraction])
        return np.flatnonzero((self.split == SPLITS.index(split)) & inside)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The stored rows in order, at most `ROWS_PER_BATCH` at once, from the memory map."""
        yield from self._batches

    def gather(self, rows: np.ndarray, chain: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Residue columns of some rows, end to end.

        Args:
          rows: int64 `[n]` row numbers, in any order.
          chain: "heavy" or "light".
          columns: names out of `RESIDUE_COLUMNS`.

        Returns:
          `{column: uint8 [sum of lengths]}`, the rows' residues in the order of `rows`; their
          lengths are `self.lengths[chain][rows]`.
        """
        count = self.lengths[chain][rows]
        ends = np.cumsum(count)
        out = {c: np.empty(ends[-1] if len(rows) else 0, np.uint8) for c in columns}
        self.copy_residues(
            chain, rows, out, at=ends - count, skip=np.zeros_like(count), count=count
        )
        return out

    def copy_residues(
        self,
        chain: str,
        rows: np.ndarray,
        into: Mapping[str, np.ndarray],
        *,
        at: np.ndarray,
        skip: np.ndarray,
        count: np.ndarray,
    ) -> None:
        """Copies `count[i]` residues of row `rows[i]`, from its residue `skip[i]` on, to `at[i]`.

        A copy of a hundred bytes costs less than the indices of a vectorised gather of them.

        Args:
          chain: "heavy" or "light".
          rows: int64 `[n]` row numbers, in any order.
          into: `{column: uint8 [m]}`, contiguous, columns out of `RESIDUE_COLUMNS`.
          at, skip, count: int64 `[n]`.
        """
        chunk = np.searchsorted(self._starts, rows, side="right") - 1
        local = rows - self._starts[chunk]
        targets = [(f"{chain}_{column}", array.data) for column, array in into.items()]
        offsets = f"{chain}_offsets"
        for c, row, to, skipped, n in zip(
            chunk.tolist(), local.tolist(), at.tolist(), skip.tolist(), count.tolist(), strict=True
        ):
            views = self._views[c]
            start = views[offsets][row] + skipped
            for name, target in targets:
                target[to : to + n] = views[name][start : start + n]

    def column(self, name: str, rows: np.ndarray) -> list:
        """Values of a text or number column for some rows (slow: for reports, not for training)."""
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        return [
            self._batches[c][name][int(r - self._starts[c])].as_py()
            for r, c in zip(rows, chunk_of, strict=True)
        ]


def _read_card(path: Path) -> dict:
    require_local(path, "dataset")
    file = path / "dataset.json"
    if not file.is_file():
        what = "is not there" if not path.exists() else "has no dataset.json"
        raise UserError(
            f"dataset {path} {what}; make one with "
            f"`python -m moe_ablm prepare --input FILE --out {path}`"
        )
    try:
        card = json.loads(file.read_text())
        version = card["schema"]
        if version == SCHEMA_VERSION:
            _check_listed(card["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): prepare the dataset again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file}: schema version {version!r}, this moe_ablm reads {SCHEMA_VERSION}: "
            "prepare the dataset again or use the version that wrote it"
        )
    return card


def _check_listed(shards: list[dict]) -> None:
    if not shards:
        raise ValueError("it names no shards")
    for shard in shards:
        if not (isinstance(shard["file"], str) and isinstance(shard["sha256"], str)):
            raise ValueError("a shard has no name or no checksum")
        int(shard["bytes"])


def _check_shards(path: Path, shards: list[dict]) -> None:
    """Compares sizes, then SHA-256, in parallel (hashing releases the GIL)."""
    for shard in shards:
        file = path / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            raise UserError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, dataset.json says "
                f"{shard['bytes']} bytes: the shard is truncated or altered, prepare it again"
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(lambda s: sha256_file(path / s["file"]), shards)
        for shard, digest in zip(shards, sums, strict=True):
            if digest != shard["sha256"]:
                raise UserError(
                    f"{path / shard['file']}: SHA-256 {digest[:12]}..., dataset.json says "
                    f"{shard['sha256'][:12]}...: the shard is altered, prepare it again"
                )


def _map_shard(file: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    if reader.schema != SCHEMA:
        raise UserError(f"{file}: its columns are not those of schema version {SCHEMA_VERSION}")
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _views(batch: pa.RecordBatch) -> dict[str, memoryview]:
    """Residue columns of stored rows, end to end (uint8), and their offsets (int64) by chain."""
    views = {
        f"{chain}_{column}": memoryview(batch[f"{chain}_{column}"].values.to_numpy())
        for chain in CHAINS
        for column in RESIDUE_COLUMNS
    }
    offsets = {f"{c}_offsets": memoryview(batch[f"{c}_tokens"].offsets.to_numpy()) for c in CHAINS}
    return views | offsets
