"""Where verbs write: nothing of the user is replaced, nothing is half-written; one line why."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from test_cli import refused
from tiny_models import HEAVY, LIGHT, tiny_model

from moe_ablm.data.simulate import simulate
from moe_ablm.evaluation.supervised.head_inputs import Head
from moe_ablm.evaluation.supervised.heads import HIDDEN
from moe_ablm.evaluation.supervised.saved_head import SavedHead, write_head
from moe_ablm.files import all_or_none
from moe_ablm.interop.saved import save_model
from moe_ablm.verbs.simulate import write_table

REGION = {"CDRH3": 1.0}
EVALUATED = {
    "kind": "eval", "step": 1, "time": 0.0, "loss": 1.0, "accuracy": 0.5, "tokens_seen": 10,
    "loss_by_region": REGION, "accuracy_by_region": REGION, "masked_by_region": {"CDRH3": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, run_quickly):
    """A table, a dataset, a model, a run that was evaluated, and runs to fit."""
    folder = tmp_path_factory.mktemp("inputs")
    write_table(simulate(60, seed=1), folder / "pairs.csv")
    made = run_quickly(
        "moe_ablm", "prepare", "--input", folder / "pairs.csv", "--out", folder / "d"
    )
    assert made.returncode == 0, made.stderr
    model = tiny_model("dense", length=256)
    save_model(model, folder / "model")
    (folder / "run").mkdir()
    (folder / "run" / "results.jsonl").write_text(json.dumps(EVALUATED) + "\n")
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 4), np.geomspace(1e9, 3e11, 4)))
    loss = 1.8 + 480 * n**-0.35 + 2100 * d**-0.37
    rows = "".join(f"{a},{b},{c}\n" for a, b, c in zip(n, d, loss, strict=True))
    (folder / "runs.csv").write_text("params,tokens,loss\n" + rows)
    rows = "".join(f"{run},{step},{run + 1 / step}\n" for run in range(3) for step in (1, 2, 4))
    (folder / "curves.csv").write_text("run,step,loss\n" + rows)
    rows = "".join(f"{HEAVY},{LIGHT[:-i]},{i}\n" for i in range(1, 13))
    (folder / "assay.csv").write_text("heavy,light,kd\n" + rows)
    save_model(model, folder / "tuned")
    write_head(a_head(model), folder / "tuned")
    return folder


def a_head(model) -> SavedHead:
    """A head with weights of 0, as finetune keeps one."""
    width = model.spec.d_model
    shapes = {"centre": (width,), "spread": (width,), "query": (width, 1), "inner": (width, HIDDEN),
              "inner_bias": (HIDDEN,), "outer": (HIDDEN, 1), "outer_bias": (1,),
              "target_mean": (1,), "target_sd": (1,)}  # fmt: skip
    tensors = {n: np.full(s, float(n == "spread"), np.float32) for n, s in shapes.items()}
    return SavedHead(Head("regression", 1), (), "kd", model.digest(), 8, tensors)


PAIR = ("--run", "{model}", "--heavy", HEAVY, "--light", LIGHT)
# flags of every verb that writes, and a name of its output
WRITE = {
    "simulate": (("--pairs", "20"), "s.csv"),
    "simulate a dataset": (("--pairs", "20"), "s"),
    "annotate": (("--input", "{pairs.csv}"), "a.parquet"),
    "prepare": (("--input", "{pairs.csv}"), "d"),
    "describe": (("--input", "{d}"), "f"),
    "report": (("--run", "{run}"), "f"),
    "export": (("--run", "{model}", "--format", "hf"), "e"),
    "upcycle": (("--run", "{model}"), "u"),
    "embed": (PAIR, "e.npz"),
    "scan": ((*PAIR, "--method", "wild-type-marginal"), "s.csv"),
    "evaluate": (("--run", "{model}", "--input", "{d}", "--suite", "perplexity"), "v"),
    "fit": (
        ("--input", "{runs.csv}", "--law", "chinchilla", "--bootstrap", "0", "--huber-delta", "1"),
        "fit",
    ),
    "curves": (("--input", "{curves.csv}"), "c"),
    "finetune": (
        ("--run", "{model}", "--input", "{assay.csv}", "--target", "kd", "--groups", "sequence",
         "--folds", "2", "--steps", "1"),
        "t",
    ),
    "predict": (("--run", "{tuned}", "--input", "{assay.csv}"), "p.csv"),
}  # fmt: skip


def flags_of(name, inputs, out):
    flags, _ = WRITE[name]
    given = [str(inputs / f[1:-1]) if f.startswith("{") else f for f in flags]
    return "moe_ablm", name.split()[0], *given, "--out", out


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system without room: a file fills it."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    (folder / "ballast").write_bytes(b"x" * (1 << 16))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


SLOW = {"finetune": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in WRITE])
def test_a_full_disk_is_one_line_and_leaves_nothing(name, disk, inputs, run_quickly):
    before = sorted(disk.rglob("*"))
    result = run_quickly(*flags_of(name, inputs, disk / WRITE[name][1]))
    # on a busy machine it is told that something was compiled
    lines = result.stderr.splitlines(keepends=True)
    result.stderr = "".join(each for each in lines if "compiled for" not in each)
    refused(result)
    assert re.search("no space left|disk is full", result.stderr, re.IGNORECASE), result.stderr
    assert sorted(disk.rglob("*")) == before


@pytest.mark.parametrize("name", WRITE)
def test_a_read_only_place_is_refused_before_anything_is_computed(name, disk, inputs, run_quickly):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        # what it would read is not even there
        flags = [f.replace(str(inputs), "/nowhere") for f in map(str, flags_of(name, inputs, ""))]
        result = run_quickly(*flags[:-1], disk / WRITE[name][1])
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    refused(result, "--out", "no permission to write", str(disk))


@pytest.mark.parametrize("name", ["simulate", "annotate"])
def test_a_file_of_the_user_is_replaced_only_when_asked(name, tmp_path, inputs, run_quickly):
    out = tmp_path / WRITE[name][1]
    out.write_text("mine")
    flags = flags_of(name, inputs, out)
    refused(run_quickly(*flags), str(out), "there already", "--overwrite")
    assert out.read_text() == "mine"
    done = run_quickly(*flags, "--overwrite")
    assert done.returncode == 0 and out.read_bytes() != b"mine", done.stderr


def test_an_input_is_never_replaced(tmp_path, run_quickly):
    path = tmp_path / "pairs.parquet"
    write_table(simulate(20, seed=1), path)
    before = path.read_bytes()
    flags = ("--input", path, "--out", path, "--overwrite")
    refused(run_quickly("moe_ablm", "annotate", *flags), "is an input")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [
        ("simulate", "s.csv.gz", ("s.csv.gz", "a name that ends in .gz is a file's")),
        ("simulate", "s.xlsx", (".xlsx",)),
        ("prepare", "d.parquet", (".parquet",)),
        ("report", "a_file", ("a_file is a file: name a directory",)),
        ("fit", "a_file/x", ("a_file is not a directory",)),
        ("annotate", "a.json", ("ends in .parquet, .csv, .tsv",)),
        ("embed", "e.txt", (".csv, .parquet, .jsonl, .npz",)),
        ("describe", "", ("the name is empty",)),
        ("export", "n" * 300, ("too long",)),
    ],
)
def test_names_that_cannot_be_meant(name, out, words, tmp_path, inputs, run_quickly):
    (tmp_path / "a_file").write_text("")
    place = tmp_path / out if out else ""
    refused(run_quickly(*flags_of(name, inputs, place)), "--out", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["a_file"]


def test_several_files_appear_together_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), all_or_none(out) as directory:
        (directory / "one").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with all_or_none(out) as directory:
        (directory / "one").write_text("1")
        (directory / "figures").mkdir()
        (directory / "figures" / "two").write_text("2")
        assert not out.exists()
    (out / "mine").write_text("kept")
    with pytest.raises(ZeroDivisionError), all_or_none(out) as directory:
        (directory / "one").write_text("other")
        raise ZeroDivisionError
    with all_or_none(out) as directory:
        (directory / "three").write_text("3")
    found = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert found == {"one": "1", "figures/two": "2", "three": "3", "mine": "kept"}
    assert [p.name for p in out.parent.iterdir()] == ["b"]


def test_a_comparison_of_a_thing_with_itself(tmp_path, run_quickly):
    flags = ("--input", f"a={tmp_path}", "--input", f"b={tmp_path}/.", "--out", tmp_path / "c")
    refused(run_quickly("moe_ablm", "compare", *flags), "given twice")
