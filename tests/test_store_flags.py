"""Verbs whose flags name addresses: fetched before, copied up when whole."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from folder_store import UNREACHABLE, FolderStore, counting, failing, fill, tree, write_run

from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.store_copies import fetched
from moe_ablm.store_flags import at_hand


def test_curves_need_no_parameters(bucket):
    write_run(bucket / "sweep/a", {4: 2.0})
    args = argparse.Namespace(verb="fit", input=["s3://bucket/sweep", "runs.csv"])
    with at_hand(args):
        assert args.input[1] == "runs.csv"
        assert tree(Path(args.input[0])) == {"a/config.json": "{}", "a/results.jsonl": ""}


def test_a_dataset_is_made_from_a_store_in_a_store(simulated_table, bucket, main, tmp_path):
    shutil.copy(simulated_table, bucket / "pairs.parquet")
    flags = ("--workers", "1", "--licence", "none")
    done = main("prepare", "--input", "s3://bucket/pairs.parquet", "--out", "s3://bucket/d",
                "--report", "s3://bucket/intake.json", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "s3://bucket/d: copied 2 files" in done.stderr
    local = main("prepare", "--input", simulated_table, "--out", tmp_path / "d", *flags)
    assert local.returncode == 0
    assert Dataset(bucket / "d").identity == Dataset(tmp_path / "d").identity
    assert Dataset(fetched("s3://bucket/d", "--input")).identity == Dataset(bucket / "d").identity
    assert json.loads((bucket / "intake.json").read_text())["sources"][0]["kept"] == 60
    assert not list((tmp_path / "cache/moe_ablm/stores/out").iterdir())
    again = main("prepare", "--input", "s3://bucket/pairs.parquet", "--out", "s3://bucket/d")
    assert again.returncode == 2 and "s3://bucket/d exists already" in again.stderr


def test_the_card_of_a_dataset_goes_up_last(simulated_table, bucket, main):
    puts = counting("put")
    assert main("prepare", "--input", simulated_table, "--out", "s3://bucket/d").returncode == 0
    assert puts[1:] == ["bucket/d/shard-00000.arrow", "bucket/d/dataset.json"]
    assert puts[0].startswith("bucket/d.probe-")  # which is gone:
    assert sorted(p.name for p in bucket.iterdir()) == ["d"]


def test_an_output_that_cannot_be_copied_up_is_kept(bucket, main):
    def fault(operation, name):
        if operation == "put" and name.endswith(".csv"):
            raise OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)
    flags = ("simulate", "--pairs", "3", "--seed", "1", "--out", "s3://bucket/s.csv")
    done = main(*flags)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "cannot be reached" in line and "it is whole in " in line
    kept = Path(line.partition("it is whole in ")[2].partition(",")[0])
    assert len(kept.read_text().splitlines()) == 4
    counting("put")
    assert main(*flags).returncode == 0
    assert (bucket / "s.csv").read_text() == kept.read_text()
    refused = main(*flags)
    assert refused.returncode == 2 and "s3://bucket/s.csv exists already" in refused.stderr
    assert main(*flags, "--overwrite").returncode == 0


def test_a_copy_that_was_interrupted_does_not_stand_in_the_way(bucket, main):
    def fault(operation, name):
        if operation == "put" and name.endswith(".csv"):
            raise KeyboardInterrupt

    FolderStore.fault = staticmethod(fault)
    flags = ("simulate", "--pairs", "3", "--seed", "1", "--out", "s3://bucket/s.csv")
    assert main(*flags).returncode == 130
    counting("put")
    done = main(*flags)
    assert done.returncode == 0, done.stderr
    kept = Path(done.stderr.partition("an earlier result is now ")[2].splitlines()[0])
    assert kept.read_text() == (bucket / "s.csv").read_text()


def test_a_verb_that_goes_on_also_goes_on_copying(bucket):
    content = {"a/samples": "1", "results.json": "2"}

    def carried_out(made):
        args = argparse.Namespace(verb="evaluate", out="s3://bucket/e")
        with at_hand(args, goes_on=True):
            fill(args.out, made)

    def fault(operation, name):
        if operation == "put" and name.endswith("results.json"):
            raise KeyboardInterrupt

    FolderStore.fault = staticmethod(fault)
    with pytest.raises(KeyboardInterrupt):
        carried_out(content)
    assert tree(bucket / "e") == {"a/samples": "1"}
    counting("put")
    fill(bucket / "e", {"mine": "3"})
    with pytest.raises(UserError, match="exists already"):
        carried_out({})
    (bucket / "e/mine").unlink()
    carried_out({})  # all is done
    assert tree(bucket / "e") == content
    with pytest.raises(UserError, match="exists already"):
        carried_out({})


REFUSED = {
    "nowhere to write": (
        ("simulate", "--pairs", "3", "--out", "s3://none/s.csv"),
        "s3://none/s.csv is not there",
    ),
    "no figures in a copy": (("report", "--run", "s3://bucket/r"), "--out is missing"),
    "nothing to watch": (("report", "--run", "s3://bucket/r", "--watch"), "--watch looks at files"),
    "other stores": (("simulate", "--out", "az://b/s.csv"), "az://b/s.csv is in an object store"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_store_cannot_do_is_refused_in_a_line(name, bucket, main):
    arguments, line = REFUSED[name]
    done = main(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr


def test_no_permission_to_write_is_said_before_anything_is_computed(bucket, main):
    failing("put", error=PermissionError(13, "Access Denied"))
    done = main("simulate", "--pairs", "100000", "--out", "s3://bucket/s.csv")
    assert done.returncode == 2 and "access refused (" in done.stderr
    assert done.stderr.count("\n") == 1
