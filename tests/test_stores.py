"""Files in object stores: fetched, kept while they are as they were, and copied up when whole."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from folder_store import FolderStore, register

from moe_ablm.data.dataset import Dataset
from moe_ablm.errors import UserError
from moe_ablm.stores import StoreError, at_hand, fetched, fetched_run, place_of

UNREACHABLE = "[Errno 101] Network is unreachable"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder of `s3://bucket`, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return register(tmp_path / "store")


def failing(*operations, error=None):
    """From now on these operations of the store fail."""

    def fault(operation, name):
        if operation in operations:
            raise error or OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)


def counting(operation):
    """The names with which an operation is called from now on."""
    names = []
    FolderStore.fault = staticmethod(lambda o, name: names.append(name) if o == operation else None)
    return names


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


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


def test_an_object_cannot_leave_the_cache(bucket, monkeypatch):
    fill(bucket / "x", {"a": "1"})
    found = {f"{bucket}/x/../../evil": {"type": "file", "size": 1}}
    monkeypatch.setattr(FolderStore, "find", lambda *a, **k: found)
    with pytest.raises(StoreError, match="has no name of a file"):
        fetched("s3://bucket/x", "--input")


WRONG = {
    "no bucket": ("s3://other/x", None, "--input s3://other/x is not there (.*bucket"),
    "no bucket named": ("s3://", None, "--input s3:// names no bucket"),
    "nothing there": ("s3://bucket/x", None, "--input s3://bucket/x is not there: nothing"),
    "credentials": ("s3://bucket/x", PermissionError(13, "Access Denied"), "access refused"),
    "no credentials": ("s3://bucket/x", ValueError("Unable to locate credentials"), "refused"),
    "network": ("s3://bucket/x", OSError(UNREACHABLE), "cannot be reached .*unreachable"),
    "other stores": ("az://bucket/x", None, "--input az://bucket/x is in an object store"),
    "out of the cache": ("s3://bucket/runs/..", None, "expected s3://BUCKET/NAME without"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_store_is_one_line(name, bucket):
    address, error, line = WRONG[name]
    if error:
        failing("find", error=error)
    with pytest.raises(UserError, match=line.replace("(", r"\(")) as found:
        fetched(address, "--input")
    assert "\n" not in str(found.value)


def test_a_driver_that_is_not_installed_is_named(bucket):
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"gs://b/x needs the package gcsfs: .*\[stores\]"):
            fetched("gs://b/x", "--input")
    else:
        pytest.skip("gcsfs is installed")


# runs


def write_run(run: Path, losses: dict[int, float | None]) -> None:
    fill(run, {"config.json": "{}", "results.jsonl": "", "tensorboard/events": "x" * 99})
    for step, loss in losses.items():
        evaluation = {} if loss is None else {"step": step, "loss": loss}
        folder = run / "checkpoints" / str(step)
        fill(folder, {"record/metadata": json.dumps({"evaluation": evaluation})})
        fill(folder, {"state/d/0": f"{step}", "state/manifest": "", "commit_success.txt": ""})


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


def test_curves_need_no_parameters(bucket):
    write_run(bucket / "sweep/a", {4: 2.0})
    args = argparse.Namespace(verb="fit", input=["s3://bucket/sweep", "runs.csv"])
    with at_hand(args):
        assert args.input[1] == "runs.csv"
        assert tree(Path(args.input[0])) == {"a/config.json": "{}", "a/results.jsonl": ""}


# verbs

PAIRS = "sequence_aa_heavy,sequence_aa_light\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A table of simulated antibodies."""
    from moe_ablm.__main__ import main

    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    assert main(["moe_ablm", "simulate", "--pairs", "60", "--seed", "1", "--out", str(path)]) == 0
    return path


def test_a_dataset_is_made_from_a_store_in_a_store(pairs, bucket, main, tmp_path):
    shutil.copy(pairs, bucket / "pairs.parquet")
    flags = ("--workers", "1", "--licence", "none")
    done = main("prepare", "--input", "s3://bucket/pairs.parquet", "--out", "s3://bucket/d",
                "--report", "s3://bucket/intake.json", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "s3://bucket/d: copied 2 files" in done.stderr
    local = main("prepare", "--input", pairs, "--out", tmp_path / "d", *flags)
    assert local.returncode == 0
    assert Dataset(bucket / "d").identity == Dataset(tmp_path / "d").identity
    assert Dataset(fetched("s3://bucket/d", "--input")).identity == Dataset(bucket / "d").identity
    assert json.loads((bucket / "intake.json").read_text())["sources"][0]["kept"] == 60
    assert not list((tmp_path / "cache/moe_ablm/stores/out").iterdir())
    again = main("prepare", "--input", "s3://bucket/pairs.parquet", "--out", "s3://bucket/d")
    assert again.returncode == 2 and "s3://bucket/d exists already" in again.stderr


def test_the_card_of_a_dataset_goes_up_last(pairs, bucket, main):
    puts = counting("put")
    assert main("prepare", "--input", pairs, "--out", "s3://bucket/d").returncode == 0
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


def test_a_run_and_a_sweep_take_their_data_from_a_store(pairs, bucket, main):
    from conftest import tiny_config

    from moe_ablm.trainer import open_datasets
    from sweeps.scaling import data_names
    from sweeps.study import data_path

    assert main("prepare", "--input", pairs, "--out", bucket / "d").returncode == 0
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
