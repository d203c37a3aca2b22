"""Grids, plans, costs, the design check, and what status and collect say of damaged sweeps."""

import dataclasses
import fcntl
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from conftest import TINY, command, run_command
from rich.console import Console

from launch.cell import REPOSITORY, config_of
from launch.ended import outcome_of
from launch.state import (
    COMPLETE,
    DAMAGED,
    FAILED,
    INTERRUPTED,
    RUNNING,
    WAITING,
    CellState,
    state_of,
)
from moe_ablm import config as configs
from moe_ablm.data.dataset import Dataset
from moe_ablm.data.simulated import simulated_dataset
from moe_ablm.errors import UserError
from moe_ablm.scaling.reading import read_runs
from sweeps import collect, compare_routers, grid, nested_data, repeated, scaling, status, studies
from sweeps.check import design_lines
from sweeps.cost import Rate, cost_table
from sweeps.grid import Recipe
from sweeps.plan import plan, unplanned_flags
from sweeps.planned import Planned, read_plan, write_plan
from sweeps.status import standing
from sweeps.study import Study, _new_or_kept, main

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
OWN = (scaling.study, compare_routers.study, repeated.study)  # of files of their own
STUDIES = studies.STUDIES | {s.name: s for s in OWN}
SMALL = ["--data=simulated", "--config.data.simulated_pairs=400"]


def tiny_recipe(point: grid.Point, options=None) -> Recipe:
    return Recipe("configs/base.py", "", TINY | point)


def tiny_plan(out: Path, **axes) -> list[Planned]:
    return plan(grid.product(**(axes or {"seed": range(3)})), tiny_recipe, out)[0]


# grids


def test_grid_expressions_by_hand():
    a = grid.product(size=["s", "m"], seed=[0, 1])
    assert a == [
        {"size": "s", "seed": 0},
        {"size": "s", "seed": 1},
        {"size": "m", "seed": 0},
        {"size": "m", "seed": 1},
    ]
    b: list[grid.Point] = [{"size": "s", "lr": 2}, {"size": "m", "lr": 1}]
    assert grid.product(b, seed=[7]) == [
        {"size": "s", "lr": 2, "seed": 7},
        {"size": "m", "lr": 1, "seed": 7},
    ]
    assert grid.product() == [{}]


def test_a_grid_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="'size' appears twice"):
        grid.product(grid.product(size=["s"]), size=["m"])


# plans


def test_a_plan_has_the_config_that_the_trainer_reads(tmp_path):
    """Parsed by the trainer itself, in a process of its own, from the planned command line."""
    (planned,) = tiny_plan(tmp_path / 'it\'s; a\n"sweep"', **{"train.lr": [0.25], "seed": [5]})
    assert planned.cell.argv[:2] == ("-m", "moe_ablm.train")
    script = (
        "import sys, json; from moe_ablm.command_line import parse; from moe_ablm import config;"
        "c, w, _ = parse(sys.argv); print(json.dumps([config.to_dict(c), str(w)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *planned.cell.argv[2:]],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tree, workdir = json.loads(done.stdout)
    config = config_of(planned.cell.argv)
    assert configs.from_mapping(tree) == config
    assert (config.seed, config.train.lr) == (5, 0.25)
    assert Path(workdir) == planned.cell.workdir
    assert planned.cell.workdir.parent == (tmp_path / 'it\'s; a\n"sweep"').resolve()


@pytest.mark.parametrize(
    "value", ["a b", "it's", '"', "; touch pwned", "$(id)", "a\nb", "é\t", "{}"]
)
def test_hostile_values_arrive_or_are_refused_in_one_line(tmp_path, value):
    argv = ["--config=configs/base.py", f"--config.data.path=/{value}"]
    assert config_of(argv).data.path == f"/{value}"
    named = [*TINY_FLAGS, f"--config.model.size={value}"]  # any name will do with four sizes given
    (planned,) = plan([{"seed": 0, "x": value}], lambda p: Recipe("configs/base.py"), tmp_path,
                      named)[0]  # fmt: skip
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.=-]{1,100}", planned.cell.name)
    assert config_of(planned.cell.argv).model.size == value
    with pytest.raises(UserError) as error:
        config_of([argv[0], f"--config.data.regime={value}"])
    assert "\n" not in str(error.value)


TINY_FLAGS = [f"--config.{key}={value}" for key, value in TINY.items() if key != "model.size"]


def test_printed_commands_survive_a_shell(tmp_path, capsys):
    out = tmp_path / 'o\'dd; "out" $HOME'
    argv = [*SMALL, f"--out={out}", "--launcher=print", "--seeds=1"]
    assert study_main("masking", argv) == 0
    text = capsys.readouterr().out
    text = text[text.index("\ncd ") :]
    for planned in read_plan(out)[1]:
        assert shlex.join(["python", *planned.cell.argv]) in text
    assert f"cd {shlex.quote(str(REPOSITORY))}\n" in text


def study_main(name: str, argv: list[str]) -> int:
    """The study as its file runs it."""
    return main(STUDIES[name], argv)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_plans(name, tmp_path, capsys):
    assert study_main(name, [*SMALL, "--dry-run", "--seeds=2", f"--out={tmp_path / 'x'}"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "cells, 0 complete" in out
    assert not (tmp_path / "x").exists()


def test_scaling_grid_has_every_size_fraction_router_and_seed(tmp_path, capsys):
    out = tmp_path / "s"
    argv = [*SMALL, "--ladder=paper", "--seeds=2", "--launcher=print", f"--out={out}"]
    assert study_main("scaling", argv) == 0
    cells = read_plan(out)[1]
    assert len(cells) == len({p.cell.fingerprint for p in cells}) == 5 * 3 * 3 * 2
    axes = {tuple(p.axes[a] for a in ("size", "data", "router", "seed")) for p in cells}
    assert len(axes) == 90
    size = {p.axes["size"]: p.params_total for p in cells if p.axes["router"] == "dense"}
    # the ESM-2 checkpoints' own counts, without the contact head
    assert size["8m"] == pytest.approx(7.5e6, rel=0.01) and 6.4e8 < size["650m"] < 6.6e8
    routers = {(p.axes["router"], p.router, p.experts) for p in cells}
    assert routers == {("dense", "none", 1), ("top2", "topk", 8), ("soft", "soft", 8)}
    capsys.readouterr()


def test_small_ladder_spends_equal_compute_and_has_the_parameters_it_says():
    micro, experts = {}, {}
    from configs.small_ladder import ROUTERS, SIZES, get_config
    from moe_ablm.model import flops
    from moe_ablm.model.families import RowShape

    for size in SIZES:
        for router in ROUTERS:
            spec = configs.from_mapping(get_config(f"size={size},router={router}")).model.spec()
            micro[size, router] = flops.params_total(spec)
            experts[size, router] = flops.train_flops_per_token(spec, RowShape(256, 236))
    assert 5e4 < micro["s48", "dense"] < 7e4 and 1.2e6 < micro["s160", "dense"] < 1.4e6
    assert 1e6 < micro["m160", "dense"] < 2e6 and 3e7 < micro["m640", "dense"] < 5e7
    for size in SIZES:
        assert experts[size, "top2"] == pytest.approx(experts[size, "dense"], rel=0.02)


def test_cost_of_a_plan_by_hand(tmp_path):
    (planned,) = tiny_plan(tmp_path, seed=[0])
    cell = dataclasses.replace(planned.cell, flops=989e12 * 0.5 * 7200)
    assert Rate("h100", 0.5, start=36.0).hours(cell) == pytest.approx(2.01)
    # 12 updates of 8 antibodies of some 240 tokens
    assert planned.cell.tokens == pytest.approx(12 * 8 * 236, rel=0.03)
    assert planned.steps == 12


def test_the_same_run_twice_is_planned_once(tmp_path):
    points = [{"seed": 0, "log.every": 1}, {"seed": 0, "log.every": 2}]  # outside the identity
    cells, notes = plan(points, tiny_recipe, tmp_path)
    assert len(cells) == 1
    assert len(notes) == 1 and "same run" in notes[0]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config.train.stpes=3"], "stpes"),
        (["--config.train.lr=fast"], "train.lr"),
        (["--config.train.lr=-1"], "train.lr"),
        (["--config.seed=3"], "--seeds"),
        (["--config.data.path=x"], "--data"),
        (["--confg.train.lr=1"], "--confg"),
        (["rest"], "'rest'"),
        (["--max-gpu-hours=1e-9"], "--max-gpu-hours"),
        (["--max-gpu-hours=nan"], "--max-gpu-hours"),
        (["--mfu=2"], "--mfu"),
        (["--start-seconds=nan"], "--start-seconds"),
        (["--calibrate=nowhere.csv"], "--calibrate nowhere.csv"),
        (["--calibrate=nowhere.csv", "--mfu=.3"], "give one of them"),
        (["--seeds=0"], "--seeds"),
        (["--data=/nowhere/pairs"], "/nowhere/pairs"),
        (["--jobs=1000"], "--jobs"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, capsys, argv, words):
    given = {a.partition("=")[0] for a in argv}
    usual = [a for a in [*SMALL, "--seeds=1"] if a.partition("=")[0] not in given]
    assert study_main("masking", [*usual, *argv, f"--out={tmp_path / 'x'}"]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told


def test_flags_for_every_cell_are_config_keys_only():
    assert unplanned_flags(["--config.a.b=c d"]) == ["--config.a.b=c d"]
    for wrong in ("--config.a.b", "--config=x", "--config.a;b=1", "config.a=1"):
        with pytest.raises(UserError, match="not understood"):
            unplanned_flags([wrong])


def test_nested_training_sets_share_their_validation_set(tmp_path, capsys):
    source = Dataset(simulated_dataset(400))
    argv = ["--input", str(source.path), "--out", str(tmp_path), "--pairs", "8", "40"]
    assert nested_data.main(argv) == 0
    small, large = (Dataset(tmp_path / name) for name in ("8", "40"))
    ids = [set(d.column("id", d.rows("train"))) for d in (small, large, source)]
    assert [len(i) for i in ids[:2]] == [8, 40] and ids[0] < ids[1] < ids[2]
    held = [d.column("id", d.rows("valid")) for d in (small, large, source)]
    assert held[0] == held[1] == held[2] and held[0]
    assert nested_data.main([*argv[:4], "--pairs", "4000"]) == 2
    assert "has 3" in capsys.readouterr().err  # some 360 training antibodies
    assert not (tmp_path / "4000").exists()
    options = Namespace(ladder="micro", data=str(tmp_path), seeds=1, routers="dense")
    points = [p for p in scaling.points(options) if (p["size"], p["data"]) == ("s48", "8")]
    (planned,) = plan(points, lambda p: scaling.recipe(p, options), tmp_path / "out")[0]
    assert planned.cell.tokens / planned.corpus_tokens == pytest.approx(640)  # 1,280 x 4 of 8


# the design check


def test_equal_tokens_are_warned_of_and_branches_mend_it(capsys, tmp_path):
    argv = [*SMALL, "--ladder=mini", "--routers=dense", "--seeds=1", "--dry-run"]
    assert study_main("scaling", argv) == 0
    out = capsys.readouterr().out
    assert "every run uses the same total tokens" in out
    assert "no replicates" in out
    (repair,) = re.findall(r"--add=branches .*", out)
    assert {"E", "B", "beta"} <= set(re.findall(r"\w+", repair))
    assert study_main("scaling", [*argv, "--add=branches"]) == 0
    mended = capsys.readouterr().out
    assert "same total tokens" not in mended and "--add=branches" not in mended


def test_a_good_grid_has_nothing_to_mend(tmp_path):
    def made(size: int, tokens: float, unique: float, seed: int) -> Planned:
        (p,) = tiny_plan(tmp_path, seed=[0])
        cell = {**vars(p.cell), "tokens": tokens}
        return Planned(**{**vars(p), "cell": type(p.cell)(**cell), "params_active": size,
                          "params_total": size, "unique_tokens": int(unique), "router": "none",
                          "experts": 1, "seed": seed})  # fmt: skip

    sizes, tokens, uniques = (10**5, 10**6, 10**7), (1e7, 1e8, 1e9), (1e6, 1e7, 1e9)
    cells = [made(n, d, u, s) for n in sizes for d in tokens for u in uniques for s in (0, 1)]
    assert design_lines(cells, {})[-1] == "  every coefficient can be identified"


# status and collect


def write_run(p: Planned, **content) -> None:
    p.cell.workdir.mkdir(parents=True)
    base = {
        "fingerprint": p.cell.fingerprint,
        "status": "complete",
        "step": p.steps,
        "tokens_seen": 20_000,
        "flops": 1e9,
        "valid_loss_final": 2.25,
        "valid_loss_by_region": {"CDRH3": 2.5},
        "execution": {"device_kind": "cpu", "mesh": {"data": 1}},  # no column of a table
    }
    (p.cell.workdir / "run.json").write_text(json.dumps(base | content))
    (p.cell.workdir / "config.json").write_text("{}")


@pytest.fixture
def sweep(tmp_path):
    """A folder with a cell of every fate, by name of what happened to it."""
    fates = ("complete", "diverged", "nan", "cut", "foreign", "deleted", "killed", "crashed",
             "running", "waiting", "stopped")  # fmt: skip
    cells = dict(zip(fates, tiny_plan(tmp_path, seed=range(len(fates))), strict=True))
    write_plan(tmp_path, "test", list(cells.values()))
    write_run(cells["complete"])
    write_run(cells["diverged"], status="diverged", step=4, error="step 5: loss is nan",
              valid_loss_final=None)  # fmt: skip
    write_run(cells["nan"], valid_loss_final=math.nan)
    write_run(cells["cut"])
    file = cells["cut"].cell.workdir / "run.json"
    file.write_text(file.read_text()[:40])
    write_run(cells["foreign"], fingerprint="0" * 16)
    write_run(cells["stopped"], status="stopped", step=7)
    for fate in ("killed", "running", "crashed"):
        write_run(cells[fate])
        workdir = cells[fate].cell.workdir
        (workdir / "run.json").unlink()
        (workdir / "results.jsonl").write_text(
            '{"kind": "train", "step": 4, "loss": 3.0, "tokens_seen": 4000,'
            ' "tokens_per_second": 500.0}\n{"kind": "tra'
        )
    (tmp_path / "logs").mkdir()
    # of a version that left no outcome: what it printed decides nothing
    cells["killed"].cell.log.write_text(
        "$ python\nTraceback (most recent call last):\nmoe_ablm: x\n"
    )
    cells["crashed"].cell.log.write_text("$ python\nOSError: [bold]no\x1b[31m disk\n")
    outcome_of(cells["crashed"].cell.outcome, cells["crashed"].cell.log, 1)
    cells["deleted"].cell.log.write_text("$ python\nstep 12/12 loss 1\n")
    age = cells["deleted"].cell.log
    import os

    os.utime(age, (0, 0))
    with (cells["running"].cell.workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path, cells


EXPECTED = {
    "complete": (COMPLETE, 2.25, ""),
    "diverged": (FAILED, None, "diverged: step 5: loss is nan"),
    "nan": (FAILED, None, "valid_loss_final is nan"),
    "cut": (DAMAGED, None, "run.json is damaged"),
    "foreign": (DAMAGED, None, "of run '0000000000000000'"),
    "deleted": (WAITING, None, "work directory is gone"),
    "killed": (INTERRUPTED, 3.0, "killed?"),
    "crashed": (FAILED, 3.0, "OSError: [bold]no [31m disk"),
    "running": (RUNNING, 3.0, ""),
    "waiting": (WAITING, None, ""),
    "stopped": (INTERRUPTED, 2.25, "stopped by a signal"),
}


def test_every_fate_has_its_state(sweep):
    _, cells = sweep
    for fate, (name, loss, words) in EXPECTED.items():
        state = state_of(cells[fate].cell, 12)
        assert (state.name, state.loss) == (name, loss), fate
        assert words in state.note, fate
    # 8 updates of 1,000 tokens at 500 tokens/s
    assert state_of(cells["running"].cell, 12).seconds_left == pytest.approx(16.0)


def test_status_tells_them_all(sweep, capsys):
    folder, cells = sweep
    assert status.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "1 complete, 1 running, 2 interrupted, 3 failed, 2 damaged, 2 waiting" in out
    for fate, (name, _, words) in EXPECTED.items():
        line, *note = [x for x in out.splitlines() if cells[fate].cell.name in x]
        assert name in line and len(note) <= 1
        assert words in "".join(out.partition(f"\n{cells[fate].cell.name}: ")[2].splitlines())
    assert "0:00:16" in out


def test_collect_writes_a_row_for_each_and_fit_reads_it(sweep, capsys):
    folder, cells = sweep
    out = folder / "made" / "runs.parquet"
    assert collect.main([str(folder), "--out", str(out)]) == 1
    rows = {r["cell"]: r for r in pq.read_table(out).to_pylist()}
    assert len(rows) == len(cells)
    good = rows[cells["complete"].cell.name]
    assert good["loss"] == 2.25 and good["loss_CDRH3"] == 2.5 and good["tokens"] == 20_000
    assert good["axis_seed"] == "0" and good["experts"] == 4
    assert [r["cell"] for r in rows.values() if r["loss"] is not None] == [good["cell"]]
    assert "step 5: loss is nan" in rows[cells["diverged"].cell.name]["note"]
    runs = read_runs([out])
    assert len(runs) == 1 and len(runs.dropped) == len(cells) - 1
    assert runs["total_params"][0] == cells["complete"].params_total


def test_collect_writes_what_its_name_says(sweep, capsys):
    folder, cells = sweep
    assert collect.main([str(folder), "--out", str(folder / "runs.csv")]) == 1
    lines = (folder / "runs.csv").read_text().splitlines()
    assert lines[0].startswith('"cell",') and len(lines) == len(cells) + 1
    assert len(read_runs([folder / "runs.csv"])) == 1
    assert collect.main([str(folder), "--out", str(folder / "runs.xlsx")]) == 2
    assert "ends in .parquet or .csv" in capsys.readouterr().err
    assert not (folder / "runs.xlsx").exists()


def test_cells_that_differ_in_what_is_tuned_are_no_seeds(tmp_path):
    points = {"train.lr": [1e-3, 2e-3], "seed": [0, 1]}
    cells = tiny_plan(tmp_path, **points)
    write_plan(tmp_path, "test", cells)
    for p in cells:
        write_run(p)
        train = {"lr": float(p.axes["train.lr"]), "batch": 8, "weight_decay": 0.1}
        (p.cell.workdir / "config.json").write_text(json.dumps({"config": {"train": train}}))
    out = tmp_path / "runs.parquet"
    assert collect.main([str(tmp_path), "--out", str(out)]) == 0
    assert pq.read_table(out)["lr"].to_pylist() == [1e-3, 1e-3, 2e-3, 2e-3]
    (cells[0].cell.workdir / "config.json").unlink()
    assert collect.main([str(tmp_path), "--out", str(out)]) == 0
    assert "lr" not in pq.read_table(out).column_names


def test_a_dry_run_needs_no_data(tmp_path, monkeypatch, capsys):
    """As the README has it, in a clone without data/."""
    argv = [SMALL[1], "--ladder=paper", "--seeds=1", "--routers=dense", "--dry-run"]
    absent = tmp_path / "absent"
    ladder = dataclasses.replace(scaling.LADDERS["paper"], data=str(absent))
    monkeypatch.setitem(scaling.LADDERS, "paper", ladder)
    assert main(scaling.study, [*argv, f"--out={tmp_path / 'x'}"]) == 0
    out = capsys.readouterr().out
    assert "is not there: a dry run on the embedded dataset" in out
    assert "15 cells" in out and "650m" in out
    assert main(scaling.study, [*argv[:-1], f"--out={tmp_path / 'x'}"]) == 2


@pytest.mark.parametrize(
    "content",
    [{"tokens_seen": None}, {"flops": "many"}, {"valid_loss_by_region": [1]}, {"stability": "x"},
     {"step": "12"}, {"stability": {"verdict": 3}}, {"train_loss_final": True}],
)  # fmt: skip
def test_a_field_that_is_wrong_does_not_stop_the_table(tmp_path, content, capsys):
    cells = tiny_plan(tmp_path, seed=[0, 1])
    write_plan(tmp_path, "test", cells)
    write_run(cells[0], **content)
    write_run(cells[1])
    assert collect.main([str(tmp_path), "--out", str(tmp_path / "x.parquet")]) == 0
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [r["loss"] for r in rows] == [2.25, 2.25]
    assert rows[0]["tokens"] > 0 and rows[0]["flops"] > 0


def test_routers_are_compared_without_the_speed_of_a_run_that_had_none(tmp_path):
    """Resumed after its last update."""
    cells = tiny_plan(tmp_path, seed=[0, 1])
    for p, speed in zip(cells, (None, 500.0), strict=True):
        write_run(p, tokens_per_second=speed, peak_memory=10**6, train_loss_final=2.0,
                  stability={"verdict": "stable"},
                  valid_loss_by_region=dict.fromkeys(compare_routers.REGIONS, 1.0))  # fmt: skip
    assert "500" in compare_routers.columns(cells, None)
    assert "1.500" not in compare_routers.columns(cells, None)  # older runs tell no chains apart
    shutil.rmtree(cells[1].cell.workdir)
    write_run(cells[1], tokens_per_second=1.0, peak_memory=1, train_loss_final=2.0,
              stability={"verdict": "stable"}, valid_loss_by_chain={"heavy": 1.5},
              valid_loss_by_region=dict.fromkeys(compare_routers.REGIONS, 1.0))  # fmt: skip
    assert "1.500" in compare_routers.columns(cells[1:], None)
    assert "" in compare_routers.columns(cells[:1], None)


def test_a_row_of_the_table_of_routers_is_at_its_best_rate(tmp_path):
    """The mean over seeds decides, not the best run, and not a rate of fewer seeds."""
    points = grid.product(router=["dense", "soft"], placement=["interleaved"],
                          lr=[1e-3, 2e-3, 4e-3], seed=[0, 1])  # fmt: skip
    router = {"dense": "none", "soft": "soft"}

    def recipe(point: grid.Point) -> Recipe:
        changes = {"model.moe.router": router[point["router"]], "train.lr": point["lr"]}
        return tiny_recipe(changes | {"seed": point["seed"]})

    cells, _ = plan(points, recipe, tmp_path)
    losses = {"dense": {"0.001": (2.0, 2.2), "0.002": (1.9, 2.4), "0.004": (1.0, None)},
              "soft": {"0.001": (2.5, 2.5), "0.002": (2.5, 2.3), "0.004": (3.0, 3.0)}}  # fmt: skip
    for p in cells:
        loss = losses[p.axes["router"]][p.axes["lr"]][p.seed]
        if loss is not None:
            write_run(p, valid_loss_final=loss, train_loss_final=loss, peak_memory=10**6,
                      tokens_per_second=500.0, stability={"verdict": "stable"},
                      flops=1e9 if p.axes["router"] == "dense" else 1.33e9,
                      valid_loss_by_region=dict.fromkeys(compare_routers.REGIONS, 1.0))  # fmt: skip
    text = compare_routers.table(cells, [state_of(p.cell) for p in cells])
    dense, soft = (line.split(" | ") for line in text.splitlines()[-2:])
    assert dense[:5] == ["| dense", "interleaved", "0.001", "2", "1.00"]
    assert dense[6] == "2.100 ± 0.100"
    assert soft[:5] == ["| soft", "interleaved", "0.002", "2", "1.33"]
    assert f"After {cells[0].steps} updates" in text


def test_the_table_of_repeated_data_pairs_runs_by_seed(tmp_path):
    def recipe(point: grid.Point) -> Recipe:
        names = {"dropout": "model.hidden_dropout", "weight_decay": "train.weight_decay"}
        return tiny_recipe({names.get(name, name): value for name, value in point.items()})

    cells, _ = plan(repeated.points(Namespace(seeds=3)), recipe, tmp_path)
    assert len(cells) == 2 * 2 * 3
    last = {"0.0": (2.0, 2.2, 2.4), "0.1": (1.9, 2.0, 2.1)}  # differences -.1, -.2, -.3
    for p in cells[:-1]:  # of the last row one seed is missing
        loss = last[p.axes["dropout"]][p.seed]
        write_run(p, valid_loss_final=loss, valid_loss_best=loss - 0.5, train_loss_final=1.0,
                  tokens_seen=4e4, corpus_tokens=1e3)  # fmt: skip
    head, _, *rows = repeated.table(cells, [state_of(p.cell) for p in cells]).splitlines()
    lines = [row.strip("| ").split(" | ") for row in rows]
    assert [line[:3] for line in lines] == [
        [dropout, decay, "2" if (dropout, decay) == ("0.1", "0.3") else "3"]
        for dropout in ("0.0", "0.1")
        for decay in ("0.01", "0.3")
    ]
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of 2 degrees of freedom; sd .1 of three seeds
    low, high = -0.2 - half, -0.2 + half
    assert lines[2][3:] == ["40", "1.000 ± 0.000", "2.000 ± 0.058", "1.500 ± 0.058",
                            f"-0.200 [{low:.3f}, {high:.3f}]"]  # fmt: skip
    assert len(head.strip("| ").split(" | ")) == len(lines[2])


CHAINS = {"heavy": 1.5, "light": 0.9, "light_seen": 0.5, "light_unseen": 1.3, "light_novel": 1.4}


def write_new_run(p: Planned, novel: float = 1.45, masked: int = 70, **content) -> None:
    """As trainers write it that tell seen chains apart."""
    by_chain = {"heavy_novel": masked, "light_novel": 30}
    write_run(p, valid_loss_by_chain=CHAINS, valid_loss_novel=novel, corpus_tokens=9_000,
              unique_tokens=6_000, evaluation={"masked_by_chain": by_chain}, **content)  # fmt: skip


def collected(folder: Path, *arguments: str) -> list[dict]:
    out = folder / "runs.parquet"
    assert collect.main([str(folder), "--out", str(out), *arguments]) == 0
    return pq.read_table(out).to_pylist()


def test_collect_tells_chains_apart_and_takes_the_novel_ones(tmp_path, capsys):
    cells = tiny_plan(tmp_path, seed=range(3))
    write_plan(tmp_path, "test", cells)
    write_new_run(cells[0])
    write_new_run(cells[1], novel=1.55)  # the third waits
    first, second, waiting = collected(tmp_path)
    assert (first["loss"], second["loss"], waiting["loss"]) == (1.45, 1.55, None)
    assert {r["loss_metric"] for r in (first, second)} == {"novel"}
    assert (first["loss_all"], first["loss_novel"]) == (2.25, 1.45)
    for chain in collect.CHAIN_LOSSES:
        assert first[f"loss_{chain}"] == CHAINS.get(chain)
    assert (first["unique_tokens"], first["corpus_tokens"]) == (6_000, cells[0].corpus_tokens)
    assert waiting["unique_tokens"] == min(cells[2].unique_tokens, waiting["tokens"])
    assert capsys.readouterr().out.count("\n") == 1
    for name, value in {"all": 2.25, "heavy": 1.5, "light_unseen": 1.3}.items():
        chosen, *_ = collected(tmp_path, f"--loss={name}")
        assert (chosen["loss"], chosen["loss_metric"]) == (value, name)
    write_new_run(tiny_plan(tmp_path, seed=[2])[0], masked=71)
    capsys.readouterr()
    collected(tmp_path)
    assert "novel chains differ between the cells (100 to 101" in capsys.readouterr().out


def test_runs_of_before_have_the_loss_that_they_have_and_the_table_says_so(tmp_path, capsys):
    cells = tiny_plan(tmp_path, seed=[0, 1])
    write_plan(tmp_path, "test", cells)
    write_new_run(cells[0])
    write_run(cells[1])
    rows = collected(tmp_path)
    assert [r["loss"] for r in rows] == [2.25, 2.25]
    assert {r["loss_metric"] for r in rows} == {"all"}
    assert "1 of 2 complete cells have none of novel chains" in capsys.readouterr().out
    # the plan knows the different chains of the old run's data
    assert rows[1]["unique_tokens"] == min(cells[1].unique_tokens, 20_000)


def test_a_plan_of_before_names_its_tokens_as_they_were_counted(tmp_path, capsys):
    cells = tiny_plan(tmp_path, seed=[0, 1])
    write_plan(tmp_path, "test", cells)
    file = tmp_path / "sweep.json"
    content = json.loads(file.read_text())
    for entry in content["cells"]:
        entry["unique_tokens"] = entry.pop("corpus_tokens")
    file.write_text(json.dumps(content))
    write_run(cells[0], tokens_seen=10**9)
    before = read_plan(tmp_path)[1]
    assert [p.corpus_tokens for p in before] == [p.corpus_tokens for p in cells]
    rows = collected(tmp_path)
    assert rows[0]["unique_tokens"] == cells[0].corpus_tokens
    assert "a chain once per record" in capsys.readouterr().out
    write_plan(tmp_path, "test", cells)  # as the sweep's command does
    assert collected(tmp_path)[0]["unique_tokens"] == cells[0].unique_tokens


def test_a_folder_that_moved_or_a_plan_that_is_cut(sweep, tmp_path, capsys):
    folder, cells = sweep
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(folder, moved)
    planned = {p.cell.name: p for p in read_plan(moved)[1]}
    assert state_of(planned[cells["complete"].cell.name].cell).name == COMPLETE
    plan_file = moved / "sweep.json"
    plan_file.write_text(plan_file.read_text()[:100])
    assert status.main([str(moved)]) == 2
    assert "sweep.json is damaged" in capsys.readouterr().err
    assert collect.main([str(moved / "nothing"), "--out", str(moved / "x.parquet")]) == 2
    assert not (moved / "x.parquet").exists()
    # planned again, it is whole again
    write_plan(moved, "test", list(planned.values()))
    assert len(read_plan(moved)[1]) == len(cells)


def test_a_name_in_a_plan_cannot_lead_out_of_its_folder(tmp_path, capsys):
    write_plan(tmp_path, "test", tiny_plan(tmp_path, seed=[0]))
    content = json.loads((tmp_path / "sweep.json").read_text())
    content["cells"][0]["cell"]["name"] = "../elsewhere"
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        read_plan(tmp_path)


def test_a_new_plan_keeps_what_was_begun_and_refuses_another_study(tmp_path):
    old = tiny_plan(tmp_path, seed=[0, 1])
    write_plan(tmp_path, "test", old)
    write_run(old[0])
    write_plan(tmp_path, "test", tiny_plan(tmp_path, seed=[2]))
    assert {p.seed for p in read_plan(tmp_path)[1]} == {0, 2}
    write_plan(tmp_path, "test", tiny_plan(tmp_path, seed=[2]))
    write_run(old[1])  # it waited in a queue when the others were planned
    assert {p.seed for p in read_plan(tmp_path)[1]} == {0, 1, 2}
    with pytest.raises(UserError, match="'test', not 'other'"):
        write_plan(tmp_path, "other", old)


# the whole of it, with real runs


def tiny_study(**axes) -> Study:
    return Study("test", "doc", lambda options: grid.product(**axes), tiny_recipe)


@pytest.mark.slow
def test_a_sweep_from_its_beginning_to_its_table(tmp_path, capfd):
    """Diverges in one cell; then a directory is deleted and a run.json cut, and it runs again."""
    study = tiny_study(**{"seed": [0, 1], "train.lr": [3e-3, 1e30]})
    argv = [f"--out={tmp_path}", "--jobs=2"]
    assert main(study, argv) == 1
    told = capfd.readouterr()
    assert "diverged" in told.err and "2 of" not in told.err
    cells = {(p.axes["seed"], p.axes["train.lr"]): p.cell for p in read_plan(tmp_path)[1]}
    good = [cells["0", "0.003"], cells["1", "0.003"]]
    assert [state_of(c).name for c in good] == [COMPLETE, COMPLETE]
    before = [json.loads((c.workdir / "run.json").read_text())["params_sha256"] for c in good]

    assert main(study, argv) == 1  # nothing is left to do, but two have failed for good
    told = capfd.readouterr()
    assert "0 of 4 cells to run" in told.out and "not run again" in told.err

    shutil.rmtree(good[0].workdir)
    file = good[1].workdir / "run.json"
    file.write_text(file.read_text()[:50])
    assert [state_of(c).name for c in good] != [COMPLETE, COMPLETE]
    assert main(study, argv) == 1
    assert "2 of 4 cells to run" in capfd.readouterr().out
    after = [json.loads((c.workdir / "run.json").read_text())["params_sha256"] for c in good]
    assert after == before
    assert collect.main([str(tmp_path), "--out", str(tmp_path / "x.parquet")]) == 1
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert sum(r["loss"] is not None for r in rows) == 2


def test_the_commands_of_the_docs_start(tmp_path):
    """As files and modules, in processes of their own."""
    argv, options = command("sweeps.status", tmp_path / "none")
    done = subprocess.run(argv, capture_output=True, check=False, **options)
    assert done.returncode == 2 and done.stderr.startswith("sweeps: ")
    done = run_command("sweeps.collect", "--help")
    assert done.returncode == 0
    done = subprocess.run(
        [sys.executable, REPOSITORY / "sweeps" / "masking.py", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--max-gpu-hours" in done.stdout


LONG = "150m-quarter-expert_choice-experts8-placement-last_3-lr0.0004-seed1"
REASON = "config.train.batch=32 cannot be split over 3 devices: use a multiple of 3 [red]x[/red]"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_numbers_and_reasons_on_a_narrow_terminal(width):
    cell = SimpleNamespace(name=LONG, tokens=1.234e11, flops=5.67e21)
    sizes = {"params_total": 1_234_567_890, "params_active": 234_567_890, "corpus_tokens": 1.5e9}
    planned = SimpleNamespace(cell=cell, steps=100_000, **sizes)
    states = [
        CellState("failed", step=31_234, loss=2.5, note=REASON),
        CellState("running", step=99_999, loss=12.3456, seconds_left=359_999.0),
    ]
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(standing("scaling", [planned] * 2, states))
    console.print(cost_table([planned] * 2, Rate("core", 0.5)))
    shown = out.getvalue()
    for words in ("31234/100000", "2.5000", "99999/100000", "12.3456", "99:59:59", "failed",
                  "1,234,567,890", "234,567,890", "1.23e+11", "82.3", "5.67e+21", "3.94e+06",
                  "2 cells, 0"):  # fmt: skip
        assert words in shown, words
    assert f"{LONG}: {REASON}" in shown.replace("\n", "") and "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= width


def test_a_launcher_that_refuses_leaves_no_folder(tmp_path):
    """As SLURM's commands without a cluster; what was there before, or launched, stays."""
    out = tmp_path / "runs" / "sweep"

    def attempt(launched: str | None = None):
        with pytest.raises(UserError), _new_or_kept(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "sweep.json").write_text("{}")
            (out / "logs").mkdir(exist_ok=True)
            (out / "logs" / ".slurm-lock").write_text("")
            if launched:
                (out / "logs" / launched).write_text("")
            raise UserError("squeue refused")

    attempt()
    assert not out.exists()
    attempt("slurm-7.sh")
    assert (out / "sweep.json").exists() and (out / "logs" / "slurm-7.sh").exists()
    (out / "logs" / "slurm-7.sh").unlink()
    attempt()  # the folder was there
    assert (out / "sweep.json").exists()
