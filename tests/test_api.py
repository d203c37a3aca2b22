"""The verbs in Python and on the command line, on a model in a directory."""

import csv
import importlib.metadata
import json
import subprocess
from subprocess import PIPE

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import command, run_command
from tiny_models import engine, tiny_model

from moe_ablm import api
from moe_ablm.errors import UserError
from moe_ablm.interop.saved import save_model

PAIRS = [("EVQLVES", "DIQM"), ("evq", ""), ("", "DIQMTX")]
FILE = "id,heavy,light\na,EVQLVES,DIQM\nb,evq,\nc,,DIQMTX\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of a dense model and of one with experts."""
    directory = tmp_path_factory.mktemp("runs")
    for router in ("dense", "topk"):
        save_model(tiny_model(router, length=32), directory / router)
    return directory


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text(FILE)
    return file


def lines(path) -> list[dict]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_a_model_is_loaded_from_its_directory(runs):
    model = api.load(runs / "dense")
    np.testing.assert_array_equal(api.embed(model, PAIRS), api.embed(engine(), PAIRS))
    with pytest.raises(UserError, match="nowhere"):
        api.load("nowhere")


def test_shapes_of_answers():
    model = engine("topk")
    assert api.embed(model, PAIRS).shape == (3, 16)
    assert api.embed(model, []).shape == (0, 16)
    assert [e.shape for e in api.embed(model, PAIRS, "chain")] == [(2, 16), (1, 16), (1, 16)]
    assert [e.shape for e in api.embed(model, PAIRS, "residue")] == [(11, 16), (3, 16), (6, 16)]
    scores = api.score(model, PAIRS)
    assert scores["residues"].tolist() == [11, 3, 5]
    np.testing.assert_allclose(scores["perplexity"], np.exp(-scores["pll"] / scores["residues"]))
    each = api.score(model, PAIRS, level="residue")
    np.testing.assert_allclose(scores["pll"], [np.nansum(e) for e in each], rtol=1e-6)
    assert [s.shape for s in api.scan(model, PAIRS)] == [(11, 20), (3, 20), (6, 20)]
    routed = api.route(model, PAIRS)[0]
    assert routed["layers"].tolist() == [0, 1] and routed["experts"].shape == (11, 2, 2)
    (cross,) = api.attention(model, PAIRS[:1])
    assert cross["heavy_to_light"].shape == (2, 7, 4)
    (done,) = api.infill(model, [("EV_", "")], top=3)
    assert len(done["filled"][0]["candidates"]) == 3 and len(done["heavy"]) == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: api.embed(engine(), PAIRS, "chains"), "level='chains': expected one of"),
        (lambda: api.score(engine(), PAIRS, level="chain"), "level='chain'"),
        (lambda: api.scan(engine(), PAIRS, "masked"), "method='masked'"),
        (lambda: api.score(engine(), [("E_", "")]), "'_' at residue 2"),
        (lambda: api.route(engine(), PAIRS), "a dense model"),
        (lambda: api.embed(engine(), PAIRS, layer=99), "^layer=99: expected 0 "),
        (lambda: api.attention(engine(), PAIRS[:1], layer=9), "^layer=9: expected 0 to 1"),
        (lambda: api.load("nowhere"), "^run nowhere is not there"),
        (lambda: api.embed(engine(), "X"), "too short: the heavy chain is 'X'"),
        (lambda: api.score(engine(), [("EVQ", "D")]), "too short: the light chain is 'D'"),
    ],
)
def test_what_cannot_be_answered_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


# verb -> (flags, number of lines of PAIRS, a column)
VERBS = {
    "embed": ([], 3, "embedding_15"),
    "score": (["--one-pass"], 3, "perplexity"),
    "infill": ([], 3, "heavy"),
    "scan": (["--method", "wild-type-marginal"], 19 * 19, "mutant"),
    "route": ([], 20 * 2 * 2, "gate"),
    "attention": (["--on-bad-row", "skip"], 2 * 7 * 4, "weight"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_a_table(verb, runs, pairs, tmp_path, run_quickly):
    flags, expected, column = VERBS[verb]
    out = tmp_path / "out.csv"
    arguments = [verb, "--run", runs / "topk", "--input", pairs, "--out", out, *flags]
    result = run_quickly("moe_ablm", *arguments)
    assert result.returncode == 0, result.stderr
    found = lines(out)
    assert len(found) == expected and column in found[0]
    assert found[0]["sequence_id"] == "a"
    again = run_quickly("moe_ablm", *arguments)
    assert again.returncode == 0 and "is complete" in again.stdout
    other = run_quickly("moe_ablm", *arguments, "--precision", "bfloat16_operands")
    assert other.returncode == 2 and "other precision" in other.stderr


def test_the_command_line_says_what_python_says(runs, pairs, tmp_path, run_quickly):
    out = tmp_path / "out.parquet"
    result = run_quickly(
        "moe_ablm", "score", "--run", runs / "dense", "--input", pairs, "--out", out
    )
    assert result.returncode == 0, result.stderr
    found = pq.read_table(out)
    assert found["sequence_id"].to_pylist() == ["a", "b", "c"]
    expected = api.score(engine(), PAIRS)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].to_numpy(), values, rtol=1e-6, err_msg=name)


def test_chains_on_the_command_line_and_csv_on_the_terminal(runs, tmp_path):
    """The one test that starts a process of its own, as people do; what it compiles is kept."""
    flags = ["--heavy", "EV_LV", "--light", "DI<mask>", "--level", "residue", "--top", "2"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    result = run_command("moe_ablm", "infill", "--run", runs / "dense", *flags, **environment)
    assert result.returncode == 0, result.stderr
    header, *rows = list(csv.reader(result.stdout.splitlines()))
    assert header[:5] == ["sequence_id", "sample", "chain", "position", "residue"]
    assert sorted((row[2], row[3]) for row in rows) == [("heavy", "3"), ("light", "3")]
    assert any((tmp_path / "moe_ablm" / "compiled").iterdir())


def test_an_interrupted_command_goes_on(runs, pairs, tmp_path, run_quickly, monkeypatch):
    from moe_ablm.verbs import asking, questions

    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    flags = ["score", "--run", runs / "dense", "--input", pairs, "--one-pass", "--out"]
    assert run_quickly("moe_ablm", *flags, whole).returncode == 0

    import argparse

    from moe_ablm.inference.antibodies import windows

    parser = argparse.ArgumentParser()
    questions.add_score_arguments(parser)
    args = parser.parse_args(
        [str(flag) for flag in [*flags[1:], out]], argparse.Namespace(verb="score")
    )

    def two_then_stop(engine, question, antibodies):
        for window in windows(antibodies, lambda a: (1, 1), (2, 1 << 20)):
            yield window
            raise KeyboardInterrupt

    monkeypatch.setattr(asking, "_windows", two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        questions.score(args)
    assert not out.exists()
    result = run_quickly("moe_ablm", *flags, out)
    assert result.returncode == 0 and "going on after 2 antibodies" in result.stderr
    assert [json.loads(r) for r in out.open()] == [json.loads(r) for r in whole.open()]


def test_infill_says_when_there_is_nothing_to_fill(runs, run_quickly):
    result = run_quickly("moe_ablm", "infill", "--run", runs / "dense", "--heavy", "EVQ")
    assert result.returncode == 0 and "1 antibody without anything to fill in:" in result.stderr


def test_the_api_is_imported_and_described_without_jax():
    code = (
        "import sys, moe_ablm, moe_ablm.api as api; print(moe_ablm.__version__, *api.__all__);"
        "assert not {'jax', 'pyarrow'} & set(sys.modules)"
    )
    argv, options = command("x")
    done = subprocess.run([argv[0], "-c", code], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found[0] == importlib.metadata.version("moe_ablm")
    for name in set(found[1:]) - {"UserError"}:
        assert "Example:" in getattr(api, name).__doc__
    assert repr(engine()).endswith("parameters, float32)")


def test_a_reader_of_the_terminal_may_leave(runs):
    argv, options = command("moe_ablm", "scan", "--run", runs / "dense", "--heavy", "EVQ" * 9)
    with subprocess.Popen(argv, stdout=PIPE, stderr=PIPE, **options) as process:
        process.stdout.close()
        assert process.stderr.read().count("\n") <= 1  # that it compiled
    assert process.returncode == 1


WRONG = {
    "no input": (["score"], ("--input",)),
    "both inputs": (["score", "--input", "{pairs}", "--heavy", "EVQ"], ("not both",)),
    "mask in score": (["score", "--heavy", "EV_"], ("'_' at residue 3",)),
    "too long": (["score", "--heavy", "E" * 31], ("too long for this model: 33", "at most 32")),
    "suffix": (["embed", "--heavy", "EVQ", "--out", "{tmp}/x.tsv"], (".csv", ".npz")),
    "layer": (["embed", "--heavy", "EVQ", "--layer", "3"], ("--layer 3", "0", "2")),
    "devices": (["embed", "--heavy", "EVQ", "--batch-tokens", "0"], ("--batch-tokens 0",)),
    "one chain": (["attention", "--heavy", "EVQ"], ("one chain only",)),
    "dense": (["route", "--heavy", "EVQ"], ("a dense model",)),
    "no file": (["embed", "--input", "{tmp}/pair.csv"], ("no such file", "pairs.csv")),
    "temperature": (["infill", "--heavy", "EV_", "--temperature", "0"], ("--temperature 0",)),
    "more devices than cores": (["embed", "--heavy", "EVQ", "--devices", "9999"], ("found (cpu)",)),
    "one letter": (["score", "--heavy", "E"], ("too short: the heavy chain is 'E'",)),
    "not a number": (["infill", "--heavy", "EV_", "--temperature", "nan"], ("--temperature nan",)),
    "none left": (
        ["attention", "--input", "{alone}", "--on-bad-row", "skip"],
        ("no antibody is left", "1 rejected: one chain only", "row 1 (line 2)"),
    ),
    "run": (["embed", "--run", "{tmp}", "--heavy", "EVQ"], ("config.json",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name, runs, pairs, tmp_path, run_quickly):
    (verb, *flags), words = WRONG[name]
    alone = runs / "alone.csv"
    alone.write_text("id,heavy,light\na,EVQ,\n")
    flags = [flag.format(pairs=pairs, alone=alone, tmp=tmp_path) for flag in flags]
    result = run_quickly("moe_ablm", verb, "--run", runs / "dense", *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("moe_ablm: ") and all(word in line for word in words), line
    assert {p.name for p in tmp_path.iterdir()} == {"pairs.csv"}
