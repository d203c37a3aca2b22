"""Claims that a suite declares, and null kinds of model: the verb evaluate, refusals included."""

import json

import pytest
from small_datasets import random_records, write_dataset
from test_cli import refused
from test_evaluate_suite import suite_file
from tiny_models import tiny_model

from moe_ablm.data.dataset import SPLITS
from moe_ablm.evaluation.declared import RESTS_ON, declared
from moe_ablm.evaluation.suite import EVALUATIONS

CLAIMS = "{'claims': ['experts'], 'perplexity': {'antibodies': 3, 'repeats': 1}}"
PLAIN = "{'perplexity': {'antibodies': 3, 'repeats': 1}}"


@pytest.fixture
def evaluate(main, monkeypatch, tmp_path):
    """The verb, of a tiny model with experts."""
    write_dataset(tmp_path / "data", random_records(6, 0), SPLITS.index("test"))
    monkeypatch.setattr("moe_ablm.inference.engines.load_model", lambda *_: tiny_model("topk"))

    def run(out, *flags):
        return main("evaluate", "--run=x", f"--input={tmp_path / 'data'}", "--out", out, *flags)

    return run


def claims(out) -> list[str]:
    kept = json.loads((out / "evaluation.json").read_text())["claims"]
    assert kept == json.loads((out / "results.json").read_text())["claims"]
    return kept


def test_claims_rest_on_evaluations():
    assert set(RESTS_ON.values()) <= set(EVALUATIONS)


def test_a_claim_that_comes_after_its_numbers_is_not_declared(evaluate, tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    with_claims = suite_file(tmp_path, CLAIMS)
    assert evaluate(early, f"--suite={with_claims}").returncode == 0
    assert claims(early) == ["experts"]
    assert "Claims declared before" in (early / "report.html").read_text()
    plain = suite_file(tmp_path, PLAIN)
    assert evaluate(early, f"--suite={plain}").returncode == 0
    assert claims(early) == ["experts"]  # it was declared before, and stays so
    assert evaluate(late, f"--suite={plain}").returncode == 0
    with_claims = suite_file(tmp_path, CLAIMS)
    assert evaluate(late, f"--suite={with_claims}").returncode == 0
    assert claims(late) == []


def test_declared_by_hand(tmp_path):
    (tmp_path / "routing").mkdir()
    assert declared(["pairing", "specialisation"], {}, tmp_path) == ["specialisation", "pairing"]
    (tmp_path / "routing" / "result.json").write_text("{}")
    assert declared(["pairing", "specialisation"], {}, tmp_path) == ["pairing"]
    before = {"claims": ["specialisation"]}
    assert declared(["pairing"], before, tmp_path) == ["specialisation", "pairing"]


def test_an_evaluation_of_before_goes_on(evaluate, tmp_path):
    """evaluation.json without claims: the same evaluation, nothing is declared."""
    out, suite = tmp_path / "o", suite_file(tmp_path, PLAIN)
    assert evaluate(out, f"--suite={suite}").returncode == 0
    content = json.loads((out / "evaluation.json").read_text())
    del content["claims"]
    (out / "evaluation.json").write_text(json.dumps(content))
    done = evaluate(out, f"--suite={suite}")
    assert done.returncode == 0 and "perplexity ..." not in done.stdout


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{'claims': ['expert'], 'perplexity': {}}", ("'expert' is no claim", "experts")),
        ("{'claims': 'experts', 'perplexity': {}}", ("expected a list",)),
    ],
)
def test_wrong_claims_are_refused(settings, words, evaluate, tmp_path):
    path = suite_file(tmp_path, settings)
    refused(evaluate(tmp_path / "o", f"--suite={path}"), "--suite", *words)
    assert not (tmp_path / "o").exists()


def test_null_kinds_are_kinds_of_their_own(evaluate, tmp_path):
    found = {}
    for null, more in (("", ""), ("untrained", ""), ("position-only", ", 'routing': {}")):
        suite = suite_file(tmp_path, PLAIN[:-1] + more + "}")
        out, flags = tmp_path / f"o{null}", [f"--null={null}"] if null else []
        done = evaluate(out, f"--suite={suite}", *flags)
        assert done.returncode == 0, done.stderr
        found[null] = json.loads((out / "results.json").read_text())
        assert ("perplexity: skipped: position-only" in done.stdout) == (null == "position-only")
        assert (f"--null {null}" in (out / "report.html").read_text()) == bool(null)
    losses = [
        next(n["value"] for n in c["evaluations"]["perplexity"]["numbers"] if n["metric"] == "loss")
        for c in (found[""], found["untrained"])
    ]
    assert losses[0] != losses[1]
    assert found["untrained"]["model"]["sha256"] != found[""]["model"]["sha256"]
    assert list(found["position-only"]["evaluations"]) == ["routing"]
    assert found["position-only"]["model"]["null"] == "position-only"
    refused(evaluate(tmp_path / "o", f"--suite={suite}", "--null=position-only"), "another model")
    only = suite_file(tmp_path, PLAIN)
    refused(evaluate(tmp_path / "p", f"--suite={only}", "--null=shuffled"), "with routing")
