"""Real files and the simulator through `prepare` and two training steps each."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config

from moe_ablm import trainer
from moe_ablm.__main__ import main
from moe_ablm.data.dataset import SPLITS, Dataset
from moe_ablm.data.regions import CHAINS, region_names
from moe_ablm.results import read_results


def verb(name: str, *arguments) -> None:
    assert main(["moe_ablm", name, *map(str, arguments)]) == 0


def first_pairs(shared_data, tmp_path):
    """The first 200 annotated pairs of Jaffe et al. 2022."""
    rows = next(pq.ParquetFile(shared_data / "pairs.parquet").iter_batches(200))
    pq.write_table(pa.Table.from_batches([rows]), tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def oas_paired(shared_data, _):
    return shared_data / "oas" / "1279068_1.csv.gz"


def oas_paired_other(shared_data, _):
    return shared_data / "oas" / "SRR10358525.csv.gz"


def specificity(shared_data, _):
    return shared_data / "specificity.csv.gz"


def simulated(_, tmp_path):
    verb("simulate", "--pairs", 200, "--seed", 5, "--out", tmp_path / "simulated.parquet")
    return tmp_path / "simulated.parquet"


# where the rows come from, how many are read, and how many of them are kept at least
SOURCES = {
    first_pairs: ("table", 200, 200),
    oas_paired: ("oas-paired", 843, 830),
    oas_paired_other: ("oas-paired", 624, 615),
    specificity: ("table", 9843, 9700),
    simulated: ("table", 200, 200),
}


QUICK = (first_pairs, oas_paired)  # each trains; the others by --slow
TRAINED = [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SOURCES]


@pytest.mark.parametrize("source", TRAINED, ids=lambda source: source.__name__)
def test_a_source_is_prepared_and_trained_on(source, tmp_path, request):
    shared_data = None if source is simulated else request.getfixturevalue("shared_data")
    file, path = source(shared_data, tmp_path), tmp_path / "dataset"
    verb("prepare", "--input", file, "--out", path, "--workers", 1, "--on-bad-row", "skip")
    dataset = Dataset(path)
    (card,) = dataset.card["sources"]
    form, read, least = SOURCES[source]
    assert (card["format"], card["read"]) == (form, read)
    assert least <= card["kept"] == read - sum(card["rejected"].values())

    # the same shapes and schedule for all sources: the step is compiled once
    changes = {"train__steps": 2, "train__warmup": 0, "eval__every": 2, "checkpoint__every": 2}
    summary = trainer.run(tiny_config(data__path=str(path), **changes), tmp_path / "run")

    records = read_results(tmp_path / "run" / "results.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2]
    # a model that knows nothing yet: near the entropy of 33 even tokens, and it is learning
    assert all(abs(r["loss"] - math.log(33)) < 1 and r["update_norm"] > 0 for r in steps)
    assert summary["status"] == "complete"
    # every region of both chains has been masked and evaluated: annotation arrives in the batches
    assert set(summary["valid_loss_by_region"]) == set(region_names())
    # <cls> H <cls><cls> L <eos>
    rows = pa.Table.from_batches(dataset.batches())
    rows = rows.filter(pc.equal(rows["split"], SPLITS.index("train")))
    residues = [pc.list_value_length(rows[f"{c}_tokens"]).to_numpy() for c in CHAINS]
    assert summary["corpus_tokens"] == np.sum(residues) + 4 * len(rows)
    # two updates show some of them, and no light chain twice
    assert 0 < summary["unique_tokens"] <= min(summary["corpus_tokens"], summary["tokens_seen"])
