"""Rows on their way into a dataset: encoded to disk, then clustered and split as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_ablm.data import split as splits
from moe_ablm.data.chains import hash_chains
from moe_ablm.data.clones import (
    as_ascii,
    clonal_groups,
    donor_draws,
    is_labelled,
    label_numbers,
    mmseqs_clusters,
    nearest_train,
    require_mmseqs,
)
from moe_ablm.data.dataset import SCHEMA, encode_batch
from moe_ablm.data.joint import Joint, joint_split
from moe_ablm.data.masking import mix
from moe_ablm.data.readers.columns import LINE, ROW
from moe_ablm.data.readers.report import Report, place
from moe_ablm.data.regions import CHAINS
from moe_ablm.data.spill import Partitions
from moe_ablm.data.tokenizer import decode
from moe_ablm.errors import UserError

# Columns that clustering needs. `draw` decides the split, `group` is the clonal group, `member`
# a hash of group and CDRH3; without `cdr3` the group is the cluster.
_CLONES = pa.schema(
    [
        ("row", pa.int64()),
        ("draw", pa.uint64()),
        ("group", pa.uint64()),
        ("member", pa.uint64()),
        ("cdr3", pa.large_binary()),
    ]
)
_LABELS = pa.schema([("row", pa.int64()), ("draw", pa.uint64()), ("label", pa.int64())])
_IDS = pa.schema(
    [("row", pa.int64()), ("source", pa.int32()), (ROW, pa.int64()), (LINE, pa.int64())]
    + [("hash", pa.uint64()), ("id", pa.string())]
)
_COPIES = pa.schema(
    [("row", pa.int64()), ("source", pa.int32()), (ROW, pa.int64()), (LINE, pa.int64())]
    + [("key", pa.uint64())]
)
COPY = "the same chains as an earlier row"
_AFTER_THE_GENE = r"[*|,].*$"  # an allele, or ties


@dataclass(frozen=True)
class SplitRule:
    """How records are divided.

    Attributes:
      by: what stays whole and is drawn for: "group" (V gene, J gene, CDRH3 length: whole clusters,
        and adding sources moves nothing), "cluster" (clonal cluster: held-out sets resemble the
        whole more, but adding sources moves the clusters that grow or join), "donor", "mmseqs"
        (clusters of whole chains by sequence identity), or "joint" (clonal clusters and identical
        chains, heavy and light: `data.joint`).
      identity: CDRH3 identity (with "mmseqs": chain identity) that links two sequences.
      recluster: compute clusters even where the sources have a `cluster` column.
      valid_donors, test_donors: donors to hold out; empty: a hash of the donor's name decides.
    """

    by: Literal["group", "cluster", "donor", "mmseqs", "joint"] = "group"
    identity: float = 0.9
    recluster: bool = False
    valid_donors: tuple[str, ...] = ()
    test_donors: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0.5 <= self.identity <= 1:
            raise UserError(f"--identity {self.identity}: expected a share from 0.5 to 1")
        if self.by == "mmseqs":
            require_mmseqs()
        if self.by != "donor" and (self.valid_donors or self.test_donors):
            raise UserError("--valid-donors and --test-donors need --split donor")
        both = set(self.valid_donors) & set(self.test_donors)
        if both:
            raise UserError(f"donor {min(both)!r} is named for the valid and for the test split")


@dataclass(frozen=True, eq=False)
class Decided:
    """Clusters and splits, once all rows have been seen; arrays `[rows]` in order of arrival.

    Attributes:
      cluster (int64), split (uint8), keep (bool): see `dataset.SCHEMA`; `keep` is False for a row
        whose id its source has used before, and for a copy that is to be left out.
      copies: rows whose chains an earlier row has, letter by letter.
      clusters: their number.
      trusted: clusters are those of the sources' `cluster` column.
      divided: clusters whose members' own draws of a split differ; each takes one of them.
      nearest: see `clones.nearest_train`.
      joint: of the rule "joint", how large its components are.
    """

    cluster: np.ndarray
    split: np.ndarray
    keep: np.ndarray
    copies: int
    clusters: int
    trusted: bool
    divided: int
    nearest: dict | None
    joint: Joint | None = None


class Intake:
    """Takes rows in and remembers, on disk, what deciding their cluster and split needs.

    Args:
      scratch: a directory that only it uses.
      rule: how records are divided.
      deduplicate: leave out rows whose chains an earlier row has, of whichever source.
    """

    def __init__(self, scratch: Path, rule: SplitRule, deduplicate: bool = False):
        self.count = 0
        self._rule, self._deduplicate = rule, deduplicate
        self._scratch = scratch
        self._path = scratch / "rows.arrow"
        self._file = pa.OSFile(str(self._path), "wb")
        self._rows = pa.ipc.new_stream(self._file, SCHEMA)
        self._clones = Partitions(scratch, "clones", _CLONES)
        self._labels = Partitions(scratch, "labels", _LABELS)
        self._ids = Partitions(scratch, "ids", _IDS)
        self._copies = Partitions(scratch, "copies", _COPIES)
        self._all_labelled = rule.by != "mmseqs" and not rule.recluster

    def add(self, batch: pa.RecordBatch, report: Report, source: int) -> None:
        """Encodes and stores a checked, annotated batch of the source with that number."""
        batch = _completed(batch, report.origin)
        rows = pa.array(np.arange(self.count, self.count + batch.num_rows))
        key, fraction_key = splits.record_keys(
            *(as_ascii(batch[f"sequence_aa_{chain}"]) for chain in CHAINS)
        )
        blank = np.zeros(batch.num_rows, np.uint8)
        stored = encode_batch(batch, key=key, cluster=blank, split=blank, fraction_key=fraction_key)
        self._rows.write_batch(stored)
        group, member, cdr3 = clonal_groups(stored, key)
        draw = self._draws(batch, report, group=group, member=member, key=key)
        clones = [rows, *map(pa.array, (draw, group, member)), pa.array(cdr3, pa.large_binary())]
        self._clones.add(pa.record_batch(clones, schema=_CLONES), group)
        self._all_labelled = self._all_labelled and is_labelled(batch)
        if self._all_labelled:
            label = label_numbers(batch["cluster"])
            labels = pa.record_batch([rows, pa.array(draw), pa.array(label)], schema=_LABELS)
            self._labels.add(labels, label.view(np.uint64))
        hashes = np.array(
            [splits.hash64(f"{source}|{i}") for i in batch["sequence_id"].to_pylist()], np.uint64
        )
        sources = pa.array(np.full(batch.num_rows, source, np.int32))
        ids = [rows, sources, batch[ROW], batch[LINE], pa.array(hashes), batch["sequence_id"]]
        self._ids.add(pa.record_batch(ids, schema=_IDS), hashes)
        copies = [*ids[:4], pa.array(key)]
        self._copies.add(pa.record_batch(copies, schema=_COPIES), key)
        self.count += batch.num_rows
        report.kept += batch.num_rows

    def decide(self, reports: list[Report]) -> Decided:
        """Finds duplicated ids, copies, clusters and splits; nothing can be added afterwards.

        Raises:
          UserError: an id occurs twice in a source whose report says to fail.
        """
        stores = (self._clones, self._labels, self._ids, self._copies)
        for closing in (self._rows, self._file, *stores):
            closing.close()
        cluster = self._array("cluster", np.int64)
        split = self._array("split", np.uint8)
        keep = self._array("keep", bool)
        keep[:] = True
        self._reject_duplicates(reports, keep)
        copies = self._count_copies(reports, keep)
        divided = 0
        if self._rule.by == "mmseqs":
            self._label_by_mmseqs()
        if self._all_labelled or self._rule.by == "mmseqs":
            clusters, divided = self._follow_labels(cluster, split)
        else:
            clusters = self._cluster(cluster, split)
        joint = self._split_jointly(cluster, split, keep) if self._rule.by == "joint" else None
        nearest = nearest_train(self._clones.parts, split)
        trusted = self._all_labelled
        return Decided(cluster, split, keep, copies, clusters, trusted, divided, nearest, joint)

    def stored(self, decided: Decided) -> Iterator[pa.RecordBatch]:
        """The rows that are kept, as stored rows with their cluster and split."""
        at = 0
        for batch in self._stored():
            here = slice(at, at + batch.num_rows)
            at += batch.num_rows
            for name, values in (("cluster", decided.cluster), ("split", decided.split)):
                i = SCHEMA.get_field_index(name)
                batch = batch.set_column(i, SCHEMA.field(i), pa.array(np.array(values[here])))
            keep = np.array(decided.keep[here])
            yield batch if keep.all() else batch.filter(pa.array(keep))

    def _stored(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self._path)) as f, pa.ipc.open_stream(f) as stream:
            yield from stream

    def _array(self, name: str, dtype: type) -> np.ndarray:
        return np.memmap(self._scratch / name, dtype, "w+", shape=(self.count,))

    def _reject_duplicates(self, reports: list[Report], keep: np.ndarray) -> None:
        for part in self._ids.parts():
            hashes = part["hash"].to_numpy()
            order = np.argsort(hashes, kind="stable")  # of equal ids the first arrived comes first
            again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
            for i in order[again]:
                row = part.slice(int(i), 1).to_pylist()[0]
                keep[row["row"]] = False
                report = reports[row["source"]]
                detail = f"sequence_id {row['id']!r} was used before in this source"
                report.bad_row(place(row[ROW], row[LINE]), "duplicated id", detail)
                report.kept -= 1

    def _count_copies(self, reports: list[Report], keep: np.ndarray) -> int:
        """Notes, or leaves out, rows whose chains an earlier one that is kept has."""
        found = [_COPIES.empty_table()]
        for part in self._copies.parts():
            part = part.filter(pa.array(keep[part["row"].to_numpy()]))
            key = part["key"].to_numpy()
            order = np.argsort(key, kind="stable")  # of equal keys the first arrived comes first
            again = order[np.flatnonzero(key[order][1:] == key[order][:-1]) + 1]
            found.append(part.take(pa.array(again)))
        copies = pa.concat_tables(found).sort_by("row")
        source = copies["source"].to_numpy()
        for number, first, rows in zip(
            *np.unique(source, return_index=True, return_counts=True), strict=True
        ):
            at, report = copies.slice(int(first), 1).to_pylist()[0], reports[number]
            where = place(at[ROW], at[LINE])
            if self._deduplicate:
                report.reject(COPY, where, int(rows))
                report.kept -= int(rows)
            else:
                report.note(COPY, where, int(rows))
        if self._deduplicate:
            keep[copies["row"].to_numpy()] = False
        return len(copies)

    def _draws(
        self,
        batch: pa.RecordBatch,
        report: Report,
        *,
        group: np.ndarray,
        member: np.ndarray,
        key: np.ndarray,
    ) -> np.ndarray:
        if self._rule.by == "donor":
            return donor_draws(batch, report, self._rule.valid_donors, self._rule.test_donors)
        return {"group": group, "cluster": member, "mmseqs": key, "joint": member}[self._rule.by]

    def _split_jointly(self, cluster: np.ndarray, split: np.ndarray, keep: np.ndarray) -> Joint:
        """Splits the rows that are kept; all of them are in memory, some 300 bytes a row."""
        found = [
            (hash_chains(b, "heavy"), hash_chains(b, "light"), b["key"].to_numpy())
            for b in self._stored()
        ]
        heavy, light, key = (np.concatenate(each)[keep] for each in zip(*found, strict=True))
        joint = joint_split(np.array(cluster[keep]), heavy, light, key)
        split[keep] = joint.split
        return joint

    def _label_by_mmseqs(self) -> None:
        """Clusters the first chain of every row; a cluster is named by its representative's key."""
        keys = self._array("keys", np.uint64)

        def sequences() -> Iterator[bytes]:
            at = 0
            for batch in self._stored():
                keys[at : at + batch.num_rows] = batch["key"].to_numpy()
                at += batch.num_rows
                for heavy, light in zip(batch["heavy_tokens"], batch["light_tokens"], strict=True):
                    tokens = heavy if len(heavy) else light
                    yield decode(tokens.values.to_numpy()).encode()

        for rows, representatives in mmseqs_clusters(
            sequences(), self._rule.identity, self._scratch
        ):
            label = (keys[representatives] >> np.uint64(1)).astype(np.int64)
            columns = [pa.array(rows), pa.array(keys[rows]), pa.array(label)]
            self._labels.add(pa.record_batch(columns, schema=_LABELS), label.view(np.uint64))
        self._labels.close()

    def _follow_labels(self, cluster: np.ndarray, split: np.ndarray) -> tuple[int, int]:
        clusters = divided = 0
        by_donor = self._rule.by == "donor"
        for part in self._labels.parts():
            rows, draw, label = (part[n].to_numpy() for n in _LABELS.names)
            # A cluster takes the draw of one of its members, which must not depend on their order:
            # the least of another hash of the draw (the least draw would nearly always mean train).
            order = np.lexsort((mix(draw), label))
            first = np.concatenate([[True], np.diff(label[order]) != 0])
            chosen = draw[order][first][np.cumsum(first) - 1]
            cluster[rows] = label
            split[rows[order]] = splits.split_of(draw[order] if by_donor else chosen)
            clusters += int(first.sum())
            differing = (draw[order] != chosen).astype(np.int64)
            divided += int((np.add.reduceat(differing, np.flatnonzero(first)) > 0).sum())
        return clusters, divided

    def _cluster(self, cluster: np.ndarray, split: np.ndarray) -> int:
        clusters = 0
        for part in self._clones.parts():
            rows, draw, group, member = (part[n].to_numpy() for n in _CLONES.names[:4])
            lengths = pc.binary_length(part["cdr3"]).to_numpy()
            ids = np.where(lengths > 0, np.uint64(0), group)
            for length in np.unique(lengths[lengths > 0]):
                here = np.flatnonzero(lengths == length)
                cdr3 = part["cdr3"].take(pa.array(here)).combine_chunks()
                residues = np.frombuffer(b"".join(cdr3.to_pylist()), np.uint8).reshape(-1, length)
                ids[here] = _linked(residues, group[here], member[here], self._rule.identity)
            cluster[rows] = ids >> np.uint64(1)
            # The id of a cluster is its least member's hash, of which another hash is drawn: the
            # least hash itself would nearly always mean train.
            split[rows] = splits.split_of(draw if self._rule.by != "cluster" else mix(ids))
            clusters += len(np.unique(ids))
        return clusters


def _linked(cdr3: np.ndarray, group: np.ndarray, member: np.ndarray, identity: float) -> np.ndarray:
    """Clusters (uint64 `[n]`) of CDR3s of one length: the least member hash of each."""
    distinct, first, inverse = np.unique(member, return_index=True, return_inverse=True)
    labels = splits.link(cdr3[first], group[first], identity)
    # np.unique sorts, so the first of each label is its least member.
    least = distinct[np.unique(labels, return_index=True)[1]]
    return least[np.unique(labels, return_inverse=True)[1]][inverse]


def _completed(batch: pa.RecordBatch, source: str) -> pa.RecordBatch:
    """Gives every row an id and a source, and cuts alleles and ties off gene names."""
    names = batch.schema.names
    number = pc.binary_join_element_wise(source, batch[ROW].cast(pa.string()), ":")
    for name, default in (("sequence_id", number), ("source", pa.scalar(source))):
        if name in names:
            value = pc.if_else(pc.equal(batch[name], ""), default, batch[name])
            batch = batch.set_column(batch.schema.get_field_index(name), name, value)
        else:
            value = default if name == "sequence_id" else pa.array([source] * batch.num_rows)
            batch = batch.append_column(name, value)
    for chain in CHAINS:
        for gene in (f"v_gene_{chain}", f"j_gene_{chain}"):
            if gene in names:
                short = pc.replace_substring_regex(batch[gene], _AFTER_THE_GENE, "")
                batch = batch.set_column(batch.schema.get_field_index(gene), gene, short)
    return batch
