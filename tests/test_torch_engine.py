"""Models of transformers beside ours: the same numbers as transformers itself, on every path."""

import csv
import functools
import json
import shutil

import numpy as np
import pytest
from pretrained_models import FAMILIES, save
from safetensors import safe_open
from small_datasets import random_records, write_dataset
from tiny_models import HEAVY, LIGHT, tiny_model

import moe_ablm
from moe_ablm.data.antibody import row_of
from moe_ablm.data.dataset import SPLITS
from moe_ablm.data.tokenizer import AMINO_ACID_TOKENS, AMINO_ACIDS
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.attention import attention
from moe_ablm.inference.buckets import NotOffered
from moe_ablm.inference.embed import embed
from moe_ablm.inference.engines import engine_of
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.inference.scan import scan
from moe_ablm.inference.score import score
from moe_ablm.interop.pretrained import PREFIX
from moe_ablm.interop.saved import save_model

pytestmark = pytest.mark.hf
SHORT = [("EVQLV", "DIQM"), ("EVQLVES", ""), ("", "DIQMT"), ("EVXLV", "DIQM")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("torch", reason="needs the extra `hf`")
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    folder = tmp_path_factory.mktemp("theirs")
    for name, family in FAMILIES.items():
        save(family, folder / name)
    return folder


@pytest.fixture(scope="module")
def asked(place):
    """Engines by the name of their family."""
    made = {}

    def engine(name, **options):
        if name not in made:
            made[name] = engine_of(f"{PREFIX}{place / name}", **options)
        return made[name]

    return engine


@pytest.fixture(scope="module")
def direct(place):
    """Logits and hidden states at the residues, from transformers and its own tokenizer."""
    import torch
    import transformers

    @functools.cache
    def loaded(name):
        family, path = FAMILIES[name], place / name
        network = getattr(transformers, f"{family.kind}ForMaskedLM").from_pretrained(path)
        return network.eval(), getattr(transformers, family.tokenizer).from_pretrained(path)

    def ask(name, heavy, light, masked=None):
        family, (network, tokenizer) = FAMILIES[name], loaded(name)
        ids = tokenizer(family.text(heavy, light), return_tensors="pt")["input_ids"]
        letters = tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS))
        known = {*letters, tokenizer.convert_tokens_to_ids("X")}
        residues = [i for i, t in enumerate(ids[0].tolist()) if t in known]
        if masked is not None:
            ids[0, residues[masked]] = tokenizer.mask_token_id
        with torch.no_grad():
            out = network(ids, output_hidden_states=True)
        logits = out.logits[0, residues].log_softmax(-1)[:, letters]
        return logits.numpy(), [h[0, residues].numpy() for h in out.hidden_states]

    return ask


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_hidden_states_are_those_of_transformers(asked, direct, name):
    engine = asked(name)
    antibodies = given(SHORT, engine.model.layout, engine.model.length)
    rows = [row_of(a, engine.model.layout) for a in antibodies]
    found = dict(engine.run(EveryPosition(), [row.tokens for row in rows]))
    layers = [embed(engine, antibodies, "residue", layer) for layer in (0, 1, -1)]
    for i, (antibody, row) in enumerate(zip(antibodies, rows, strict=True)):
        logits, hidden = direct(name, antibody.heavy, antibody.light)
        ours = found[i][row.places][:, AMINO_ACID_TOKENS]
        np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)
        for states, expected in zip(layers, (hidden[0], hidden[1], hidden[-1]), strict=True):
            np.testing.assert_allclose(states[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_scores_mask_every_residue_in_turn(asked, direct, name):
    engine = asked(name)
    (antibody,) = given(SHORT[:1], engine.model.layout, engine.model.length)
    (found,) = score(engine, [antibody])
    letters = antibody.heavy + antibody.light
    expected = [
        direct(name, antibody.heavy, antibody.light, place)[0][place, AMINO_ACIDS.index(letter)]
        for place, letter in enumerate(letters)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    (odds,) = scan(engine, [antibody], "wild-type-marginal")
    logits = direct(name, antibody.heavy, antibody.light)[0]
    wild = [AMINO_ACIDS.index(letter) for letter in letters]
    expected = logits - logits[range(len(wild)), wild][:, None]
    np.testing.assert_allclose(odds, expected, rtol=1e-5, atol=2e-5)


def test_a_result_depends_on_its_antibody_alone(asked):
    engine = asked("ESM-2")
    pairs = [(HEAVY, LIGHT), (HEAVY[:-1], LIGHT), (HEAVY, LIGHT[::-1]), (HEAVY, "")]
    antibodies = given(pairs, engine.model.layout, engine.model.length)
    together = embed(engine, antibodies)
    for antibody, states in zip(antibodies, together, strict=True):
        np.testing.assert_allclose(embed(engine, [antibody])[0], states, rtol=1e-5, atol=1e-5)


def test_what_only_encoders_of_ours_have_is_refused(asked, place):
    engine = asked("IgBert")
    antibodies = given(SHORT[:1], engine.model.layout, engine.model.length)
    with pytest.raises(NotOffered, match="AttentionWeights is of encoders of moe_ablm alone"):
        attention(engine, antibodies)
    with pytest.raises(NotOffered, match="neither trained nor initialised"):
        engine.with_model(engine.model)
    for options in ({"devices": 2}, {"precision": "bfloat16_operands"}, {"batch_tokens": 0}):
        (name,) = options
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            engine_of(f"{PREFIX}{place / 'IgBert'}", **options)


def test_verbs_take_it_as_a_run(place, main, tmp_path, direct):
    run = f"{PREFIX}{place / 'AntiBERTa2'}"
    pair = ("--heavy", "EVQLV", "--light", "DIQM")
    done = main("score", "--run", run, *pair, "--one-pass", "--level", "residue",
                "--out", tmp_path / "s.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    logits = direct("AntiBERTa2", "EVQLV", "DIQM")[0]
    expected = [logits[i, AMINO_ACIDS.index(x)] for i, x in enumerate("EVQLVDIQM")]
    np.testing.assert_allclose([x["log_likelihood"] for x in lines], expected, rtol=1e-5)
    for verb, words in (("route", "a dense model"), ("attention", "encoders of moe_ablm alone")):
        done = main(verb, "--run", run, *pair)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    done = main("finetune", "--run", run, "--input", tmp_path / "s.jsonl", "--target", "x",
                "--out", tmp_path / "o")  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "o").exists()


def assay(path):
    """Chains whose value is their number of W."""
    rng, lines = np.random.default_rng(0), ["name,heavy,light,kd"]
    for i in range(24):
        heavy, light = ("".join(rng.choice(list("AGSTW"), 12)) for _ in range(2))
        lines.append(f"a{i},{heavy},{light},{heavy.count('W')}")
    path.write_text("\n".join(lines) + "\n")
    return [line.split(",") for line in lines[1:]]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_head_is_trained_on_its_hidden_states_and_predicts_again(place, main, tmp_path, direct):
    antibodies = assay(tmp_path / "assay.csv")
    base = shutil.copytree(place / "AntiBERTa2", tmp_path / "theirs")
    run, out = f"{PREFIX}{base}", tmp_path / "tuned"
    flags = ("--input", tmp_path / "assay.csv", "--target", "kd", "--groups", "sequence")
    few = ("--task", "regression", "--folds", "2", "--steps", "30", "--lr", "0.01")
    done = main("finetune", "--run", run, *flags, *few, "--out", out)
    assert done.returncode == 0, done.stderr
    found = rows_of(out / "predictions.csv")
    with safe_open(out / "head.safetensors", "numpy") as file:
        p = {name: file.get_tensor(name).astype(np.float64) for name in file}
    for row, (_, heavy, light, _) in zip(found[:4], antibodies, strict=False):
        x = direct("AntiBERTa2", heavy, light)[1][-1].astype(np.float16).astype(np.float64)
        x = (x - p["centre"]) / p["spread"]
        weights = np.exp(x @ p["query"])
        inner = (x * weights / weights.sum()).sum(0) @ p["inner"] + p["inner_bias"]
        inner *= 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        value = (inner @ p["outer"] + p["outer_bias"]) * p["target_sd"] + p["target_mean"]
        assert float(row["prediction"]) == pytest.approx(value.item(), abs=2e-3)
    asked = ("--run", out, "--input", tmp_path / "assay.csv")
    done = main("predict", *asked, "--out", tmp_path / "again.csv")
    assert done.returncode == 0, done.stderr
    again = rows_of(tmp_path / "again.csv")
    assert [r["prediction"] for r in again] == [r["prediction"] for r in found]
    pair = ("--heavy", "EVQLV", "--light", "DIQM", "--one-pass")
    one, other = (main("score", "--run", each, *pair).stdout for each in (out, run))
    assert one == other and one
    for tune in ("lora", "whole"):
        done = main("finetune", "--run", run, *flags, "--tune", tune, "--out", tmp_path / "no")
        assert done.returncode == 2 and f"--tune {tune}: " in done.stderr
        assert "computed by transformers and not trained" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "no").exists()
    save(FAMILIES["AntiBERTa2"], base, seed=1)  # other weights in its place
    done = main("predict", *asked, "--out", tmp_path / "other.csv")
    assert done.returncode == 2 and "trained on other weights" in done.stderr
    shutil.rmtree(base)
    done = main("predict", *asked, "--out", tmp_path / "gone.csv")
    assert done.returncode == 2 and f"a head on {PREFIX}{base}: no config.json" in done.stderr


def test_in_python_it_answers_data_frames(place, asked):
    pandas = pytest.importorskip("pandas")
    name = next(iter(FAMILIES))
    model = moe_ablm.load(f"{PREFIX}{place / name}")
    pairs = pandas.DataFrame(SHORT[:2], columns=["heavy", "light"], index=["a", "b"])
    scores = model.score(pairs)
    assert list(scores.index) == ["a", "b"]
    expected = [sum(s) for s in score(asked(name), given(SHORT[:2], asked(name).model.layout, 999))]
    np.testing.assert_allclose(scores["pll"], expected, rtol=1e-6)
    with pytest.raises(UserError):
        model.route(pairs)


def test_it_is_evaluated_and_compared_beside_ours(place, main, tmp_path):
    write_dataset(tmp_path / "pairs", random_records(6, 0), SPLITS.index("test"))
    save_model(tiny_model(), tmp_path / "ours")
    suite = "--suite=perplexity,positions,attention,routing"
    runs = {"ours": tmp_path / "ours", "theirs": f"{PREFIX}{place / 'IgBert'}"}
    found = {}
    for name, run in runs.items():
        done = main("evaluate", "--run", run, "--input", tmp_path / "pairs", suite,
                    "--out", tmp_path / f"of {name}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / f"of {name}" / "results.json").read_text())
    for name in ("perplexity", "positions"):
        numbers = {n: found[n]["evaluations"][name]["numbers"] for n in runs}
        assert [(x["metric"], x["labels"]) for x in numbers["ours"]] == [
            (x["metric"], x["labels"]) for x in numbers["theirs"]
        ]
        assert all(a["n"] == b["n"] for a, b in zip(*numbers.values(), strict=True))
    skipped = {k: v["reason"] for k, v in found["theirs"]["evaluations"].items() if v["reason"]}
    assert "encoders of moe_ablm alone" in skipped["attention"]
    assert "dense model" in skipped["routing"]
    done = main("compare", *(f"--input={n}={tmp_path / f'of {n}'}" for n in runs),
                "--out", tmp_path / "both")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = main("evaluate", "--run", runs["theirs"], "--input", tmp_path / "pairs",
                "--suite=perplexity", "--null=untrained", "--out", tmp_path / "null")  # fmt: skip
    assert done.returncode == 2 and "neither trained nor initialised" in done.stderr
    assert not (tmp_path / "null").exists()
