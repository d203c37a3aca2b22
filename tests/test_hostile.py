"""Calls that nobody means, made from the parsers and the config: one line and 2, or done rightly.

Each option is given nothing, words, negative, zero, huge and odd numbers, places that cannot be
read or written. By default those that a parser decides; with --slow, 400 that really run.
"""

import argparse
import random

import pytest
from conftest import tiny_flags
from test_cli import refused
from test_writing import WRITE, flags_of, inputs  # noqa: F401 - a fixture

from configs.base import get_config
from moe_ablm import config as configs
from moe_ablm.__main__ import VERBS, main, parser_of
from moe_ablm.command_line import parse
from moe_ablm.errors import UserError

VALUES = {
    "missing": None, "empty": "", "words": "many", "negative": "-1", "zero": "0", "huge": "1" * 30,
    "exponent": "1e30", "no number": "nan", "infinite": "inf", "quote": "'", "list": "[]",
    "unwritable": "/proc/nowhere/x", "unreadable": "/proc/self/mem", "directory": "/",
}  # fmt: skip


def options(verb: str) -> list[argparse.Action]:
    """Options of a verb that take a value."""
    parser = parser_of(verb)
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in verbs.choices[verb]._actions if a.option_strings and a.nargs != 0]


def calls() -> list[tuple[str, str, str]]:
    """(verb, option, kind of value), all of them, in an order that is the same every time."""
    found = [
        (verb, action.option_strings[-1], kind)
        for verb in VERBS
        if verb in WRITE or verb in ("score", "infill", "route", "attention")
        for action in options(verb)
        for kind in VALUES
    ]
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_parser_refuses(verb, capsys):
    """Every option without a value, and with words where a number or a choice is expected."""
    for action in options(verb):
        flag = action.option_strings[-1]
        given = [[flag]]
        if action.type in (int, float) or action.choices:
            given.append([f"{flag}=many"])
        if action.type in (int, float):
            given += [[f"{flag}="], [f"{flag}=[]"]]
        for arguments in given:
            assert main(["moe_ablm", verb, *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("moe_ablm: ") and flag in line


@pytest.mark.slow
@pytest.mark.parametrize("call", calls()[:400], ids=" ".join)
def test_every_option_of_every_verb(call, inputs, tmp_path, run_quickly):  # noqa: F811
    verb, option, kind = call
    given = verb if verb in WRITE else "embed"
    _, _, *flags = map(str, flags_of(given, inputs, tmp_path / WRITE[given][1]))
    for place in [i for i, flag in enumerate(flags) if flag == option]:
        del flags[place : place + 2]
    value = VALUES[kind]
    flags += [option] if value is None else [f"{option}={value}"]
    result = run_quickly("moe_ablm", verb, *flags, folder=tmp_path)  # --out many is a success
    if result.returncode == 0:
        assert "Traceback" not in result.stderr
    else:
        refused(result)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("simulate", "--pairs", "1" * 30, "--out", "s.csv"), "--pairs 111111111111111111"),
        (("upcycle", "--run", "r", "--out", "u", "--seed", "1" * 30), "--seed 11111111111"),
    ],
)
def test_numbers_beyond_all_machines(flags, words, capsys):
    assert main(["moe_ablm", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


KEYS = list(configs.flatten(get_config().to_dict()))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_config(key):
    """The config is refused in one line, or is one with numbers that can be counted with."""
    for value in filter(None, [*VALUES.values(), "1e-30", "None"]):
        try:
            config, *_ = parse(["x", *tiny_flags(), f"--config.{key}={value}", "--workdir=w"])
        except UserError as error:
            assert "\n" not in str(error) and "Traceback" not in str(error)
            continue
        found = configs.flatten(configs.to_dict(config))[key]
        if isinstance(found, int):
            assert -1 <= found < 2**32
    with pytest.raises(UserError):
        parse(["x", *tiny_flags(), f"--config.{key}x=1", "--workdir=w"])
