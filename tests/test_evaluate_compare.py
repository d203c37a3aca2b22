"""Comparisons of evaluated models: planted differences, seeds, coverage, claims, refusals."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_evaluations import (
    UNITS,
    about,
    gain_outcome,
    loss_outcome,
    routing_outcome,
    write_evaluation,
)
from test_cli import refused

from moe_ablm.evaluation import partners
from moe_ablm.evaluation.estimates import Sample
from moe_ablm.evaluation.experts.traits import PLANNED
from moe_ablm.evaluation.nulls import NULLS
from moe_ablm.evaluation.reporting.claims import (
    ALONE,
    EXPLORATORY,
    HOLDS,
    MATCHED,
    NONE,
    NOT,
    OPEN,
    PARTNERS,
    claims_of,
    verdict_of,
)
from moe_ablm.evaluation.reporting.compare import compare
from moe_ablm.evaluation.reporting.results import read_evaluated, require_same_basis

EFFECT = -0.05
DENSE = "a dense model has no experts"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> dict[str, list]:
    """Two seeds each of: dense; top2, better by EFFECT; soft, no better."""
    path = tmp_path_factory.mktemp("evaluations")
    effects = {"dense": (0.0, 0.002), "top2": (EFFECT, EFFECT - 0.003), "soft": (0.0, 0.001)}
    routers = {"dense": "none", "top2": "topk", "soft": "soft"}
    excess = {"top2": (0.8, 0.05), "soft": (0.01, 0.02)}
    directories = {}
    for kind, each in effects.items():
        for seed, effect in enumerate(each):
            name = f"{kind}{seed}"
            directories.setdefault(kind, []).append(
                write_evaluation(
                    path / name,
                    about(routers[kind], name),
                    perplexity=loss_outcome(effect, len(directories) * 2 + seed),
                    mutations=gain_outcome(0.3 if kind != "soft" else -0.3),
                    routing=routing_outcome(*excess[kind]) if kind in excess else DENSE,
                )
            )
    return directories


def read(evaluated: dict[str, list], *kinds: str, seeds: int = 2) -> list:
    return [read_evaluated(k, d) for k in kinds or evaluated for d in evaluated[k][:seeds]]


def flags(evaluated: dict[str, list], *kinds: str) -> list[str]:
    return [f"--input={k}={d}" for k in kinds or evaluated for d in evaluated[k]]


def test_planted_differences_are_found_and_none_where_there_is_none(evaluated):
    comparison = compare(read(evaluated))
    for region in ("all", "CDRH3"):
        labels = {"test set": "paired", "region": region}
        better = comparison.difference("perplexity", "loss", "top2", "dense", **labels)
        same = comparison.difference("perplexity", "loss", "soft", "dense", **labels)
        assert better.value == pytest.approx(EFFECT, abs=0.012)
        assert better.low < EFFECT < better.high < 0
        assert same.low < 0 < same.high
        assert (better.units, better.seeds) == (len(UNITS), 2)
        turned = comparison.difference("perplexity", "loss", "dense", "top2", **labels)
        assert (turned.value, turned.low, turned.high) == pytest.approx(
            (-better.value, -better.high, -better.low)
        )


def test_the_value_of_a_difference_is_that_of_the_means_by_hand(evaluated):
    runs = read(evaluated, "dense", "top2")
    means = [
        next(s for s in r.samples("perplexity") if s.metric == "perplexity").number().value
        for r in runs
    ]
    labels = {"test set": "paired", "region": "all"}
    found = compare(runs).difference("perplexity", "perplexity", "top2", "dense", **labels)
    assert found.value == pytest.approx(np.mean(means[2:]) - np.mean(means[:2]), rel=1e-9)
    assert found.seed_sd == pytest.approx(np.std(means[2:], ddof=1), rel=1e-9)
    assert found.reference_sd == pytest.approx(np.std(means[:2], ddof=1), rel=1e-9)


def test_claims(evaluated):
    claims = claims_of(compare(read(evaluated)))
    experts, light, dense = claims
    assert experts.verdict == HOLDS and "soft" in experts.notes[0]
    assert light.verdict == f"{HOLDS} for dense and top2, {NOT} for soft"
    assert dense.verdict == f"{HOLDS} for top2, {OPEN} for soft"
    told = [f.sentence for f in dense.findings if f.kind == "top2" and f.decides]
    assert "dense 2 seeds" in told[0] and "0.0" in told[0] and "[0." in told[0]


def test_with_one_seed_there_is_no_verdict(evaluated):
    """However clear: what another training run would show is not known."""
    for claim in claims_of(compare(read(evaluated, seeds=1))):
        assert {f.verdict for f in claim.findings if f.decides} == {ALONE}
    two = [*read(evaluated, "dense"), *read(evaluated, "top2", seeds=1)]
    experts, light, dense = claims_of(compare(two))
    assert experts.verdict == ALONE and dense.verdict == ALONE
    assert light.verdict == f"{HOLDS} for dense, {ALONE} for top2"
    assert all(math.isnan(r.adjusted) for r in compare(two).results if r.reference)


def test_what_was_not_declared_is_exploratory(evaluated, tmp_path):
    runs = read(evaluated)
    contents = [r.content | {"claims": ["specialisation"]} for r in runs]
    some = [replace(r, content=c) for r, c in zip(runs, contents, strict=True)]
    experts, light, dense = claims_of(compare(some))
    assert experts.verdict == HOLDS
    assert light.verdict == dense.verdict == EXPLORATORY
    assert "did not name the claim 'pairing' before it ran" in light.notes[-1]
    before = [replace(runs[0], content={k: v for k, v in runs[0].content.items() if k != "claims"})]
    assert claims_of(compare([*before, *runs[1:]]))[0].verdict == EXPLORATORY


def test_evaluations_without_position_only_routers_have_no_verdict(evaluated, tmp_path):
    runs = []
    for seed in "ab":
        outcome = routing_outcome(0.8, 0.05)
        outcome = replace(outcome, numbers=[n for n in outcome.numbers if "null" not in n.metric])
        path = write_evaluation(tmp_path / seed, about("topk", seed), routing=outcome)
        runs.append(read_evaluated("top2", path))
    claim = claims_of(compare(runs))[0]
    assert claim.verdict == NONE and "evaluate again" in claim.findings[0].sentence
    assert not [n for n in compare(runs).stability if n.metric == "matched_p"]


def test_claims_without_numbers_are_not_evaluated(evaluated, tmp_path):
    runs = read(evaluated, "dense")
    experts, light, dense = claims_of(compare(runs))
    assert experts.verdict == NONE and dense.verdict == NONE and light.verdict == HOLDS
    alone = write_evaluation(
        tmp_path / "x", about("topk", "x", params_active=2000), mutations="no pairs"
    )
    experts, light, dense = claims_of(compare([*runs, read_evaluated("big", alone)]))
    assert experts.verdict == NONE and "not part of its suite" in experts.findings[0].sentence
    assert "no pairs" in next(f.sentence for f in light.findings if f.kind == "big")
    assert dense.verdict == NONE and "not part of its suite" in dense.findings[0].sentence


def test_unequal_active_parameters_are_told_and_not_judged(evaluated, tmp_path):
    large = write_evaluation(
        tmp_path / "x", about("soft", "x", params_active=2000), perplexity=loss_outcome(-0.5, 9)
    )
    runs = [*read(evaluated, "dense"), read_evaluated("large", large)]
    finding = claims_of(compare(runs))[2].findings[0]
    assert finding.verdict == NONE
    assert "active parameters are not equal: 2,000, of dense 1,000" in finding.sentence
    assert "nats gained on all residues" in finding.sentence


@pytest.mark.parametrize(
    ("excess", "over", "expected"),
    [(1.0, 0.1, HOLDS), (1.0, -0.1, NOT), (0.0, 0.1, NOT), (1.0, 0.0, OPEN)],
)
def test_every_region_has_its_expert_but_cdrh3_must_have_more_of_one(
    tmp_path, excess, over, expected
):
    runs = []
    for seed in "ab":
        outcome = routing_outcome(excess, 0.05)
        outcome.numbers[:] = [
            replace(n, value=over, low=over - 0.05, high=over + 0.05) if "over" in n.metric else n
            for n in outcome.numbers
        ]
        directory = write_evaluation(tmp_path / seed, about("topk", seed), routing=outcome)
        runs.append(read_evaluated("top2", directory))
    assert claims_of(compare(runs))[0].verdict == expected


@pytest.mark.parametrize("null", NULLS)
def test_each_null_must_be_exceeded(tmp_path, null):
    runs = []
    for seed in "ab":
        outcome = routing_outcome(1.0, 0.05)
        outcome.numbers[:] = [
            replace(n, value=0.0) if n.labels.get("null") == null else n for n in outcome.numbers
        ]
        directory = write_evaluation(tmp_path / seed, about("topk", seed), routing=outcome)
        runs.append(read_evaluated("top2", directory))
    assert claims_of(compare(runs))[0].verdict == NOT


@pytest.mark.parametrize(
    ("ends", "seeds", "expected"),
    [((0.1, 0.2), 2, HOLDS), ((-0.2, -0.1), 2, NOT), ((-0.1, 0.005), 3, NOT),
     ((-0.1, 0.2), 2, OPEN), ((np.nan, np.nan), 2, OPEN), ((0.001, 0.005), 2, NOT),
     ((0.001, 0.02), 5, HOLDS), ((0.1, 0.2), 1, ALONE), ((np.nan, np.nan), 1, ALONE)],
)  # fmt: skip
def test_verdicts(ends, seeds, expected):
    assert verdict_of(*ends, 0.01, seeds) == expected


def test_the_verb_writes_results_numbers_and_report(evaluated, tmp_path, main):
    out = tmp_path / "out"
    done = main("compare", *flags(evaluated), "--out", out, "--reference=top2")
    assert done.returncode == 0, done.stderr
    assert "specialises on CDRH3" in done.stdout and str(out / "report.html") in done.stdout
    content = json.loads((out / "results.json").read_text())
    assert [r["kind"] for r in content["runs"]] == ["top2"] * 2 + ["dense"] * 2 + ["soft"] * 2
    assert {r["reference"] for r in content["results"]} == {"", "top2", "dense"}
    assert len(content["claims"]) == 3 and content["claims"][0]["verdict"] == HOLDS
    with (out / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["results"])
    wanted = {"metric": "loss", "region": "all", "kind": "dense", "reference": "top2"}
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    assert float(row["value"]) == pytest.approx(-EFFECT, abs=0.012) and row["seeds"] == "2"
    again = main("compare", *flags(evaluated), "--out", tmp_path / "b", "--reference=top2")
    assert again.returncode == 0
    assert (tmp_path / "b" / "results.json").read_text() == (out / "results.json").read_text()


def test_an_evaluation_is_not_overwritten(evaluated, main):
    out = evaluated["dense"][0]
    before = (out / "results.json").read_text()
    refused(main("compare", *flags(evaluated), "--out", out), str(out), "holds an evaluation")
    assert (out / "results.json").read_text() == before


def test_a_kind_whose_perplexity_was_skipped(evaluated, tmp_path, main):
    skipped = write_evaluation(tmp_path / "x", about("topk", "x"), perplexity="no test split")
    given = [f"--input=dense={evaluated['dense'][0]}", f"--input=x={skipped}"]
    given.append(f"--input=top2={evaluated['top2'][0]}")
    done = main("compare", *given, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "loss_by_region.png").exists()
    assert "no test split" in (tmp_path / "out" / "report.html").read_text()


def test_runs_of_a_kind_differ_in_their_seed_alone(evaluated):
    runs = read(evaluated, "dense")
    other = read_evaluated("dense", evaluated["top2"][0])
    with pytest.raises(Exception, match="router topk, but none of .*dense0"):
        require_same_basis([*runs, other])


def test_every_seed_must_have_seen_as_many_tokens(evaluated, tmp_path):
    more = about("topk", "x", tokens_seen=2 * 10**6)
    path = write_evaluation(tmp_path / "x", more, perplexity=loss_outcome(EFFECT, 8))
    runs = [*read(evaluated, "dense", "top2"), read_evaluated("top2", path)]
    dense = claims_of(compare(runs))[2]
    assert dense.verdict == NONE
    told = "tokens seen are not equal: 2,000,000, of dense 1,000,000"
    assert told in dense.findings[0].sentence


def test_experts_of_the_same_number_are_not_compared(tmp_path):
    runs = []
    for name in "ab":
        outcome = SimpleNamespace(**vars(loss_outcome(0, 1)))
        labels = {"expert": "3", "layer": "0"}
        outcome.samples = [*outcome.samples, Sample("load", UNITS, *np.ones((2, 300)), labels)]
        path = write_evaluation(tmp_path / name, about("topk", name), perplexity=outcome)
        runs.append(read_evaluated(name, path))
    assert {r.metric for r in compare(runs).results} == {"loss", "perplexity"}


def change(path, *keys, to):
    content = json.loads(path.read_text())
    part = content
    for k in keys[:-1]:
        part = part[k]
    part[keys[-1]] = to
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "results.json").unlink(), ("unfinished", "give its command again")),
        (lambda d: (d / "results.json").write_text('{"schema": "mo'), ("damaged",)),
        (lambda d: change(d / "results.json", "schema", to="x/1"), ("damaged", "x/1")),
        (lambda d: change(d / "results.json", "model", to={}), ("damaged",)),
        (lambda d: change(d / "results.json", "seed", to=1), ("another seed", "1 instead of 0")),
        (lambda d: change(d / "results.json", "dataset", to=None), ("another dataset",)),
        (lambda d: change(d / "results.json", "precision", to="bfloat16"), ("precision",)),
        (lambda d: (d / "perplexity" / "result.json").unlink(), ("damaged or missing",)),
        (lambda d: change(d / "perplexity" / "result.json", "seconds", to=-1), ("newer",)),
        (lambda d: (d / "perplexity" / "samples.parquet").write_bytes(b"PAR1"), ("damaged",)),
        (lambda d: (d / "perplexity" / "samples.parquet").unlink(), ("damaged",)),
    ],
)
def test_directories_that_cannot_be_compared(spoil, words, evaluated, tmp_path, main):
    path = write_evaluation(tmp_path / "x", about("none", "x"), perplexity=loss_outcome(0, 9))
    spoil(path)
    done = main("compare", *flags(evaluated, "dense"), f"--input=x={path}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    refused(done, str(path), *words)
    assert not (tmp_path / "out").exists()


def test_samples_of_other_results_are_refused(tmp_path):
    a, b = (
        write_evaluation(tmp_path / n, about("none", n), perplexity=loss_outcome(0, i))
        for i, n in enumerate("ab")
    )
    (b / "perplexity" / "samples.parquet").replace(a / "perplexity" / "samples.parquet")
    with pytest.raises(Exception, match="is not of the results beside it"):
        read_evaluated("a", a).samples("perplexity")


def test_other_settings_and_a_model_given_twice_are_refused(evaluated, tmp_path):
    path = write_evaluation(tmp_path / "x", about("none", "x"), perplexity=loss_outcome(0, 9))
    for file, keys in (
        (path / "perplexity" / "result.json", ("settings", "antibodies")),
        (path / "results.json", ("evaluations", "perplexity", "settings", "antibodies")),
    ):
        change(file, *keys, to=5)
    runs = read(evaluated, "dense")
    with pytest.raises(Exception, match="perplexity was done with other settings"):
        require_same_basis([*runs, read_evaluated("x", path)])
    with pytest.raises(Exception, match="the same weights as .*dense0"):
        require_same_basis([*runs, runs[0]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input=dense"], ("expected NAME=DIR",)),
        (["--input=dense=nowhere"], ("nowhere", "is not a directory of")),
        (["--input=a=x", "--input=b=y", "--reference=c"], ("--reference c", "one of a, b")),
    ],
)
def test_wrong_command_lines(arguments, words, main, tmp_path):
    refused(main("compare", *arguments, "--out", tmp_path / "o"), *words)


def test_one_evaluation_is_none_to_compare(evaluated, tmp_path, main):
    one = f"--input=dense={evaluated['dense'][0]}"
    refused(main("compare", one, "--out", tmp_path / "o"), "two evaluations")


def test_labels_that_claims_look_for_are_those_of_the_evaluations():
    assert {"native", *PARTNERS} == {*partners.PARTNERS}
    assert {*MATCHED} == {matched for trait, matched in PLANNED if trait == "region"}


def test_experts_of_two_seeds_are_matched_whatever_their_numbers(tmp_path):
    runs = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        routing = routing_outcome(0.5, 0.1, order)
        path = write_evaluation(tmp_path / name, about("topk", name), routing=routing)
        runs.append(read_evaluated("top2", path))
    found = {n.metric: n for n in compare(runs).stability}
    assert found["matched_correlation"].value == pytest.approx(1)
    labels = {"kind": "top2", "seeds": "a, b", "layer": "1"}
    assert dict(found["matched_correlation"].labels) == labels
