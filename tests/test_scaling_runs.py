"""Reading tables of runs: what is believed, what is dropped with a reason, what is an error."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_ablm.errors import UserError
from moe_ablm.scaling.noise import pure_error
from moe_ablm.scaling.reading import Reading, read_runs

GOOD = """params,tokens,unique_tokens,loss
8e6,1e9,1e9,3.1
35e6,1e9,1e9,2.9
150e6,1e9,1e9,2.8
"""


def write(path, text):
    path.write_text(text)
    return path


def test_columns_of_the_same_name_need_no_mapping(tmp_path):
    runs = read_runs([write(tmp_path / "r.csv", GOOD)])
    assert runs["params"].tolist() == [8e6, 35e6, 150e6]
    assert runs["loss"].tolist() == [3.1, 2.9, 2.8]
    assert runs.source[0].endswith("r.csv, row 2")
    assert not runs.dropped


def test_gz_tsv_and_parquet_give_the_same_table(tmp_path):
    plain = read_runs([write(tmp_path / "r.csv", GOOD)])
    with gzip.open(tmp_path / "r.tsv.gz", "wt") as file:
        file.write(GOOD.replace(",", "\t"))
    columns = {k: plain[k] for k in ("params", "tokens", "unique_tokens", "loss")}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    for name in ("r.tsv.gz", "r.parquet"):
        runs = read_runs([tmp_path / name])
        for role in columns:
            np.testing.assert_array_equal(runs[role], plain[role])


def test_mapping_suffixes_and_tokens_from_flops(tmp_path):
    path = write(tmp_path / "r.csv", "size,C,L\n8M,4.8e16,3\n1.5B,9e18,2\n")
    runs = read_runs([path], Reading(columns={"params": "size", "flops": "C", "loss": "L"}))
    assert runs["params"].tolist() == [8e6, 1.5e9]
    np.testing.assert_allclose(runs["tokens"], [4.8e16 / 6 / 8e6, 1e9])


@pytest.mark.parametrize(
    "row, expected",
    [
        ("35e6,1e9,1e9,nan", ["row 3", "column 'loss'", "nan", "finite"]),
        ("35e6,1e9,1e9,-2", ["row 3", "column 'loss'", "-2", "positive"]),
        ("35e6,1e9,1e9,0", ["row 3", "column 'loss'", "positive"]),
        ("35e6,inf,1e9,3", ["row 3", "column 'tokens'", "finite"]),
        ("thirty,1e9,1e9,3", ["row 3", "column 'params'", "'thirty'", "number"]),
        ("35,1e9,1e9,3", ["row 3", "column 'params'", "35M"]),
        ("35e6,1e8,1e9,3", ["row 3", "'tokens'", "'unique_tokens'", "swapped"]),
        ("35e6,1e9,1e9", ["row 3", "3 cells", "4 columns"]),
        (",1e9,1e9,3", ["row 3", "column 'params'", "empty"]),
        ("1e300,1e9,1e9,3", ["row 3", "column 'params'", "too many"]),
        ("35e6,1e9,1e9,1e300", ["row 3", "column 'loss'", "no loss"]),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_row_and_column(tmp_path, row, expected):
    path = write(tmp_path / "bad.csv", GOOD.replace("35e6,1e9,1e9,2.9", row))
    with pytest.raises(UserError) as error:
        read_runs([path])
    message = str(error.value)
    assert "\n" not in message and "bad.csv" in message
    for word in expected:
        assert word in message


def test_bad_rows_can_be_dropped_and_the_reason_stays(tmp_path):
    path = write(tmp_path / "bad.csv", GOOD.replace("2.9", "nan"))
    runs = read_runs([path], Reading(drop_bad_rows=True))
    assert len(runs) == 2
    ((source, reason),) = runs.dropped
    assert "row 3" in source and "'loss'" in reason


def test_a_run_without_a_loss_yet_is_dropped_with_a_reason(tmp_path):
    path = write(tmp_path / "r.csv", GOOD.replace("2.9", ""))
    runs = read_runs([path])
    assert len(runs) == 2 and "empty" in runs.dropped[0][1]


def test_duplicates_are_dropped_and_replicates_are_kept(tmp_path):
    extra = "8e6,1e9,1e9,3.1\n8e6,1e9,1e9,3.11\n"
    runs = read_runs([write(tmp_path / "r.csv", GOOD + extra)])
    assert len(runs) == 4
    ((source, reason),) = runs.dropped
    assert "row 5" in source and "duplicate" in reason and "row 2" in reason
    assert np.bincount(runs.cells()).max() == 2


def test_only_the_last_step_of_a_run_counts(tmp_path):
    text = "run,step,params,experts,loss\na,10,8e6,4,3\na,20,8e6,4,2.5\nb,10,9e6,4,2.9\n"
    runs = read_runs([write(tmp_path / "r.csv", text)])
    assert sorted(runs["loss"].tolist()) == [2.5, 2.9]
    assert "last step of run a" in runs.dropped[0][1]
    assert len(read_runs([tmp_path / "r.csv"], Reading(curves=True))) == 3


def test_largest_losses_are_dropped_by_name(tmp_path):
    runs = read_runs([write(tmp_path / "r.csv", GOOD)], Reading(drop_largest_losses=1))
    assert runs["loss"].max() == 2.9 and "largest" in runs.dropped[0][1]
    with pytest.raises(UserError, match="only 3 rows"):
        read_runs([tmp_path / "r.csv"], Reading(drop_largest_losses=3))


def test_where_keeps_equal_values_as_numbers_or_text(tmp_path):
    text = "params,tokens,loss,k,kind\n8e6,1e9,3,1,a\n9e6,1e9,3,2,a\n7e6,1e9,3,1.0,b\n"
    path = write(tmp_path / "r.csv", text)
    assert len(read_runs([path], Reading(where={"k": "1"}))) == 2
    assert len(read_runs([path], Reading(where={"k": "1", "kind": "b"}))) == 1
    with pytest.raises(UserError, match="no such column"):
        read_runs([path], Reading(where={"x": "1"}))


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("r.csv", "", "no header"),
        ("r.csv", "params,params,loss\n1,2,3\n", "twice"),
        ("r.csv", "params,tokens,loss\n", "no usable row"),
        ("r.csv", "params,tokens\n8e6,1e9\n", "no column for the loss"),
        ("r.csv", 'params,loss\n"8e6,3\n', "damaged"),
        ("r.csv.gz", "not gzip", "cannot be read"),
        ("r.parquet", "not parquet", "parquet"),
        ("r.txt", GOOD, "expected .csv"),
    ],
)
def test_damaged_files_are_user_errors(tmp_path, name, content, word):
    with pytest.raises(UserError, match=word):
        read_runs([write(tmp_path / name, content)])


def test_unknown_roles_columns_and_paths_are_user_errors(tmp_path):
    path = write(tmp_path / "r.csv", GOOD)
    with pytest.raises(UserError, match="unknown role"):
        read_runs([path], Reading(columns={"size": "params"}))
    with pytest.raises(UserError, match="no such column; it has params"):
        read_runs([path], Reading(columns={"params": "N"}))
    with pytest.raises(UserError, match="no such file"):
        read_runs([tmp_path / "absent.csv"])
    (tmp_path / "latin.csv").write_bytes(b"params,loss\n\xff\xfe,3\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_runs([tmp_path / "latin.csv"])


def make_run(directory, **changes):
    directory.mkdir(parents=True)
    values = {
        "fingerprint": directory.name,
        "status": "complete",
        "params_total": 16_000_000,
        "params_active": 8_000_000,
        "unique_tokens": 1_000_000_000,
        "tokens_seen": 4_000_000_000,
        "flops": 2e17,
        "seed": 0,
        "router": "topk",
        "experts": 8,
        "valid_loss_final": 2.5,
    }
    (directory / "run.json").write_text(json.dumps(values | changes))
    lines = [
        {"kind": "train", "step": 5, "tokens_seen": 1e9, "loss": 9.0},
        {"kind": "eval", "step": 10, "tokens_seen": 2e9, "loss": 2.8},
        {"kind": "eval", "step": 20, "tokens_seen": 4e9, "loss": 2.5},
    ]
    (directory / "results.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def test_run_directories(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "dense", router="none", experts=0, params_total=8_000_000)
    make_run(tmp_path / "short", tokens_seen=500_000_000)
    make_run(tmp_path / "half", status="running")
    make_run(tmp_path / "diverged", valid_loss_final=float("nan"))
    runs = read_runs([tmp_path])
    assert len(runs) == 3
    assert dict(zip(runs["router"], runs["experts"], strict=True)) == {"topk": 8.0, "dense": 1.0}
    assert runs["total_params"].tolist() == [16e6, 8e6, 16e6]
    assert runs["unique_tokens"].tolist() == [1e9, 1e9, 5e8]
    reasons = " ".join(reason for _, reason in runs.dropped)
    assert "running" in reasons and "valid_loss_final" in reasons
    assert any("before one epoch" in note for note in runs.notes)


def test_what_computed_a_run_is_no_part_of_the_table(tmp_path):
    execution = {"device_kind": "cpu", "devices": 1, "mesh": {"data": 1}, "versions": {"jax": "0"}}
    make_run(tmp_path / "before")  # as earlier versions left it
    make_run(tmp_path / "now", seed=1, execution=execution)
    make_run(tmp_path / "copy", seed=1, execution=execution | {"devices": 8})
    runs = read_runs([tmp_path])
    assert len(runs) == 2 and "duplicate of" in runs.dropped[0][1]
    assert "execution" not in runs.columns
    assert len(read_runs([tmp_path], Reading(where={"seed": "1"}))) == 1


def test_training_curves_of_run_directories(tmp_path):
    make_run(tmp_path / "a")
    runs = read_runs([tmp_path], Reading(curves=True))
    assert runs["loss"].tolist() == [2.8, 2.5]
    np.testing.assert_allclose(runs["flops"], [1e17, 2e17])


@pytest.mark.parametrize(("schedule", "rows"), [("wsd", 2), ("constant", 1)])
def test_of_a_run_that_was_extended_only_a_cooled_end_counts(schedule, rows, tmp_path):
    """As a row of its own; its curve is that of the longer run."""
    make_run(tmp_path / "a")
    aside = tmp_path / "a" / "ended-at-10"
    make_run(aside, tokens_seen=2_000_000_000, valid_loss_final=2.7)
    (aside / "config.json").write_text(json.dumps({"config": {"train": {"schedule": schedule}}}))
    assert len(read_runs([tmp_path])) == rows
    whole = read_runs([tmp_path], Reading(curves=True))
    assert whole["loss"].tolist() == [2.8, 2.5] and len(set(whole.clusters())) == 1
    assert any("has its curve" in reason for _, reason in whole.dropped)


def test_runs_that_tell_novel_chains_apart_are_fitted_on_those(tmp_path):
    now = {"corpus_tokens": 1_500_000_000, "valid_loss_novel": 2.75}
    make_run(tmp_path / "a", **now)
    make_run(tmp_path / "b", seed=1, **now | {"valid_loss_novel": 2.875})
    runs = read_runs([tmp_path])
    assert runs["loss"].tolist() == [2.75, 2.875]
    assert runs["unique_tokens"].tolist() == [1e9, 1e9]
    assert any("novel chains" in n and "valid_loss_final" in n for n in runs.notes)
    chosen = read_runs([tmp_path], Reading(columns={"loss": "valid_loss_final"}))
    assert chosen["loss"].tolist() == [2.5, 2.5] and not chosen.notes


def test_runs_of_before_among_others_make_all_of_them_alike(tmp_path):
    """One kind of loss and one count of unique tokens in a table, and notes that say which."""
    make_run(tmp_path / "a", corpus_tokens=1_500_000_000, valid_loss_novel=2.75)
    make_run(tmp_path / "b", seed=1)
    runs = read_runs([tmp_path])
    assert runs["loss"].tolist() == [2.5, 2.5]
    assert runs["unique_tokens"].tolist() == [1.5e9, 1e9]  # both of the corpus
    told = " ".join(runs.notes)
    assert "1 of 2 rows have none of novel chains" in told
    assert "1 of 2 runs are of before different ones were counted" in told


def test_curves_are_of_novel_chains_where_all_evaluations_have_them(tmp_path):
    make_run(tmp_path / "a", corpus_tokens=10**9, valid_loss_novel=2.75)
    file = tmp_path / "a" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, loss in zip(lines[1:], (3.25, 2.75), strict=True):
        line["loss_novel"] = loss
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_runs([tmp_path], Reading(curves=True))["loss"].tolist() == [3.25, 2.75]
    del lines[1]["loss_novel"]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_runs([tmp_path], Reading(curves=True))["loss"].tolist() == [2.8, 2.5]


def smooth_table(changed=(), convert=None):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    loss = 1.8 + 400 * n**-0.34 + 1000 * d**-0.34
    for i in changed:
        loss[i] = convert(loss[i])
    rows = [f"{a},{b},{c}" for a, b, c in zip(n, d, loss, strict=True)]
    return "params,tokens,loss\n" + "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    "convert, word", [(lambda x: x / np.log(2), "bits"), (np.exp, "perplexities")]
)
@pytest.mark.parametrize("changed", [(12,), (0, 7, 13)])
def test_mixed_loss_units_are_found(tmp_path, convert, word, changed):
    path = write(tmp_path / "r.csv", smooth_table(changed, convert))
    with pytest.raises(UserError, match=word) as error:
        read_runs([path])
    assert f"row {changed[0] + 2}" in str(error.value)
    runs = read_runs([path], Reading(drop_bad_rows=True))
    assert len(runs) == 25 - len(changed)


def test_one_unit_is_not_called_mixed(tmp_path):
    assert len(read_runs([write(tmp_path / "r.csv", smooth_table())])) == 25


def test_pairs_need_one_unit_with_tokens(tmp_path):
    text = "params,tokens,pairs,loss\n8e6,1e9,400000,3\n9e6,1e9,400000,2.9\n"
    path = write(tmp_path / "r.csv", text)
    with pytest.raises(UserError, match="tokens-per-pair"):
        read_runs([path], Reading(columns={"unique_pairs": "pairs"}))
    reading = Reading(columns={"unique_pairs": "pairs"}, tokens_per_pair=240.0)
    assert read_runs([path], reading)["unique_tokens"].tolist() == [96e6, 96e6]


def test_flops_of_another_unit_are_an_error(tmp_path):
    good = "params,tokens,flops,loss\n8e6,1e9,5e16,3\n35e6,1e9,2e17,2.9\n"
    assert len(read_runs([write(tmp_path / "r.csv", good)])) == 2
    with pytest.raises(UserError, match="row 3, column 'flops'.*another unit"):
        read_runs([write(tmp_path / "r.csv", good.replace("2e17", "2e5"))])


def test_pairs_in_millions_are_an_error(tmp_path):
    path = write(tmp_path / "r.csv", "params,unique_pairs,loss\n8e6,0.4,3\n")
    with pytest.raises(UserError, match="row 2, column 'unique_pairs'.*0.4M"):
        read_runs([path])
    path = write(tmp_path / "r.csv", "params,unique_pairs,loss\n8e6,0.4M,3\n")
    assert read_runs([path])["unique_tokens"].tolist() == [4e5]


def test_tokens_that_are_few_beside_the_parameters_are_doubted(tmp_path):
    assert not read_runs([write(tmp_path / "r.csv", GOOD)]).notes
    path = write(tmp_path / "r.csv", "params,tokens,loss\n8e6,1e3,3\n35e6,4e3,2.9\n")
    assert "thousands or millions" in " ".join(read_runs([path]).notes)


def test_a_copied_run_directory_is_a_duplicate_and_no_replicate(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "other_seed", seed=1, valid_loss_final=2.51)
    make_run(tmp_path / "backup")
    runs = read_runs([tmp_path])
    assert len(runs) == 2
    assert "duplicate of" in runs.dropped[0][1]


@pytest.mark.parametrize("name", ["run.json", "results.jsonl"])
def test_a_run_cut_in_half_is_an_error_or_dropped_by_name(tmp_path, name):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    text = (tmp_path / "b" / name).read_text()
    (tmp_path / "b" / name).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=f"b/{name}.*JSON.*--drop-bad-rows"):
        read_runs([tmp_path], Reading(curves=True))
    runs = read_runs([tmp_path], Reading(curves=True, drop_bad_rows=True))
    assert len(runs) == 2 and name in runs.dropped[0][1]


def test_an_empty_table_says_so(tmp_path):
    with pytest.raises(UserError, match="nothing below the header"):
        read_runs([write(tmp_path / "r.csv", "params,tokens,loss\n")])


def test_checkpoints_with_their_own_tokens_are_kept_and_belong_to_their_run(tmp_path):
    text = "run,step,params,tokens,loss\na,10,8e6,1e9,3\na,20,8e6,2e9,2.5\nb,10,8e6,1e9,2.9\n"
    runs = read_runs([write(tmp_path / "r.csv", text)])
    assert len(runs) == 3 and not runs.dropped
    assert runs.clusters().tolist() == [0, 0, 1]
    assert runs.cells().tolist() == [0, 1, 0] and np.unique(runs.linked_cells()).size == 1
    assert any("3 checkpoints of 2 runs" in note for note in runs.notes)


def test_replicates_may_differ_in_tokens_by_the_lengths_of_their_sequences(tmp_path):
    """Ten tokens counts .03 % apart are one cell; .5 % apart they are two."""
    rows = [f"8e6,{1e9 * (1 + 3e-4 * i):.0f},3.{i}" for i in range(3)] + ["8e6,1.006e9,3"]
    runs = read_runs([write(tmp_path / "r.csv", "\n".join(["params,tokens,loss", *rows]))])
    assert runs.cells().tolist() == [0, 0, 0, 1]


def test_learning_rates_and_batches_are_no_seeds(tmp_path):
    """Two cells, three rates, two batches, two seeds each: the best setting's two seeds stay."""
    lines = ["params,tokens,lr,bs,seed,loss"]
    for n in (1e7, 1e8):
        for lr, worse in ((1e-4, 0.2), (1e-3, 0.0), (1e-2, 0.5)):
            for bs, more in ((32, 0.01), (64, 0.0)):
                lines += [f"{n:g},1e9,{lr},{bs},{s},{3 + worse + more + 0.001 * s}" for s in (0, 1)]
    runs = read_runs([write(tmp_path / "r.csv", "\n".join(lines))])
    assert len(runs) == 4 and runs["loss"].tolist() == [3.0, 3.001] * 2
    assert set(runs["lr"]) == {1e-3} and set(runs["batch"]) == {64.0}
    assert len(runs.dropped) == 20 and "best lr, batch of its cell" in runs.dropped[0][1]
    assert any("12 settings of lr, batch in 2 cells" in note for note in runs.notes)
    sd, freedom = pure_error(runs)
    assert freedom == 2 and sd == pytest.approx(np.std(np.log([3.0, 3.001]), ddof=1), rel=1e-9)


def test_a_rate_that_goes_with_the_size_drops_nothing(tmp_path):
    text = "params,tokens,lr,weight_decay,loss\n8e6,1e9,1e-3,0,3\n9e6,1e9,1e-4,0,2.9\n"
    assert len(read_runs([write(tmp_path / "r.csv", text)])) == 2


def test_equal_rows_may_be_replicates(tmp_path):
    text = GOOD + "8e6,1e9,1e9,3.1\n"
    path = write(tmp_path / "r.csv", text)
    assert len(read_runs([path])) == 3
    kept = read_runs([path], Reading(keep_duplicates=True))
    assert len(kept) == 4 and not kept.dropped
