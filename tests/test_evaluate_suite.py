"""The verb evaluate: suites that are broken off and go on, refusals, what is skipped and why."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from planted import StandIn, arbitrary
from small_datasets import random_records, write_dataset
from strict_json import read_all_strictly
from synthetic_evaluations import Settings
from test_cli import refused
from tiny_models import tiny_model

from moe_ablm.data.dataset import SPLITS
from moe_ablm.errors import UserError
from moe_ablm.evaluation import suite
from moe_ablm.evaluation.estimates import Number, Sample
from moe_ablm.evaluation.outcome import Outcome, Skipped
from moe_ablm.evaluation.reporting.results import numbers_csv
from moe_ablm.evaluation.suite import as_json, read_samples, write_samples

PAIRS, FEWER = "pairs", "fewer pairs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite")
    write_dataset(path / PAIRS, random_records(6, 0), SPLITS.index("test"))
    write_dataset(path / FEWER, random_records(5, 1), SPLITS.index("test"))
    return path


@pytest.fixture
def evaluate(main, monkeypatch, data):
    """The verb, with a stand-in for the encoder: `run` names a router, `stop_after` rows it fails.

    A failure is as Ctrl-C: exit code 130.
    """

    def run(out, *flags, run="dense", dataset=PAIRS, stop_after=None):
        def engine(run, precision, devices):
            stand_in = StandIn(arbitrary, stop_after)
            stand_in.model, stand_in.precision = tiny_model(str(run)), precision
            return stand_in

        monkeypatch.setattr("moe_ablm.inference.engines.engine_of", engine)
        given = [f"--input={data / dataset}"] if dataset else []
        return main("evaluate", "--run", run, *given, "--out", out, *flags)

    return run


def results(out) -> dict:
    """`results.json` without times and rates."""
    content = json.loads((out / "results.json").read_text())
    for kept in content["evaluations"].values():
        kept.pop("seconds")
        kept["notes"] = [note for note in kept["notes"] if "positions/s" not in note]
    return content


def test_a_suite_that_was_broken_off_goes_on_and_ends_the_same(evaluate, tmp_path):
    flags = ["--suite=perplexity,positions"]
    whole = evaluate(tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    written = read_all_strictly(tmp_path / "whole")
    assert written >= {"evaluation.json", "result.json", "results.json"}
    broken = evaluate(tmp_path / "broken", *flags, stop_after=100)
    assert broken.returncode == 130
    assert (tmp_path / "broken" / "perplexity" / "result.json").exists()
    assert not (tmp_path / "broken" / "results.json").exists()
    kept = (tmp_path / "broken" / "perplexity" / "result.json").read_text()
    done = evaluate(tmp_path / "broken", *flags)
    assert done.returncode == 0 and "perplexity ..." not in done.stdout
    assert (tmp_path / "broken" / "perplexity" / "result.json").read_text() == kept
    assert results(tmp_path / "broken") == results(tmp_path / "whole")
    for name in ("numbers.csv", "perplexity/samples.parquet"):
        files = [(tmp_path / x / name).read_bytes() for x in ("broken", "whole")]
        assert files[0] == files[1]
    assert str(tmp_path / "broken" / "report.html") in done.stdout


def test_what_is_skipped_says_why_and_the_rest_goes_on(evaluate, tmp_path):
    done = evaluate(tmp_path / "o", "--suite=routing,perplexity,mutations")
    assert done.returncode == 0, done.stderr
    content = results(tmp_path / "o")["evaluations"]
    assert [kept["status"] for kept in content.values()] == ["done", "skipped", "skipped"]
    assert "dense model" in content["routing"]["reason"]
    assert "no germline" in content["mutations"]["reason"]
    assert "routing: skipped: " in done.stdout
    page = (tmp_path / "o" / "report.html").read_text()
    assert content["routing"]["reason"] in page and content["mutations"]["reason"] in page


def test_a_smaller_suite_keeps_what_earlier_ones_found(evaluate, tmp_path):
    assert evaluate(tmp_path, "--suite=positions,mutations").returncode == 0
    before = results(tmp_path)["evaluations"]
    done = evaluate(tmp_path, "--suite=perplexity")
    assert done.returncode == 0 and "positions" not in done.stdout
    after = results(tmp_path)["evaluations"]
    assert list(after) == ["perplexity", "positions"]  # mutations were skipped: nothing to keep
    assert after["positions"] == before["positions"]
    assert {"perplexity", "positions"} == {
        row["evaluation"] for row in csv.DictReader((tmp_path / "numbers.csv").open())
    }
    assert 'id="positions"' in (tmp_path / "report.html").read_text()


def test_without_anything_to_evaluate_on_nothing_is_done(evaluate, tmp_path):
    done = evaluate(tmp_path / "o", "--suite=perplexity,positions", dataset=None)
    refused(done, "give --input DIR", "--data NAME=FILE")
    assert not (tmp_path / "o").exists()


def test_what_several_could_not_do_stands_together_at_the_end(evaluate, tmp_path):
    variants = tmp_path / "variants.csv"
    variants.write_text("mutant,DMS_score\n")
    flags = ("--suite=perplexity,positions,routing", f"--data=fitness={variants}")
    done = evaluate(tmp_path / "o", *flags, dataset=None)
    assert done.returncode == 0, done.stderr
    *_, said, first, second = done.stdout.splitlines()
    assert said.startswith("not done")
    assert first.split(": ")[0].strip() == "perplexity, positions" and "no dataset" in first
    assert second.split(": ")[0].strip() == "routing" and "dense model" in second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "topk"}, ("another model",)),
        ({"dataset": FEWER}, ("another dataset",)),
        ({"flags": ["--seed=5"]}, ("another seed",)),
        ({"flags": ["--precision=bfloat16"]}, ("another precision",)),
    ],
)
def test_a_directory_holds_one_evaluation(change, words, evaluate, tmp_path):
    assert evaluate(tmp_path, "--suite=perplexity").returncode == 0
    before = (tmp_path / "results.json").read_text()
    flags = change.pop("flags", [])
    refused(evaluate(tmp_path, "--suite=perplexity", *flags, **change), str(tmp_path), *words)
    assert (tmp_path / "results.json").read_text() == before


@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_text('{"schema"')])
def test_results_of_nobody_knows_what_are_refused(spoil, evaluate, tmp_path):
    assert evaluate(tmp_path, "--suite=perplexity").returncode == 0
    spoil(tmp_path / "evaluation.json")
    refused(evaluate(tmp_path, "--suite=perplexity", run="topk"), "no evaluation.json")


def test_a_run_that_moved_is_the_same(evaluate, tmp_path, monkeypatch):
    assert evaluate(tmp_path, "--suite=perplexity").returncode == 0
    file = tmp_path / "evaluation.json"
    content = json.loads(file.read_text())
    content["model"]["source"], content["dataset"]["path"] = "elsewhere", "elsewhere"
    file.write_text(json.dumps(content))
    done = evaluate(tmp_path, "--suite=perplexity")
    assert done.returncode == 0 and "perplexity ..." not in done.stdout


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: (d / "result.json").write_text('{"status": "done", '),
        lambda d: (d / "result.json").write_text("[]"),
        lambda d: (d / "result.json").unlink(),
        lambda d: (d / "samples.parquet").unlink(),
    ],
)
def test_a_damaged_result_is_made_anew(spoil, evaluate, tmp_path):
    assert evaluate(tmp_path, "--suite=perplexity").returncode == 0
    before = results(tmp_path)
    spoil(tmp_path / "perplexity")
    done = evaluate(tmp_path, "--suite=perplexity")
    assert done.returncode == 0 and "perplexity ..." in done.stdout
    assert results(tmp_path) == before


def suite_file(tmp_path, settings: str):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({settings})\n"
    )
    return path


def test_settings_of_a_suite_file_are_used_and_other_ones_are_done_anew(evaluate, tmp_path):
    path = suite_file(tmp_path, "{'perplexity': {'antibodies': 4, 'repeats': 1}}")
    assert evaluate(tmp_path / "o", f"--suite={path}").returncode == 0
    kept = results(tmp_path / "o")["evaluations"]["perplexity"]
    assert kept["settings"] == {"antibodies": 4, "repeats": 1}
    path = suite_file(tmp_path, "{'perplexity': {'antibodies': 3, 'repeats': 1}}")
    again = evaluate(tmp_path / "o", f"--suite={path}")
    assert "perplexity ..." in again.stdout
    assert results(tmp_path / "o")["evaluations"]["perplexity"]["settings"]["antibodies"] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{'perplexitty': {}}", ("perplexitty", "did you mean", "perplexity")),
        ("{'perplexity': {'repeat': 1}}", ("perplexity.repeat", "repeats")),
        ("{'perplexity': {'repeats': 'many'}}", ("repeats='many'", "expected int")),
        ("{'perplexity': {'repeats': -1}}", ("repeats=-1", "1 or more")),
        ("{'perplexity': {'repeats': True}}", ("repeats=True", "expected int")),
        ("{'perplexity': {'repeats': 0}}", ("repeats=0", "1 or more")),
        ("{'perplexity': 5}", ("perplexity=5", "mapping")),
        ("{'pairing': {'lr': float('nan')}}", ("lr=nan", "more than 0")),
        ("{'pairing': {'lr': -1}}", ("lr=-1", "more than 0")),
        ("1 / 0", ("line 3: ZeroDivisionError",)),
        ("{'perplexity': {}}).to_dict(", ("returned dict, expected a ConfigDict",)),
    ],
)
def test_wrong_suite_files(settings, words, evaluate, tmp_path):
    path = suite_file(tmp_path, settings)
    refused(evaluate(tmp_path / "o", f"--suite={path}"), "--suite", *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite=perplexity,routin"], ("'routin'", "did you mean", "routing")),
        (["--suite=nowhere.py"], ("nowhere.py", "is not there")),
        (["--suite=perplexity", "--seed=-1"], ("--seed -1", "0 or more")),
        (["--suite=perplexity", "--data=fitness"], ("NAME=FILE",)),
        (["--suite=perplexity", "--data=fitnes=x.csv"], ("fitnes", "did you mean")),
        (["--suite=perplexity", "--data=fitness=nowhere.csv"], ("nowhere.csv", "no such file")),
    ],
)
def test_wrong_flags(flags, words, evaluate, tmp_path):
    refused(evaluate(tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_numbers_csv_is_read_by_the_csv_module(evaluate, tmp_path):
    assert evaluate(tmp_path, "--suite=perplexity").returncode == 0
    with (tmp_path / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = results(tmp_path)["evaluations"]["perplexity"]["numbers"]
    assert len(rows) == len(numbers) > 10
    for row, number in zip(rows, numbers, strict=True):
        assert row["evaluation"] == "perplexity" and row["metric"] == number["metric"]
        for name in ("value", "low", "high"):
            kept = number[name]
            assert row[name] == "" if kept is None else np.float32(row[name]) == np.float32(kept)
            assert len(row[name].partition("e")[0].strip("-0.").replace(".", "")) <= 9
        assert {k: row[k] for k in number["labels"]} == number["labels"]


def test_labels_with_commas_and_quotes_survive_the_csv():
    label = 'a, "b"\nc'
    number = as_json(Number("x", math.nan, {"gene": label}, n=3))
    text = numbers_csv(
        {"one": {"numbers": [number]}, "two": {"numbers": [as_json(Number("y", 1))]}}
    )
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert rows[0]["gene"] == label and rows[0]["value"] == "" and rows[0]["n"] == "3"
    assert rows[1]["gene"] == "" and rows[1]["value"] == "1.0"


def test_samples_are_kept_as_they_are(tmp_path):
    samples = [
        Sample("loss", ["u", "v", "u"], np.array([0.1, 1e9, -3]), np.array([1.0, 2, 3]),
               {"region": "CDRH3"}, "exp", "nats"),
        Sample("none", [], np.zeros(0), np.zeros(0)),
        Sample("x", ["w"], np.array([1.5]), np.array([2.0])),
    ]  # fmt: skip
    write_samples(samples, tmp_path / "s.parquet")
    for before, after in zip(samples, read_samples(tmp_path / "s.parquet"), strict=True):
        assert list(before.units) == list(after.units)
        np.testing.assert_array_equal(before.total, after.total)
        np.testing.assert_array_equal(before.weight, after.weight)
        for name in ("metric", "labels", "scale", "unit"):
            assert getattr(before, name) == getattr(after, name)
    (tmp_path / "s.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="s.parquet is damaged"):
        read_samples(tmp_path / "s.parquet")


def test_an_evaluation_is_done_once_and_a_skipped_one_tried_again(tmp_path, monkeypatch):
    calls, reasons = [], ["not yet"]

    def evaluate(subject, settings):
        calls.append(settings)
        if reasons:
            raise Skipped(reasons.pop())
        return Outcome([Sample("x", ["u"], np.ones(1), np.ones(1))], notes=["n"])

    module = SimpleNamespace(TITLE="T", __doc__="A  b\n c.", Settings=Settings, evaluate=evaluate)
    monkeypatch.setattr(suite, "module_of", lambda name: module)
    told: list[str] = []
    found = [suite.run_suite(None, {"x": Settings()}, tmp_path, told.append) for _ in range(3)]
    assert [f["x"]["status"] for f in found] == ["skipped", "done", "done"] and len(calls) == 2
    assert found[1] == found[2] and found[1]["x"]["about"] == "A b c."
    assert "x: skipped: not yet" in told
    suite.run_suite(None, {"x": Settings(7)}, tmp_path, told.append)
    assert len(calls) == 3


def test_what_is_broken_off_while_it_is_written_does_not_pass_for_what_was_before(
    tmp_path, monkeypatch
):
    def evaluate(subject, settings):
        draw = SimpleNamespace(name="p", caption="", draw=lambda: 1 / (settings.antibodies - 7))
        sample = Sample("x", ["u"], np.ones(1), np.ones(1))
        return Outcome([sample], pictures=[draw] if settings.antibodies == 7 else [])

    module = SimpleNamespace(TITLE="T", __doc__="A.", Settings=Settings, evaluate=evaluate)
    monkeypatch.setattr(suite, "module_of", lambda name: module)
    suite.run_suite(None, {"x": Settings()}, tmp_path, str)
    assert suite.read_kept(tmp_path / "x") is not None
    with pytest.raises(ZeroDivisionError):
        suite.run_suite(None, {"x": Settings(7)}, tmp_path, str)
    assert suite.read_kept(tmp_path / "x") is None
