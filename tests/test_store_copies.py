"""What is read from a store: fetched, and kept while it is as it was."""

import argparse
import shutil
from pathlib import Path

import pytest
from folder_store import UNREACHABLE, FolderStore, counting, fill, tree, write_run

from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.store_copies import fetched, fetched_run
from moe_ablm.stores import StoreError, place_of


def test_a_path_is_itself(tmp_path):
    assert fetched("a/b", "--run") == Path("a/b")
    assert fetched_run(Path("hf:org/name"), "--run") == Path("hf:org/name")


def test_only_what_changed_is_fetched_again(bucket):
    content = {"a.txt": "1", "d/b.txt": "22", "d/e/c.txt": ""}
    fill(bucket / "x", content)
    fill(bucket, {"xy/other": "of another address"})
    place = fetched("s3://bucket/x", "--input")
    assert tree(place) == content
    gets = counting("get")
    assert fetched(Path("s3://bucket/x"), "--input") == place and gets == []
    fill(bucket / "x", {"a.txt": "2", "new": "3"})  # as long as before
    (bucket / "x/d/b.txt").unlink()
    assert tree(fetched("s3://bucket/x/", "--input")) == {"a.txt": "2", "new": "3", "d/e/c.txt": ""}
    assert sorted(gets) == ["bucket/x/a.txt", "bucket/x/new"]
    shutil.rmtree(place)  # by a user who tidies up
    assert tree(fetched("s3://bucket/x", "--input")) == tree(bucket / "x")


def test_a_file_may_become_a_directory_and_back(bucket):
    fill(bucket, {"x": "a file"})
    assert fetched("s3://bucket/x", "--input").read_text() == "a file"
    (bucket / "x").unlink()
    fill(bucket / "x", {"a": "1"})
    assert tree(fetched("s3://bucket/x", "--input")) == {"a": "1"}
    shutil.rmtree(bucket / "x")
    fill(bucket, {"x": "again"})
    assert fetched("s3://bucket/x", "--input").read_text() == "again"


@pytest.mark.parametrize("name", ["versions.json", "lock", "x.versions"])
def test_names_of_the_account_are_names_of_objects_as_well(name, bucket):
    fill(bucket, {name: "{}", f"d/{name}": "1"})
    for _ in range(2):
        assert fetched(f"s3://bucket/{name}", "--input").read_text() == "{}"
        assert tree(fetched("s3://bucket/d", "--input")) == {name: "1"}


def test_an_interrupted_fetch_goes_on(bucket):
    fill(bucket / "x", {"a": "1", "b": "2", "c": "3"})

    def fault(operation, name):
        if operation == "get" and name.endswith("b"):
            raise OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)
    with pytest.raises(StoreError, match="cannot be reached"):
        fetched("s3://bucket/x", "--input")
    assert tree(place_of("read", "s3://bucket/x")) == {"a": "1"}
    gets = counting("get")
    assert tree(fetched("s3://bucket/x", "--input")) == {"a": "1", "b": "2", "c": "3"}
    assert sorted(gets) == ["bucket/x/b", "bucket/x/c"]


def test_an_object_that_vanishes_meanwhile_is_no_error(bucket):
    """As an old checkpoint of a run that goes on."""
    fill(bucket / "x", {"a": "1", "b": "2"})

    def fault(operation, name):
        if operation == "get" and name.endswith("a"):
            (bucket / "x/b").unlink(missing_ok=True)

    FolderStore.fault = staticmethod(fault)
    assert tree(fetched("s3://bucket/x", "--input")) == {"a": "1"}


def test_of_a_run_the_best_checkpoint_is_fetched(bucket):
    write_run(bucket / "r", {4: 2.0, 8: 1.5, 12: 1.7})
    write_run(bucket / "r/ended-at-4", {4: 1.0})  # before it was extended
    place = fetched_run("s3://bucket/r", "--run")
    states = {p.relative_to(place).parts[-3] for p in place.rglob("checkpoints/*/state/*")}
    assert states == {"8"} and not (place / "tensorboard").exists()
    records = {p.parts[-3] for p in place.glob("checkpoints/*/record/metadata")}
    assert records == {"4", "8", "12"}


def test_a_checkpoint_that_is_being_copied_up_does_not_count(bucket):
    write_run(bucket / "r", {4: 2.0, 8: 1.5})
    fill(bucket / "r", {".lease.json": "{}"})
    fetched_run("s3://bucket/r", "--run")  # as long as it was whole
    (bucket / "r/checkpoints/8/commit_success.txt").unlink()
    place = fetched_run("s3://bucket/r", "--run")
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["4"]
    # a run that was copied by hand needs no markers
    (bucket / "r/.lease.json").unlink()
    place = fetched_run("s3://bucket/r", "--run")
    assert (place / "checkpoints/8/state/d/0").read_text() == "8"


def test_a_run_that_goes_on_while_it_is_fetched(bucket):
    """Its best checkpoint is replaced by a better one."""
    write_run(bucket / "r", {4: 2.0, 8: 1.5})

    def fault(operation, name):
        if operation == "get" and name.endswith("8/state/manifest"):
            shutil.rmtree(bucket / "r/checkpoints/8")
            write_run(bucket / "r", {12: 1.2})

    FolderStore.fault = staticmethod(fault)
    place = fetched_run("s3://bucket/r", "--run")
    assert {p.parts[-2] for p in place.glob("checkpoints/*/state")} == {"12"}
    assert (place / "checkpoints/12/state/d/0").read_text() == "12"


def test_a_run_and_a_sweep_take_their_data_from_a_store(simulated_table, bucket, main):
    from conftest import tiny_config

    from moe_ablm.trainer import open_datasets
    from sweeps.scaling import data_names
    from sweeps.study import data_path

    assert main("prepare", "--input", simulated_table, "--out", bucket / "d").returncode == 0
    (dataset,) = open_datasets(tiny_config(data__path="s3://bucket/d"))
    assert dataset.identity == Dataset(bucket / "d").identity
    assert data_path("s3://bucket/d/") == "s3://bucket/d"
    assert data_path("data/d") == str(Path.cwd() / "data/d")
    fill(bucket / "nested", {f"{pairs}/dataset.json": "{}" for pairs in ("512", "64")})
    options = argparse.Namespace(ladder="micro", data="s3://bucket/nested")
    assert data_names(options) == ["64", "512"]


def test_a_model_is_loaded_from_a_store_in_python(bucket):
    import moe_ablm

    with pytest.raises(UserError, match="run s3://bucket/r is not there"):
        moe_ablm.load("s3://bucket/r")
