"""Reports of several runs: the numbers of each run's own files, with names that tell them apart."""

import csv
import json
from pathlib import Path

import pytest

from moe_ablm.verbs.run_curves import Curve, names_of, read_curves, table


def line(kind: str, step: int, loss: float, rate: float = 50.0) -> dict:
    values = {"kind": kind, "step": step, "loss": loss, "tokens_seen": 1000 * step}
    if kind == "train":
        return values | {"tokens_per_second": rate, "model_flops_per_second": 6e6 * rate}
    return values | {"loss_by_region": {"CDRH3": loss + 1}}


def write(folder: Path, losses: list[float], flops: float | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [line("train", 1, 3.0, 0.0), line("train", 5, 2.5)]
    lines += [line("eval", 10 * i, loss) for i, loss in enumerate(losses, start=1)]
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if flops is not None:
        tokens = 10_000 * len(losses)
        content = {"status": "complete", "tokens_seen": tokens, "flops": flops * tokens}
        (folder / "run.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def runs(tmp_path):
    done = write(tmp_path / "runs" / "dense", [2.0, 1.5, 1.75], flops=4e6)
    return done, write(tmp_path / "runs" / "top2", [1.9])


def test_a_table_and_a_figure_of_all(runs, main, tmp_path):
    done = main("report", "--run", runs[0], "--run", runs[1], "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both" / "curves.png").stat().st_size > 10_000
    with (tmp_path / "both" / "runs.csv").open() as file:
        dense, top2 = csv.DictReader(file)
    assert (dense["run"], dense["status"], dense["step"]) == ("dense", "complete", "30")
    assert (dense["loss"], dense["best_loss"], dense["loss_CDRH3"]) == ("1.75", "1.5", "2.75")
    assert float(dense["flops"]) == 30_000 * 4e6 and float(dense["tokens_per_second"]) == 50
    # a run that is not over knows its FLOPs of a token by its speed
    assert (top2["status"], float(top2["flops"])) == ("running", 10_000 * 6e6)


def test_curves_hold_what_was_logged(runs):
    dense, _ = read_curves(runs)
    assert [r["loss"] for r in dense.evaluations] == [2.0, 1.5, 1.75]
    assert [r["flops"] for r in dense.train] == [4e9, 2e10]
    assert isinstance(dense, Curve) and table([dense]).row_count == 1


def test_names_without_what_all_share():
    places = [Path("/a/b/x/run"), Path("/a/b/y/run")]
    assert names_of(places) == ["x/run", "y/run"]
    assert names_of([Path("/a/b"), Path("/a/b/c")]) == ["b", "b/c"]


def test_what_cannot_be_shown(runs, main, tmp_path):
    two = ("report", "--run", runs[0], "--run")
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = write(tmp_path / "damaged", [1.0])
    (damaged / "run.json").write_text("{}")
    for flags, words in [
        ((*two, runs[1]), "--out is missing"),
        ((*two, runs[0], "--out", tmp_path / "o"), "this run is given twice"),
        ((*two, empty, "--out", tmp_path / "o"), "results.jsonl: is not there"),
        ((*two, damaged, "--out", tmp_path / "o"), "its results are damaged"),
    ]:
        done = main(*flags)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "o").exists()
