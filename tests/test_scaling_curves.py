"""`python -m moe_ablm curves`: trajectories read, files written, one line for bad input."""

import csv
import json

import numpy as np
import pytest
from curve_families import families

from moe_ablm.__main__ import main
from moe_ablm.errors import UserError
from moe_ablm.scaling.trajectories import read_trajectories


def curves(*flags):
    return main(["moe_ablm", "curves", *map(str, flags)])


def write_run(directory, lines, record=None):
    directory.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "results.jsonl").write_text(text)
    if record is not None:
        (directory / "run.json").write_text(json.dumps(record))


@pytest.fixture
def runs(tmp_path):
    """Two stable runs, one of a collapse, one not finished, one with two evaluations only."""
    for name, level in (("a", 1.0), ("b", 1.01), ("c/0", 2.0), ("d", 1.02), ("short", 1.0)):
        lines = []
        for step in (10, 20, 30, 40)[: 2 if name == "short" else 4]:
            entropy = [level / 4, level / 2]
            router = {str(i): {"entropy": e, "load": [1.0]} for i, e in enumerate(entropy)}
            lines.append({"kind": "train", "step": step, "loss": 9.0, "router": router})
            lines.append({"kind": "eval", "step": step, "loss": level + 1 / step,
                          "loss_by_region": {"CDRH3": 2 * level}})  # fmt: skip
        verdict = {"verdict": "collapse" if name == "c/0" else "stable"}
        record = None if name == "d" else {"status": "complete", "stability": verdict}
        write_run(tmp_path / "runs" / name, lines, record)
    return tmp_path / "runs"


def test_trajectories_of_runs(runs):
    found = read_trajectories(runs, "loss")
    assert found.names == ["a", "b", "c/0", "d"]
    assert found.verdicts == ["stable", "stable", "collapse", "unfinished"]
    np.testing.assert_array_equal(found.steps[2], [10, 20, 30, 40])
    np.testing.assert_allclose(found.values[2], [2.1, 2.05, 2 + 1 / 30, 2.025])
    assert found.left_out == [("short", "2 values, fewer than 3")]
    assert read_trajectories(runs, "loss_by_region.CDRH3").values[0].tolist() == [2.0] * 4
    # averaged over the two layers, by the name of the signal or of the statistic
    for name in ("load_entropy", "entropy"):
        np.testing.assert_allclose(read_trajectories(runs, name).values[2], 0.75)


def test_a_line_that_is_being_written_is_none_and_values_not_finite_are_counted(runs):
    with (runs / "a" / "results.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 50, "lo')
    write_run(
        runs / "diverged",
        [{"kind": "eval", "step": s, "loss": v} for s, v in enumerate([1.0, 2.0, float("nan")])],
        {"status": "diverged"},
    )
    found = read_trajectories(runs, "loss")
    assert found.steps[0].tolist() == [10, 20, 30, 40]
    assert found.left_out[0] == ("diverged", "2 values, fewer than 3; 1 without a finite value")


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"{r},{s},{s * 2.0 + i}" for i, r in enumerate("xy") for s in (3, 1, 2)]
    path.write_text("\n".join(["run,step,value", *rows, "z,1,5", "z,2,"]) + "\n")
    found = read_trajectories(path, "loss")
    assert found.names == ["x", "y"] and found.verdicts == ["", ""]
    assert found.steps[1].tolist() == [1, 2, 3] and found.values[1].tolist() == [3, 5, 7]
    assert found.left_out == [("z", "1 values, fewer than 3; 1 without a finite value")]
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"run": [1, 1, 1, 2, 2, 2], "step": [1, 2, 3] * 2, "loss": [1.0, 2, 3, 4, 5, 6]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read_trajectories(tmp_path / "t.parquet", "loss").values[1].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run,step\na,1\n", "no column 'value' or 'loss'; it has run, step"),
        ("run,step,loss\na,one,2\n", "row 2, column 'step': found 'one', expected a number"),
        ("run,step,loss\na,1,x\n", "row 2, column 'loss': found 'x', expected a number"),
        ("run,step,loss\na,-1,2\n", "row 2, column 'step': found -1, expected 0 or more"),
        ("run,step,loss\na,1,2\na,1,3\n", "row 3: run a has step 1 twice"),
        ("run,step,loss\n,1,2\n", "row 2, column 'run': empty"),
        ("run,step,loss\na,1,2\n", "0 curves of loss, and clusters need at least 2 (a: 1 values"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, words, capsys):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert curves("--input", path, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_runs_that_are_refused(runs, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no results.jsonl in it or below"):
        read_trajectories(tmp_path / "nothing", "loss")
    with pytest.raises(UserError, match=r"did you mean 'load_entropy'\?"):
        read_trajectories(runs, "load_entrop")
    (runs / "a" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"a/run.json: not readable as JSON"):
        read_trajectories(runs, "loss")
    (runs / "a" / "results.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"a/results.jsonl, row 2: not JSON"):
        read_trajectories(runs, "loss")
    (runs / "a" / "results.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(UserError, match=r"row 1: found step 'x'"):
        read_trajectories(runs, "loss")


def test_the_verb_writes_everything_and_the_same_bytes(tmp_path, capsys):
    steps, values, truth = families(0, (1, 2), 3)
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        print("run,step,loss,verdict", file=file)
        for i, (s, v, t) in enumerate(zip(steps, values, truth, strict=True)):
            for a, b in zip(s, v, strict=True):
                print(f"r{i},{a},{b},{('', 'collapse', 'stable')[t]}", file=file)
    for name in ("one", "two"):
        assert curves("--input", path, "--out", tmp_path / name, "--seed", 3) == 0
    said = capsys.readouterr().out
    assert "2 clusters of 6 curves of loss" in said and "ln evidence +" in said
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(p.relative_to(one) for p in one.rglob("*.*"))
    assert [str(f) for f in files] == ["clusters.csv", "curves.json", "figures/curves.png",
                                       "figures/curves.svg", "report.html", "runs.csv"]  # fmt: skip
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    rows = list(csv.DictReader((one / "runs.csv").open()))
    assert [r["run"] for r in rows] == [f"r{i}" for i in range(6)]
    assert len({r["cluster"] for r in rows if r["verdict"] == "collapse"}) == 1
    assert len({(r["cluster"], r["verdict"]) for r in rows}) == 2
    for r in rows:
        own = float(r[f"cluster_{r['cluster']}"])
        assert own == float(r["probability"]) and own > 0.9
        assert float(r["cluster_1"]) + float(r["cluster_2"]) == pytest.approx(1.0)
    saved = json.loads((one / "curves.json").read_text())
    assert saved["clusters"] == 2 and saved["provenance"]["seed"] == 3
    assert saved["log_evidence"] > saved["log_evidence_one_cluster"]
    first = next(csv.DictReader((one / "clusters.csv").open()))
    inner, outer = (float(first["mean_low"]), float(first["mean_high"])), float(first["run_high"])
    assert inner[0] < float(first["mean"]) < inner[1] < outer


def test_the_figure_has_every_run_in_the_colour_of_its_cluster():
    from moe_ablm.scaling.curves_report import draw
    from moe_ablm.scaling.gp_mixture import Clusters
    from moe_ablm.scaling.trajectories import Trajectories

    steps = np.arange(1.0, 6.0)
    made = Trajectories(["a", "b", "c"], [steps] * 3, [steps, steps + 1, steps + 9], [""] * 3)
    band = np.ones((2, 5))
    sure, labels = np.array([[1, 0], [1, 0], [0, 1.0]]), np.array([0, 0, 1])
    mean = np.stack([steps, steps + 9])
    found = Clusters(sure, labels, steps, mean, 0.1 * band, band, "linear", 2.0, 1.0, 0.1, 0.2)
    (axes,) = draw(made, found, "loss").axes
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] == colours[3] != colours[2] == colours[4]
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "loss"
    low, high = axes.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((1 - 1.96, 5 + 1.96))
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "cluster 1: 2 runs",
        "cluster 2: 1 runs",
    ]


def test_what_a_run_was_before_it_was_extended_is_no_run_of_its_own(runs):
    names = read_trajectories(runs, "loss").names
    longer = runs / "a"
    (longer / "ended-at-20").mkdir()
    lines = (longer / "results.jsonl").read_text().splitlines()[:4]
    (longer / "ended-at-20" / "results.jsonl").write_text("\n".join(lines) + "\n")
    assert read_trajectories(runs, "loss").names == names
    # alone it is one
    (longer / "ended-at-20").rename(runs / "ended-at-20")
    assert len(read_trajectories(runs, "loss").names) == len(names)  # two points are too few
    assert any("ended-at-20" in name for name, _ in read_trajectories(runs, "loss").left_out)
