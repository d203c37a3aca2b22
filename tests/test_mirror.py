"""A run in an object store: whatever is broken off, and whenever, it resumes from there."""

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY, command, tiny_config, tiny_flags
from folder_store import DIE_AT, FOLDER, UNREACHABLE, FolderStore

from moe_ablm import mirror as mirrors
from moe_ablm import train, trainer
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.errors import UserError
from moe_ablm.mirror import Mirror, mirrored
from moe_ablm.results import read_results
from moe_ablm.store_copies import split_checkpoints, whole_steps
from moe_ablm.stores import LEASE, Store, StoreError, place_of
from moe_ablm.training.checkpoint import Checkpoints

ADDRESS = "s3://bucket/r"


@pytest.fixture
def bucket(bucket, monkeypatch):
    """The store of a test, and a mirror in a hurry."""
    hurry = {"EVERY": 99, "BEAT": 99, "EXPIRY": 0.3, "PATIENCE": 0.1, "PAUSE": 0.05}
    for name, seconds in hurry.items():
        monkeypatch.setattr(mirrors, name, seconds)
    return bucket


def elsewhere(tmp_path, monkeypatch):
    """From now on this is another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))


def new_mirror() -> Mirror:
    return Mirror(Store(ADDRESS, "--workdir"), place_of("run", ADDRESS))


def checkpoint(run: Path, step: int, text: str = "") -> None:
    for name in ("state/d/0", "state/manifest", "record/metadata", "commit_success.txt"):
        path = run / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # the same marker whatever it marks, as that of orbax
        path.write_text("" if name == "commit_success.txt" else f"{step}{text}")


def results(run: Path, last: int) -> None:
    (run / "results.jsonl").write_text("".join(f"{i}\n" for i in range(1, last + 1)))


def begin(run: Path) -> None:
    """A run up to step 8."""
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "events").write_text("e")
    (run / "config.json").write_text("short")
    (run / ".lock").touch()
    results(run, 9)
    for step in (4, 8):
        checkpoint(run, step)


def go_on(run: Path) -> None:
    """Its next steps until it is complete; the first checkpoint is no longer kept."""
    results(run, 14)
    for step in (12, 14):
        checkpoint(run, step)
    shutil.rmtree(run / "checkpoints/4")
    (run / "checkpoints/16.orbax-checkpoint-tmp").mkdir()
    (run / "run.json").write_text("complete")


def extend(run: Path) -> None:
    """Made longer from step 4 on; what came after is set aside, and the config says so last."""
    aside = run / "ended-at-8"
    (aside / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "results.jsonl", aside)
    (run / "checkpoints/8").rename(aside / "checkpoints/8")
    (run / "config.json").write_text("long")
    results(run, 4)


def again(run: Path) -> None:
    """The newest checkpoint was damaged and is computed again."""
    (run / "damaged").mkdir()
    (run / "checkpoints/8").rename(run / "damaged/8")
    checkpoint(run, 8, "again")
    (run / "checkpoints/8/state/d/0").rename(run / "checkpoints/8/state/d/1")


def damaged(run: Path) -> None:
    """The newest checkpoint was damaged, and is not computed again yet."""
    (run / "damaged").mkdir()
    (run / "checkpoints/8").rename(run / "damaged/8")
    results(run, 4)


def contents(folder: Path, text: bool = True) -> dict[str, str | bytes]:
    read = Path.read_text if text else Path.read_bytes
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): read(p) for p in found}


def here(run: Path, text: bool = True) -> dict[str, str | bytes]:
    """What belongs into the store of a work directory."""
    return {name: t for name, t in contents(run, text).items() if not name.startswith(".")}


def there(bucket: Path, text: bool = True) -> dict[str, str | bytes]:
    return {name: t for name, t in contents(bucket / "r", text).items() if name != LEASE}


def require_resumable(store: dict[str, str], states: set[str]) -> None:
    """A checkpoint counts only if it is whole, and others of the run agree with the newest one."""
    steps = whole_steps(store | {LEASE: ""})
    assert steps, "no checkpoint is whole"
    for step in steps:
        folder = f"checkpoints/{step}/"
        data = {n: t for n, t in store.items() if n.startswith(folder + "state/d/")}
        assert len(data) == 1 and f"{folder}state/manifest" in store
        assert {f"{n.removeprefix(folder)} {t}" for n, t in data.items()} <= states
    assert max(steps) <= len(store["results.jsonl"].split()), "results are behind"
    if "run.json" in store:
        assert max(steps) == 14, "the end of a run is not whole, but said to be"
    if max(steps) > 4:
        assert store["config.json"] == "short", "the longer run has what came after the parting"


@pytest.mark.parametrize("change", [go_on, extend, again, damaged])
def test_at_every_operation_the_store_has_a_run_that_resumes(change, bucket):
    with new_mirror().open() as run:
        begin(run)
    assert there(bucket) == here(run)
    operations, states = [], {f"state/d/0 {step}" for step in (4, 8, 12, 14)} | {"state/d/1 8again"}

    def fault(operation, name):
        if operation in ("put", "rm") and LEASE not in name:
            require_resumable(there(bucket), states)
            operations.append((operation, name))

    with new_mirror().open() as run:
        change(run)
        FolderStore.fault = staticmethod(fault)
    assert len(operations) > 4
    require_resumable(there(bucket), states)
    assert there(bucket) == here(run)


@pytest.mark.parametrize("change", [extend, again, damaged])
def test_what_is_set_aside_is_at_every_operation_in_one_place_or_the_other(change, bucket):
    with new_mirror().open() as run:
        begin(run)
    copies = []

    def fault(operation, name):
        if operation in ("put", "rm") and LEASE not in name:
            found = there(bucket).items()
            copies.append(sum(n.endswith("8/state/d/0") and t == "8" for n, t in found))

    with new_mirror().open() as run:
        change(run)
        FolderStore.fault = staticmethod(fault)
    assert min(copies) == 1 and max(copies) == 2


def test_the_first_operations_leave_no_half_checkpoint(bucket):
    seen = []

    def fault(operation, name):
        if operation == "put" and LEASE not in name:
            store = there(bucket)
            seen.append(whole_steps(store | {LEASE: ""}))
            assert not split_checkpoints(store) or "config.json" in store

    FolderStore.fault = staticmethod(fault)
    with new_mirror().open() as run:
        begin(run)
    assert seen[0] == set() and seen[-1] == {4}


def test_what_is_there_is_brought_in_elsewhere(bucket, tmp_path, monkeypatch):
    with new_mirror().open() as run:
        begin(run)
        first = here(run)
    shutil.rmtree(bucket / "r/checkpoints/4")
    (bucket / "r/checkpoints/8/commit_success.txt").rename(bucket / "marker")
    checkpoint(bucket / "r", 4)
    elsewhere(tmp_path, monkeypatch)
    with new_mirror().open() as other:
        assert other != run and not other.is_relative_to(run)
        whole = {n: t for n, t in first.items() if not n.startswith("checkpoints/8/")}
        assert here(other) == whole  # the other checkpoint was broken off
    assert there(bucket) == whole


def test_a_copy_that_is_older_than_the_store_is_made_anew(bucket, tmp_path, monkeypatch, caplog):
    with new_mirror().open() as run:
        begin(run)
    home = (tmp_path / "cache").as_posix()
    elsewhere(tmp_path, monkeypatch)
    with new_mirror().open() as other:
        go_on(other)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    (run / "results.jsonl").write_text("never copied up")
    with new_mirror().open() as back:
        assert back == run and here(back) == there(bucket)
    aside = [p for p in run.parent.iterdir() if p.is_dir() and p != run]
    assert (aside[0] / "results.jsonl").read_text() == "never copied up"
    assert "is fetched anew" in caplog.text and str(aside[0]) in caplog.text


def clear(run: Path) -> None:
    shutil.rmtree(run)


def clear_config(run: Path) -> None:
    (run / "config.json").unlink()


def clear_newest(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/8")


def clear_part_of_newest(run: Path) -> None:
    (run / "checkpoints/8/state/d/0").unlink()


CLEARED = [clear, clear_config, clear_newest, clear_part_of_newest]


@pytest.mark.parametrize("change", CLEARED)
def test_a_copy_that_was_cleared_is_fetched_again(change, bucket):
    with new_mirror().open() as run:
        begin(run)
        before = here(run)
    change(run)
    with new_mirror().open() as run:
        assert here(run) == before
    assert there(bucket) == before


@pytest.mark.parametrize("change", CLEARED)
def test_a_copy_that_is_cleared_while_it_is_worked_in_clears_no_store(change, bucket):
    with new_mirror().open() as run:
        begin(run)
        before = here(run)
    with pytest.raises(StoreError, match="are gone.* stays as it is"), new_mirror().open() as run:
        change(run)
    assert there(bucket) == before


def test_a_checkpoint_that_is_being_removed_here_does_not_count_there(bucket):
    with new_mirror().open() as run:
        begin(run)
        before = there(bucket)
    with new_mirror().open() as run:
        results(run, 12)
        checkpoint(run, 12)
        (run / "checkpoints/4/state/manifest").unlink()
    assert before == {} and whole_steps(there(bucket) | {LEASE: ""}) == {8, 12}


def test_a_fetch_that_lasts_keeps_others_off(bucket, tmp_path, monkeypatch):
    with new_mirror().open() as run:
        begin(run)
    elsewhere(tmp_path, monkeypatch)
    monkeypatch.setattr(mirrors, "BEAT", 0.02)
    beats = []

    def fault(operation, name):
        if operation == "get":
            time.sleep(0.05)
            beats.append(json.loads((bucket / "r" / LEASE).read_text())["beats"])

    FolderStore.fault = staticmethod(fault)
    with new_mirror().open():
        pass
    assert beats[-1] > beats[0]


def test_a_fetch_that_broke_off_leaves_nothing_to_be_moved_aside(
    bucket, tmp_path, monkeypatch, caplog
):
    with new_mirror().open() as run:
        begin(run)
    elsewhere(tmp_path, monkeypatch)

    def fault(operation, name):
        if operation == "get" and name.endswith("8/state/manifest"):
            raise OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)
    with pytest.raises(StoreError, match="cannot be reached"):
        new_mirror().open().__enter__()
    assert json.loads((bucket / "r" / LEASE).read_text())["ended"] is True
    FolderStore.fault = staticmethod(lambda operation, name: None)
    with new_mirror().open() as other:
        assert here(other) == here(run)
        assert [p for p in other.parent.iterdir() if p.is_dir()] == [other]
    assert not caplog.records


def test_a_fetch_that_fails_at_once_ends_the_lease_but_does_not_remove_it(
    bucket, tmp_path, monkeypatch
):
    """Without one even checkpoints of which parts are missing would count."""
    with new_mirror().open() as run:
        begin(run)
    elsewhere(tmp_path, monkeypatch)
    listings = []

    def fault(operation, name):
        listings.extend([name] * (operation == "find"))
        if len(listings) > 1:
            listings.clear()
            raise OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)
    with pytest.raises(StoreError, match="cannot be reached"):
        new_mirror().open().__enter__()
    assert json.loads((bucket / "r" / LEASE).read_text())["ended"] is True


def test_another_container_of_the_same_host_and_path_waits_for_a_lease(bucket, capsys):
    with new_mirror().open() as run:
        begin(run)
    file = bucket / "r" / LEASE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ended": False}))
    shutil.rmtree(run.parent)  # its own files are not seen here
    with new_mirror().open() as other:
        assert here(other) == there(bucket)
    assert "for a sign of process" in capsys.readouterr().out


def test_a_killed_process_is_followed_at_once_on_its_machine(bucket, monkeypatch):
    with new_mirror().open() as run:
        begin(run)
    lease = json.loads((bucket / "r" / LEASE).read_text())
    assert lease["ended"] is True
    (bucket / "r" / LEASE).write_text(json.dumps(lease | {"ended": False}))
    results(run, 10)  # not copied up when it was killed
    monkeypatch.setattr(mirrors, "EXPIRY", 60)
    with new_mirror().open() as same:
        assert same == run and len(read_lines(same)) == 10
    assert there(bucket) == here(run)


def read_lines(run: Path) -> list[str]:
    return (run / "results.jsonl").read_text().split()


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_that_is_alive_elsewhere_is_left_alone(alive, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirrors, "EXPIRY", 1.0)
    monkeypatch.setattr(mirrors, "BEAT", 0.1)
    with new_mirror().open() as run:
        begin(run)
    file = bucket / "r" / LEASE
    lease = json.loads(file.read_text()) | {"ended": False, "host": "tpu-7", "place": "tpu-7:/x"}
    file.write_text(json.dumps(lease))
    sign = json.dumps(lease | {"beats": 99})
    beat = threading.Timer(0.3, Store(ADDRESS, "").write, (LEASE, sign))
    elsewhere(tmp_path, monkeypatch)
    if alive:
        beat.start()
        with pytest.raises(UserError, match="in use by process .* on tpu-7"), new_mirror().open():
            pass
        assert json.loads(file.read_text())["host"] == "tpu-7"
    else:
        with new_mirror().open() as other:
            assert here(other) == here(run)
        assert json.loads(file.read_text())["host"] != "tpu-7"
    assert "waiting 1 s for a sign of process" in capsys.readouterr().out


def test_two_processes_of_a_machine_do_not_share_a_run(bucket):
    with new_mirror().open(), pytest.raises(UserError, match="another process of this machine"):
        new_mirror().open().__enter__()


def test_a_run_that_was_taken_over_copies_nothing_any_more(bucket):
    taken = pytest.raises(StoreError, match="process 7 on tpu-7 has taken the run")
    with taken as found, new_mirror().open() as run:
        begin(run)
        (bucket / "r" / LEASE).write_text('{"token": "x", "host": "tpu-7", "process": 7}')
    assert there(bucket) == {} and str(run) in str(found.value)
    assert json.loads((bucket / "r" / LEASE).read_text())["token"] == "x"


def test_an_outage_is_said_once_and_made_up_for(bucket, monkeypatch, caplog):
    monkeypatch.setattr(mirrors, "EVERY", 0.02)
    with new_mirror().open() as run:
        begin(run)

        def fault(operation, name):
            if down:
                raise OSError(UNREACHABLE)

        down = [True]
        FolderStore.fault = staticmethod(fault)
        time.sleep(0.3)
        go_on(run)
        assert caplog.text.count("the run goes on, copies wait in") == 1
        down.clear()
        end = time.monotonic() + 10
        while "is reached again after" not in caplog.text and time.monotonic() < end:
            time.sleep(0.02)
    assert "failed attempts: all is copied up" in caplog.text
    assert there(bucket) == here(run)


def test_a_run_that_was_taken_over_during_an_outage_is_told_so(bucket, monkeypatch, caplog):
    monkeypatch.setattr(mirrors, "EVERY", 0.02)
    down = [True]

    def fault(operation, name):
        if down:
            raise OSError(UNREACHABLE)

    with pytest.raises(StoreError, match="process 7 on tpu-7"), new_mirror().open() as run:
        begin(run)
        FolderStore.fault = staticmethod(fault)
        time.sleep(0.2)
        (bucket / "r" / LEASE).write_text('{"token": "x", "host": "tpu-7", "process": 7}')
        down.clear()
        end = time.monotonic() + 10
        while "any more" not in caplog.text and time.monotonic() < end:
            time.sleep(0.02)
        told = caplog.text
    assert told.count("copies wait in") == told.count("copies nothing up any more") == 1


def test_an_outage_at_the_end_is_an_error_and_loses_nothing(bucket):
    def fault(operation, name):
        raise OSError(UNREACHABLE)

    with pytest.raises(StoreError) as found, new_mirror().open() as run:
        begin(run)
        FolderStore.fault = staticmethod(fault)
    line = str(found.value)
    assert "lacks the end of the run" in line and str(run) in line and "\n" not in line
    assert "failed attempt" in line and "the same command copies it up" in line
    FolderStore.fault = staticmethod(lambda operation, name: None)
    assert there(bucket) == {}
    with new_mirror().open() as same:
        assert same == run and len(read_lines(run)) == 9
    assert there(bucket) == here(run)


def test_a_checkpoint_that_is_removed_while_it_is_copied_is_no_outage(bucket, caplog):
    """As the oldest one, which is no longer kept."""

    def fault(operation, name):
        if operation == "put" and name.endswith("checkpoints/4/state/d/0"):
            shutil.rmtree(run / "checkpoints/4", ignore_errors=True)

    with new_mirror().open() as run:
        begin(run)
        FolderStore.fault = staticmethod(fault)
    assert there(bucket) == here(run) and whole_steps(there(bucket) | {LEASE: ""}) == {8}
    assert not caplog.text


def test_a_run_that_failed_keeps_its_own_error(bucket, caplog):
    def fault(operation, name):
        raise OSError(UNREACHABLE)

    with pytest.raises(ValueError, match="its own"), new_mirror().open() as run:
        begin(run)
        FolderStore.fault = staticmethod(fault)
        raise ValueError("its own")
    assert "lacks the end of the run" in caplog.text


def test_a_run_that_was_copied_by_hand_is_taken_as_it_is(bucket, tmp_path):
    begin(tmp_path / "hand")
    for marker in (tmp_path / "hand").rglob("commit_success.txt"):
        marker.unlink()
    shutil.copytree(tmp_path / "hand", bucket / "r", ignore=lambda *_: [".lock"])
    with new_mirror().open() as run:
        assert here(run).keys() > here(tmp_path / "hand").keys()
        assert {p.name for p in (run / "checkpoints").iterdir()} == {"4", "8"}
    assert there(bucket) == here(run)


def test_checkpoints_without_markers_of_their_own_get_some(bucket, tmp_path, monkeypatch):
    """An orbax that renames leaves none on a file system."""
    with new_mirror().open() as run:
        begin(run)
        for marker in run.rglob("commit_success.txt"):
            marker.unlink()
    assert whole_steps(there(bucket) | {LEASE: ""}) == {4, 8}
    with new_mirror().open() as run:
        shutil.rmtree(run / "checkpoints/4")
    assert set(split_checkpoints(there(bucket))) == whole_steps(there(bucket) | {LEASE: ""}) == {8}


def test_what_is_no_run_is_refused_and_stays(bucket):
    (bucket / "r").mkdir()
    (bucket / "r/holiday.jpg").write_text("x")
    with pytest.raises(UserError, match="is no run .* but holds holiday.jpg"):
        new_mirror().open().__enter__()
    assert contents(bucket / "r") == {"holiday.jpg": "x"}


def test_a_refused_run_leaves_nothing(bucket):
    with pytest.raises(UserError, match="wrong config"), new_mirror().open():
        raise UserError("wrong config")
    assert contents(bucket) == {}


def test_a_path_is_worked_in_as_it_is(tmp_path):
    with mirrored(tmp_path / "w") as place:
        assert place == tmp_path / "w"
    with pytest.raises(UserError, match="--workdir az://b/r is in an object store"):
        mirrored(Path("az://b/r")).__enter__()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(UNREACHABLE), "cannot be reached ([Errno 101] Network is unreachable)"),
        (PermissionError(13, "Access Denied"), "access refused ("),
        (FileNotFoundError(2, "no such bucket"), "is not there ("),
    ],
)
def test_a_store_that_refuses_is_a_line_before_anything_is_computed(error, line, bucket, capsys):
    def fault(operation, name):
        raise error

    FolderStore.fault = staticmethod(fault)
    assert train.main(["train", *tiny_flags(), f"--workdir={ADDRESS}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"moe_ablm: --workdir {ADDRESS}") and line in err


CHANGES = {"eval__every": 4, "checkpoint__keep": 9}
SAME = ("params_sha256", "tokens_seen", "valid_loss_final", "step")
TORN = "checkpoints/8/state/manifest.ocdbt"


def steps_logged(run: Path) -> list[int]:
    return [r["step"] for r in read_results(run / "results.jsonl") if r["kind"] == "train"]


@pytest.fixture
def antibodies(cache) -> str:
    """The embedded dataset in the cache that all tests share."""
    return str(simulated_dataset(TINY["data.simulated_pairs"]))


def test_a_real_run_survives_a_store_that_is_cut_off(antibodies, bucket, tmp_path, monkeypatch):
    """Within a checkpoint: the run goes on to its end, and is copied up later."""
    cut = []

    def fault(operation, name):
        cut.extend([name] * name.endswith(TORN))
        if cut:
            raise OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)
    lacking = pytest.raises(StoreError, match="lacks the end of the run")
    with lacking, mirrored(Path(ADDRESS)) as place:
        config = tiny_config(**CHANGES, data__path=antibodies)
        assert trainer.run(config, place)["status"] == "complete"
    FolderStore.fault = staticmethod(lambda operation, name: None)
    kept = here(place, text=False)
    assert cut and whole_steps(there(bucket, text=False) | {LEASE: ""}) == {4}
    shutil.copytree(bucket / "r", bucket / "as it was cut off")
    with mirrored(Path(ADDRESS)) as again:
        assert again == place
    assert there(bucket, text=False) == here(place, text=False) == kept
    shutil.rmtree(bucket / "r")
    (bucket / "as it was cut off").rename(bucket / "r")
    elsewhere(tmp_path, monkeypatch)
    with mirrored(Path(ADDRESS)) as other:
        assert Checkpoints(other / "checkpoints", 9).newest_step() == 4
        brought = here(other, text=False)
        assert brought == {name: kept[name] for name in brought} and "run.json" not in brought
        assert steps_logged(other)[:4] == [1, 2, 3, 4]


def test_a_real_run_that_is_taken_over_stops(antibodies, bucket, monkeypatch):
    monkeypatch.setattr(mirrors, "EVERY", 0.05)
    found = []

    def fault(operation, name):  # the first look after a checkpoint is copied up
        if operation == "put" and name.endswith("checkpoints/4/commit_success.txt"):
            (bucket / "r" / LEASE).write_text('{"token": "x", "host": "tpu-7", "process": 7}')

    FolderStore.fault = staticmethod(fault)
    lacking = pytest.raises(StoreError, match="process 7 on tpu-7 has taken the run")
    with lacking, mirrored(Path(ADDRESS)) as place:
        steps = {"train__steps": 100_000, "train__warmup": 10}
        config = tiny_config(**CHANGES, **steps, data__path=antibodies)
        found.append(trainer.run(config, place)["status"])
    assert found == ["stopped"]
    assert whole_steps(there(bucket, text=False) | {LEASE: ""}) <= {4, 8}


PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from folder_store import FOLDER, register
register(Path(os.environ[FOLDER]))
from moe_ablm import mirror, train
mirror.EVERY = 0.05
sys.exit(train.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_run_killed_while_it_copies_resumes_exactly_on_another_machine(
    bucket, tmp_path, monkeypatch
):
    flags = [*tiny_flags(**CHANGES), f"--workdir={ADDRESS}"]
    environment = {
        FOLDER: str(bucket.parent), DIE_AT: TORN, "XDG_CACHE_HOME": str(tmp_path / "cache")
    }  # fmt: skip
    argv, options = command("-", **environment)
    argv = [argv[0], "-c", PROGRAM, *flags]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=300, **options)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert whole_steps(there(bucket, text=False) | {LEASE: ""}) == {4}
    elsewhere(tmp_path, monkeypatch)  # where what was not copied up is lost
    with mirrored(Path(ADDRESS)) as place:
        found = trainer.run(tiny_config(**CHANGES), place)
    expected = trainer.run(tiny_config(**CHANGES), tmp_path / "undisturbed")
    assert {key: found[key] for key in SAME} == {key: expected[key] for key in SAME}
    assert steps_logged(bucket / "r") == list(range(1, 13))
