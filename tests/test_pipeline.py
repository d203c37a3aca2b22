"""Batches against rows spelt out in plain Python; determinism, resume, hosts, crops."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_datasets import Record, random_records, write_dataset

from moe_ablm.data import dataset as dataset_module
from moe_ablm.data import pipeline
from moe_ablm.data import sequences as forms
from moe_ablm.data.antibody import Antibody, row_of
from moe_ablm.data.assemble import Masking
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.masking import UNIFORM, parse_policy
from moe_ablm.data.mixture import Batching, Mixture, parse_regime
from moe_ablm.data.pipeline import TrainBatches, evaluation_batches, train_iterator
from moe_ablm.data.prepare import prepare_batches
from moe_ablm.data.tokenizer import AMINO_ACIDS, LAYOUTS, MASK, PAD, VOCABULARY, is_amino_acid


def source(
    datasets, *, regime="paired", kind="padded", rows=6, length=64, layout="esm", buckets=(),
    mask="uniform", mean=0.15, seed=0, steps=60, process=(0, 1), split="train",
):  # fmt: skip
    m = Mixture(
        datasets,
        [d.rows(split) for d in datasets],
        parse_regime(regime),
        Batching(kind, rows, length, layout, buckets),
        seed=seed,
        steps=steps,
    )
    return TrainBatches(m, Masking(parse_policy(mask), mean, seed), process)


@pytest.fixture(scope="module")
def records():
    made = random_records(40, seed=1)
    made[5] = Record("", made[5].light, "", made[5].light_cdr)
    made[9] = Record(made[9].heavy, "", made[9].heavy_cdr)
    return made


@pytest.fixture(scope="module")
def antibodies(tmp_path_factory, records):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "ROWS_PER_BATCH", 7)
        return write_dataset(tmp_path_factory.mktemp("data") / "antibodies", records)


def plain_regions(cdr: str) -> list[int]:
    """FR1 CDR1 ... FR4 are 1 to 7; walks from the end of the chain."""
    codes, following = [], 7
    for c in reversed(cdr):
        if c == "0":
            codes.append(following)
        else:
            codes.append(2 * int(c))
            following = 2 * int(c) - 1
    return codes[::-1]


def spell(record: Record, layout: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens, segments and regions of a record, token by token."""
    ids = {letter: i for i, letter in enumerate(VOCABULARY)}
    special = LAYOUTS[layout]
    chains = [(1, record.heavy, record.heavy_cdr), (2, record.light, record.light_cdr)]
    chains = [c for c in chains if c[1]]
    tokens, segment, region = [], [], []

    def put(token: int, code: int, where: int) -> None:
        tokens.append(token)
        segment.append(code)
        region.append(where)

    for token in special.before:
        put(token, chains[0][0], 0)
    for i, (code, letters, cdr) in enumerate(chains):
        if i:
            for token in special.between:
                put(token, 1, 0)
        for letter, where in zip(letters, plain_regions(cdr) or [0] * len(letters), strict=True):
            put(ids[letter], code, where)
    for token in special.after:
        put(token, chains[-1][0], 0)
    return tokens, segment, region


def split_row(batch, row):
    """The sequences of a row: (tokens, segment, region), by their number in `antibody`."""
    number = batch["antibody"][row]
    found = []
    for n in range(1, number.max() + 1):
        at = np.flatnonzero(number == n)
        assert (np.diff(at) == 1).all()
        assert batch["position"][row][at].tolist() == list(range(len(at)))
        found.append(tuple(batch[k][row][at].tolist() for k in ("targets", "segment", "region")))
    pad = number == 0
    for name, empty in (("targets", PAD), ("tokens", PAD), ("segment", 0), ("region", 0),
                        ("position", 0), ("loss_mask", 0)):  # fmt: skip
        assert (batch[name][row][pad] == empty).all()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["padded", "packed", "bucketed"])
def test_an_epoch_spells_out_every_record(antibodies, records, layout, kind):
    s = source([antibodies], kind=kind, layout=layout, buckets=(30, 64), steps=40)
    found = []
    for step in range(40):
        batch = s[step]
        for row in range(6):
            found += split_row(batch, row)
    expected = sorted(spell(r, layout) for r in records)
    if kind == "padded":
        assert sorted(found[:40]) == sorted(found[40:80]) == expected
        assert len(found) == 240
    else:
        assert {tuple(map(tuple, x)) for x in found} == {tuple(map(tuple, x)) for x in expected}


def test_shapes_and_types(antibodies):
    batch = source([antibodies])[0]
    assert {k: v.dtype for k, v in batch.items()} == {
        "tokens": np.uint8, "targets": np.uint8, "loss_mask": bool, "segment": np.uint8,
        "region": np.uint8, "antibody": np.uint8, "position": np.uint16,
    }  # fmt: skip
    assert {v.shape for v in batch.values()} == {(6, 64)}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


EVERY = [
    {},
    {"regime": "shuffled"},
    {"regime": "unpaired"},
    {"regime": "mixed:0.5"},
    {"regime": "curriculum:sigmoid"},
    {"kind": "bucketed", "buckets": (30, 64)},
    {"kind": "packed", "length": 100},
    {"kind": "packed", "length": 100, "regime": "mixed:0.5"},
    {"mask": "cdr3:0.25"},
    {"mask": "nongermline:0.4"},
    {"mask": "span"},
]


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_a_batch_is_a_function_of_seed_and_step(antibodies, options):
    s, again = (source([antibodies], **options) for _ in range(2))
    backwards = [again[t] for t in reversed(range(12))][::-1]
    assert all(same(s[t], backwards[t]) for t in range(12))
    other = source([antibodies], seed=1, **options)
    assert not same(s[0], other[0])


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_the_hosts_make_the_global_batch(antibodies, options, count):
    whole = source([antibodies], **options)
    parts = [source([antibodies], process=(i, count), **options) for i in range(count)]
    for step in (0, 7):
        joined = {k: np.concatenate([p[step][k] for p in parts]) for k in whole[step]}
        assert same(joined, whole[step])


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_resuming_equals_going_on(antibodies, options):
    s = source([antibodies], steps=20, **options)
    whole = list(train_iterator(s, 0, threads=2))
    assert len(whole) == 20
    for first in (1, 13):
        resumed = list(train_iterator(s, first, threads=1))
        assert len(resumed) == 20 - first
        assert all(same(a, b) for a, b in zip(resumed, whole[first:], strict=True))


def masks_by_record(s, steps) -> dict:
    """Corrupted tokens by (targets, occurrence) of every record shown."""
    found = {}
    for step in range(steps):
        batch = s[step]
        for row in range(len(batch["tokens"])):
            for n in range(1, batch["antibody"][row].max() + 1):
                at = batch["antibody"][row] == n
                key = batch["targets"][row][at].tobytes()
                found.setdefault(key, []).append(batch["tokens"][row][at].tolist())
    return found


@pytest.mark.parametrize("mask", ["uniform", "cdr3:0.25", "nongermline:0.4", "span"])
def test_a_records_mask_does_not_depend_on_its_batch(antibodies, mask):
    """(seed, record, epoch) decide: other batch sizes, lengths and packing give the same masks."""
    base = masks_by_record(source([antibodies], mask=mask), 20)  # 120 rows: 3 epochs
    wide = masks_by_record(source([antibodies], mask=mask, rows=40, length=50), 3)
    packed = source([antibodies], mask=mask, kind="packed", rows=5, length=120, steps=60)
    packed = masks_by_record(packed, 60)
    assert base == wide
    for key, seen in base.items():
        assert packed[key][:3] == seen
    assert any(seen[0] != seen[1] for seen in base.values())  # epochs differ


def test_only_amino_acids_are_selected_and_put_in(antibodies):
    for mask in ("uniform", "span", "cdr3:0.5"):
        s = source([antibodies], mask=mask, rows=40, mean=0.5)
        for batch in (s[t] for t in range(10)):
            special = ~is_amino_acid(batch["targets"])
            assert not batch["loss_mask"][special].any()
            new = batch["tokens"][batch["loss_mask"]]
            assert (is_amino_acid(new) | (new == MASK)).all()
            assert (batch["tokens"] == batch["targets"])[~batch["loss_mask"]].all()


def test_policies_prefer_their_residues(antibodies, records):
    shares = {}
    for mask in ("uniform", "cdr3:0.25", "span"):
        s = source([antibodies], mask=mask, rows=200, steps=80)
        chosen, total = np.zeros(8), np.zeros(8)
        for step in range(80):
            batch = s[step]
            residue = is_amino_acid(batch["targets"])
            chosen += np.bincount(batch["region"][residue & batch["loss_mask"]], minlength=8)
            total += np.bincount(batch["region"][residue], minlength=8)
        shares[mask] = chosen[1:] / total[1:], chosen.sum() / total.sum()
    for _, mean in shares.values():
        assert mean == pytest.approx(0.15, abs=0.004)
    assert shares["uniform"][0] == pytest.approx(np.full(7, 0.15), abs=0.01)
    assert shares["span"][0] == pytest.approx(np.full(7, 0.15), abs=0.012)
    assert shares["cdr3:0.25"][0][5] == pytest.approx(0.25, abs=0.01)
    assert shares["cdr3:0.25"][0][0] < 0.13


def test_mutated_residues_are_preferred(tmp_path):
    made = random_records(30, seed=8)
    d = write_dataset(tmp_path / "d", made)
    mutated = {
        tuple(spell(r, "esm")[0]): [0] + [int(c) for c in r.heavy_mutated] + [0, 0]
        + [int(c) for c in r.light_mutated] + [0]
        for r in made
    }  # fmt: skip
    chosen, total = np.zeros(2), np.zeros(2)
    s = source([d], mask="nongermline:0.3", rows=30, steps=150)
    for step in range(150):
        batch = s[step]
        for row in range(30):
            at = batch["antibody"][row] == 1
            targets = batch["targets"][row][at]
            flag = np.array(mutated[tuple(targets.tolist())])
            residue = is_amino_acid(targets)
            total += np.bincount(flag[residue], minlength=2)
            chosen += np.bincount(flag[residue & batch["loss_mask"][row][at]], minlength=2)
    assert chosen[1] / total[1] == pytest.approx(0.3, abs=0.02)
    assert chosen.sum() / total.sum() == pytest.approx(0.15, abs=0.006)


def test_spans_in_a_batch_are_longer_than_by_chance(antibodies):
    s = source([antibodies], mask="span", rows=40, steps=100)
    runs = selected = 0
    for step in range(100):
        chosen = np.pad(s[step]["loss_mask"], ((0, 0), (1, 0))).astype(int)
        runs += (np.diff(chosen, axis=1) == 1).sum()
        selected += chosen.sum()
    assert selected / runs > 2.5  # chains of 9 to 16 residues cut most spans


# --- proteins


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    rng = np.random.default_rng(3)
    made = [Record("".join(rng.choice(list(AMINO_ACIDS), n)), "") for n in (50, 14, 15, 200)]
    made.append(random_records(1, seed=4, shortest=30, longest=30)[0])  # an antibody, too long
    d = write_dataset(tmp_path_factory.mktemp("data") / "proteins", made)
    return d, made


def test_long_proteins_are_cropped_and_long_antibodies_left_out(proteins):
    d, made = proteins
    s = source([d], length=16, rows=4, steps=400)
    assert s._mixture.left_out == 1
    texts = [r.heavy for r in made[:4]]
    starts = [set(), set(), set(), set()]
    for step in range(400):
        batch = s[step]
        for targets in batch["targets"]:
            letters = "".join(VOCABULARY[t] for t in targets if 4 <= t < 24)
            assert targets[0] == 0 and targets[len(letters) + 1] == 2
            which = [i for i, text in enumerate(texts) if letters in text]
            assert len(which) == 1
            assert len(letters) == min(14, len(texts[which[0]]))
            starts[which[0]].add(texts[which[0]].find(letters))
    assert starts[1] == {0}
    assert starts[2] == {0, 1}
    assert starts[0] == set(range(50 - 14 + 1))
    assert len(starts[3]) > 150


def test_crops_come_from_record_and_epoch(proteins):
    d, _ = proteins
    padded = masks_by_record(source([d], length=16, rows=4), 5)
    packed = masks_by_record(source([d], length=16, rows=2, kind="packed"), 10)
    assert {k: sorted(v) for k, v in padded.items()} == {k: sorted(v) for k, v in packed.items()}


def test_crops_do_not_stop_at_a_chain_of_a_pair(tmp_path):
    """A pair is never cropped, a single unannotated chain is, whichever it is."""
    rng = np.random.default_rng(5)
    letters = "".join(rng.choice(list(AMINO_ACIDS), 30))
    d = write_dataset(tmp_path / "d", [Record("", letters), Record(letters, letters)])
    kept, left_out = forms.fitting(d, forms.stored(d, np.arange(2)), LAYOUTS["esm"], 20)
    assert left_out == 1
    assert kept.light.tolist() == [0]
    batch = source([d], length=20, rows=1)[0]
    assert (batch["segment"] == 2).all()


# --- evaluation


def evaluation(d, count, rows, mask=UNIFORM, length=64, seed=7):
    sample = pipeline.evaluation_sample(forms.stored(d, d.rows("train")), count)
    return list(evaluation_batches([(d, sample)], (rows, length), "esm", Masking(mask, 0.15, seed)))


def test_evaluation_is_the_same_every_time_and_in_every_batch_size(antibodies):
    one, two = evaluation(antibodies, 25, 10), evaluation(antibodies, 25, 10)
    assert len(one) == 3
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert {v.shape for b in one for v in b.values()} == {(10, 64)}
    last = one[-1]
    assert (last["antibody"][5:] == 0).all() and (last["targets"][5:] == PAD).all()
    joined = {k: np.concatenate([b[k] for b in one])[:25] for k in one[0]}
    wide = evaluation(antibodies, 25, 25)[0]
    assert same(joined, wide)


def test_a_larger_sample_holds_the_smaller(antibodies):
    small, large = (
        {row.tobytes() for b in evaluation(antibodies, n, 5) for row in b["targets"]}
        for n in (10, 20)
    )
    assert small < large
    assert len(evaluation(antibodies, 10_000, 5)) == 8


def test_evaluation_of_several_datasets(antibodies, proteins):
    samples = [
        (antibodies, forms.stored(antibodies, np.arange(3))),
        (proteins[0], forms.stored(proteins[0], np.arange(2))),
    ]
    batch = next(evaluation_batches(samples, (5, 40), "esm", Masking(UNIFORM, 0.15, 0)))
    alone = next(evaluation_batches(samples[1:], (2, 40), "esm", Masking(UNIFORM, 0.15, 0)))
    assert same({k: v[3:] for k, v in batch.items()}, alone)


def test_two_datasets_in_one_batch(antibodies, proteins, records):
    s = source([antibodies, proteins[0]], length=63, rows=20)
    expected = {tuple(spell(r, "esm")[0]) for r in records}
    expected |= {tuple(spell(r, "esm")[0]) for r in proteins[1][:3]}
    found = set()
    for step in range(12):
        batch = s[step]
        for row in range(20):
            found |= {tuple(targets) for targets, _, _ in split_row(batch, row)}
    cropped = {t for t in found if len(t) == 63}
    assert found - cropped == expected
    assert cropped


# --- real pairs


def test_real_pairs_in_every_regime(shared_data, tmp_path):
    """The first 2,000 real pairs: every regime shows their sequences, packed as well."""
    batch = next(pq.ParquetFile(shared_data / "pairs.parquet").iter_batches(2_000))
    prepare_batches([batch], tmp_path / "d", source="pairs", licence="see data")
    d = Dataset(tmp_path / "d")
    heavy, light = (set(batch[f"sequence_aa_{c}"].to_pylist()) for c in ("heavy", "light"))
    for options in EVERY:
        options = options | {"length": 480 if options.get("kind") == "packed" else 256}
        if "buckets" in options:
            options["buckets"] = (240, 256)
        b = source([d], rows=12, **options)[0]
        for targets in b["targets"]:
            letters = "".join(VOCABULARY[t] if 4 <= t < 24 else " " for t in targets)
            chains = {letters[a:z] for a, z in _runs(is_amino_acid(targets))}
            assert chains <= heavy | light and chains
    packed = source([d], kind="packed", rows=12, length=480)
    filled = np.mean([(packed[t]["antibody"] > 0).mean() for t in range(20)])
    assert filled > 0.95


def _runs(residue):
    edges = np.flatnonzero(np.diff(np.pad(residue.astype(int), 1)))
    return zip(edges[::2], edges[1::2], strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_in_training_and_in_inference(antibodies, records, layout):
    stored = forms.stored(antibodies, np.arange(len(records)))
    shape = len(records), int(stored.tokens(antibodies, LAYOUTS[layout]).max())
    masking = Masking(UNIFORM, 0.15, 0)
    (batch,) = evaluation_batches([(antibodies, stored)], shape, layout, masking)
    for record, targets in zip(records, batch["targets"], strict=True):
        row = row_of(Antibody("", record.heavy, record.light), LAYOUTS[layout])
        padding = [PAD] * (shape[1] - len(row.tokens))
        assert [*row.tokens.tolist(), *padding] == targets.tolist()
        np.testing.assert_array_equal(row.places, np.flatnonzero(is_amino_acid(row.tokens)))
