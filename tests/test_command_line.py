"""Flags of the trainer that are wrong: one line, which names what was meant."""

import subprocess
import sys

import pytest
from absl import flags
from conftest import tiny_flags

from moe_ablm.command_line import parse, taken
from moe_ablm.config_keys import ELSEWHERE, keys
from moe_ablm.config_schema import Config
from moe_ablm.errors import UserError
from moe_ablm.train import main

WRONG = {
    "--config.train.learning_rate=1": "^config.train.learning_rate is not a config key .*'lr'",
    "--config.train.Batch_Size=8": r"config.train.Batch_Size .*\(did you mean 'batch'\?\)",
    "--config.lr=1": r"config.lr is not a config key \(did you mean 'config.train.lr'\?\)",
    "--config.trian.lr=1": r"config.trian is not a config key \(did you mean 'train'\?\)",
    "--config.train.lr.x=1": "config.train.lr.x is not a config key",
    "--config.train=1": "config.train is a section: set its keys, as --config.train.steps",
    "--config.model.moe.router=top2": "expected model.moe.router='topk' with model.moe.k=2$",
    "--config.model.moe.router=Top-4": "expected model.moe.router='topk' with model.moe.k=4$",
    "--config.train.lr=abc": "^config.train.lr='abc': expected float$",
    "--config.train.lr='": '^config.train.lr="\'": expected float$',
    "--config.train.steps=1.5": "^config.train.steps='1.5': expected int$",
    "--config.train.steps=": "^config.train.steps='': expected int$",
    "--config.model.tied=maybe": "^config.model.tied='maybe': expected bool$",
    "--config.data.buckets=(1,": r"^config.data.buckets='\(1,': expected several \(int, ...\)$",
    "--config.train.warmup=500": "train.warmup=500: expected 0 to train.steps .12.: lower it, or",
    "--config.train.warmup": "Missing value for flag --config.train.warmup",
    "--wrkdir=x": "'wrkdir'. Did you mean: workdir",
    "train.lr=1": "^unexpected argument 'train.lr=1': flags begin with --$",
    "--extend-to=0": "--extend-to=0: 0 is not a positive integer",
    "--config=configs": "is a directory",
}


@pytest.mark.parametrize("flag", WRONG)
def test_one_line_with_what_was_meant(flag):
    with pytest.raises(UserError, match=WRONG[flag]) as told:
        parse(["train", *tiny_flags(), "--workdir=w", flag])
    text = str(told.value)
    assert "\n" not in text and text.count("'") % 2 == 0 or '"\'"' in text


def test_help_lists_every_key(capsys):
    assert main(["train", "--help"]) == 0
    lines = [line.split("=")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert {f"--{key}" for key in keys(Config, "config")} <= set(lines)


def test_help_imports_nothing_that_takes_long():
    """Every verb's flags, in a process of its own; to ask a model not even pyarrow."""
    script = (
        "import sys; from moe_ablm.__main__ import VERBS, parser_of\n"
        "for verb in ('score', 'finetune'): parser_of(verb)\n"
        "assert 'pyarrow' not in sys.modules\n"
        "for verb in VERBS: parser_of(verb)\n"
        "\nimport moe_ablm.train; moe_ablm.train.main(['train', '--help'])\n"
        "print({'jax', 'scipy', 'matplotlib', 'ml_collections'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_is_missing():
    for argv in ([], ["--workdir=w"], ["--config.train.lr=1"], ["--config="]):
        with pytest.raises(UserError, match="^--config is missing"):
            parse(["train", *argv])
    with pytest.raises(UserError, match="^--workdir is missing"):
        parse(["train", *tiny_flags()])


def test_a_file_may_stand_apart_and_the_last_one_counts():
    *_, steps = parse(["t", "--config", "nowhere.py", *tiny_flags(), "--workdir", "w"])
    assert steps is None
    config, workdir, steps = parse(["t", *tiny_flags(), "--workdir", "w", "--extend-to", "30"])
    assert (config.train.steps, str(workdir), steps) == (12, "w", 30)


def test_names_of_others_lead_to_keys_that_there_are():
    leaves = {key.rpartition(".")[2] for key in keys(Config, "config")}
    assert set(ELSEWHERE.values()) <= leaves and not leaves & set(ELSEWHERE)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ([], None),
        (["--workdir=a"], "a"),
        (["-workdir", "b", "--workdirs=c"], "b"),
        (["--workdir=a", "--workdir", "d"], "d"),
    ],
)
def test_a_flag_in_each_form_that_absl_reads(given, value):
    assert taken("workdir", ["train", *given])[0] == value
    if given:
        values = flags.FlagValues()
        for name in ("workdir", "workdirs"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        values(["train", *given])
        assert values.workdir == value
