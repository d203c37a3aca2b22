"""`moe_ablm.load`: methods that answer frames with frames, as the verbs write them."""

import doctest
import importlib.util

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import HEAVY, LIGHT, tiny_model

import moe_ablm
from moe_ablm import antibody_model, api
from moe_ablm.antibody_model import AntibodyModel
from moe_ablm.errors import UserError
from moe_ablm.interop.saved import save_model

ROWS = {
    "donor": ["d1", "d1", "d2"],
    "heavy": ["EVQLVESG", "EVQLVES", "QVQLX"],
    "light": ["DIQM", "DIQM", "DIQMTQ"],
}
MASKED = ROWS | {"heavy": ["EVQLVESG", "EV__VES", "Q_QLX"]}
INDEX = ["mab", "twice", "twice"]
# method -> (its arguments, flags of the verb, rows, whether there is one line an antibody)
ASKED = {
    "embed": ({}, [], ROWS, True),
    "embed ": ({"level": "chain"}, ["--level", "chain"], ROWS, False),
    "score": ({"one_pass": True}, ["--one-pass"], ROWS, True),
    "score ": ({"level": "residue", "one_pass": True}, ["--level", "residue", "--one-pass"], ROWS,
               False),
    "infill": ({"samples": 2, "seed": 3}, ["--samples", "2", "--seed", "3"], MASKED, False),
    "scan": ({"method": "wild-type-marginal"}, ["--method", "wild-type-marginal"], ROWS, False),
    "route": ({}, [], ROWS, False),
    "attention": ({"layer": 0}, ["--layer", "0"], ROWS, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "8m"
    save_model(tiny_model("topk", layers=1), path)
    return path


@pytest.fixture(scope="module")
def model(run):
    return moe_ablm.load(run)


def plain(values) -> list:
    """None for NaN, so that lists may be compared."""
    return [None if value != value else value for value in values]


QUICK = ("embed", "score", "infill")  # the others, which the examples call too, by --slow
EVERY = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ASKED]


@pytest.mark.parametrize("asked", EVERY)
def test_a_frame_is_answered_as_the_verb_writes_it(asked, model, run, tmp_path, main):
    pandas = pytest.importorskip("pandas")
    options, flags, rows, alone = ASKED[asked]
    verb = asked.strip()
    frame = pandas.DataFrame(rows, index=INDEX)
    found = getattr(model, verb)(frame, **options)
    frame.to_csv(tmp_path / "a.csv", index=False)
    out = tmp_path / "a.parquet"
    done = main(verb, "--run", run, "--input", tmp_path / "a.csv", "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    written = pq.read_table(out)
    owner = [int(name) - 1 for name in written["sequence_id"].to_pylist()]
    assert list(found.index) == [INDEX[i] for i in owner]
    assert alone == (owner == [0, 1, 2]) == ("sequence_id" not in found.columns)
    for name in written.column_names[alone:]:
        if pa.types.is_fixed_size_list(written.schema.field(name).type):
            matrix = np.array(written[name].to_pylist(), np.float32)
            numbered = [f"{name}_{i}" for i in range(matrix.shape[1])]
            np.testing.assert_array_equal(found[numbered].to_numpy(np.float32), matrix)
        else:
            assert plain(found[name]) == plain(written[name].to_pylist()), name


def test_polars_and_arrow_are_answered_in_kind(model):
    pandas = pytest.importorskip("pandas")
    expected = model.score(pandas.DataFrame(ROWS), one_pass=True)
    table = model.score(pa.table(ROWS), one_pass=True)
    assert isinstance(table, pa.Table) and table.to_pandas().equals(expected)
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS)
    found = frame.hstack(model.score(frame, one_pass=True))
    assert isinstance(found, polars.DataFrame) and found["donor"].to_list() == ROWS["donor"]
    assert found["pll"].to_list() == list(expected["pll"])
    assert set(model.route(frame)["sequence_id"]) == {"1", "2", "3"}


def test_names_of_a_frame_are_in_answers_of_many_lines(model):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": ["x", "y", "z"], **ROWS}, index=[7, 8, 9])
    found = model.embed(frame, level="chain")
    assert list(found["sequence_id"]) == ["x", "x", "y", "y", "z", "z"]
    assert list(found.index) == [7, 7, 8, 8, 9, 9]


def test_names_of_single_chains_are_in_answers_of_many_lines(model):
    """A heavy and a light chain, of every kind of frame; an index of pandas is kept, too."""
    pandas = pytest.importorskip("pandas")
    rows = {"name": ["x", "y"], "sequence": [HEAVY, LIGHT]}
    chains = [("x", "heavy"), ("y", "light")]
    found = model.embed(pa.table(rows), level="chain")
    named = (found[n].to_pylist() for n in ("sequence_id", "chain"))
    assert list(zip(*named, strict=True)) == chains
    answer = model.embed(pandas.DataFrame(rows, index=["p", "q"]), level="chain")
    assert list(zip(answer["sequence_id"], answer["chain"], strict=True)) == chains
    assert list(answer.index) == ["p", "q"]
    polars = pytest.importorskip("polars")
    answer = model.embed(polars.DataFrame(rows), level="chain")
    assert list(zip(answer["sequence_id"], answer["chain"], strict=True)) == chains


def test_what_is_no_frame_is_answered_by_the_functions(model):
    pairs = list(zip(ROWS["heavy"], ROWS["light"], strict=True))
    assert isinstance(model, AntibodyModel) and repr(model).startswith("AntibodyModel(")
    np.testing.assert_array_equal(model.embed(pairs), api.embed(model, pairs))
    found, expected = model.score(ROWS, one_pass=True), api.score(model, pairs, one_pass=True)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["pll"], expected["pll"])
    assert len(model.infill(("EV_", ""))[0]["heavy"]) == 3


def test_wrong_arguments_are_told_as_of_python(model):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    for call, words in (
        (lambda: model.embed(frame, "chains"), "^level='chains': expected one of"),
        (lambda: model.embed(frame, layer=9), "^layer=9: expected 0 "),
        (lambda: model.scan(frame, "masked"), "^method='masked'"),
        (lambda: model.score(frame[:0]), "^antibodies: found a data frame without rows"),
        (lambda: model.score(frame[["donor"]]), "columns donor; expected"),
        (lambda: model.infill(frame, samples=-1), "^samples=-1"),
        (lambda: model.score(pandas.DataFrame(MASKED)), "'_' at residue 3"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_embeddings_as_anndata(model, run, tmp_path, main):
    """What the verb writes and the method gives is read by anndata itself, with what it is of."""
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": ["x", "y", "x"], **ROWS}, index=INDEX)
    frame.to_csv(tmp_path / "a.csv", index=False)
    out = tmp_path / "a.h5ad"
    flags = ["--run", run, "--input", tmp_path / "a.csv", "--out", out]
    assert main("embed", *flags).returncode == 0
    written, expected = anndata.read_h5ad(out), model.embed(frame).to_numpy(np.float32)
    np.testing.assert_array_equal(written.X, expected)
    assert list(written.obs_names) == ["x", "y", "x-1"]
    given = model.anndata(frame)
    given.write_h5ad(tmp_path / "b.h5ad")
    read = anndata.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(read.X, expected)
    assert list(read.obs["donor"]) == ROWS["donor"]
    assert list(read.obs_names) == ["mab", "twice", "twice-1"]
    chains = model.anndata(list(zip(ROWS["heavy"], ROWS["light"], strict=True)), level="chain")
    assert list(chains.obs_names[:3]) == ["1-heavy", "1-light", "2-heavy"]
    refused = main("score", *flags[:-1], tmp_path / "c.h5ad")
    assert refused.returncode == 2 and "expected a name that ends in .csv" in refused.stderr


def test_anndata_that_is_not_installed_is_told(model, run, monkeypatch, main):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^AntibodyModel.anndata needs .*moe_ablm\[anndata\]"):
        model.anndata("EVQ")
    refused = main("embed", "--run", run, "--heavy", "EVQ", "--out", "x.h5ad")
    assert refused.returncode == 2 and "--out x.h5ad needs the package anndata" in refused.stderr


def test_examples_of_the_documentation(model, run, monkeypatch):
    """Every public method has one; "runs/8m" is a tiny model."""
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(run.parent.parent)
    run.parent.rename("runs")
    pairs = pandas.DataFrame(
        {"heavy": ["EVQLVES", "QVQLQESGPG"], "light": ["DIQM", None]},
        index=["mab1", "mab2"],
    )
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    found = finder.find(antibody_model, extraglobs={"model": model, "pairs": pairs})
    asked = {test.name.rpartition(".")[2] for test in found if test.examples}
    assert asked == {"AntibodyModel", "anndata", *api.__all__} - {"UserError", "load"}
    if importlib.util.find_spec("anndata") is None:
        found = [test for test in found if not test.name.endswith(".anndata")]
    for test in found:
        assert runner.run(test).failed == 0, test.name
