"""Commands that the documentation of scaling laws and sweeps prints: read by the parsers."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import coverage
from moe_ablm.__main__ import parser_of
from moe_ablm.scaling.catalogue import resolve
from moe_ablm.scaling.inputs import INPUTS
from moe_ablm.scaling.laws_settings import EXPONENTS
from moe_ablm.scaling.reading import ROLES

REPO = Path(__file__).parents[1]


def commands():
    """(page, words) of every command of a verb or of the coverage benchmark."""
    for page in ("docs/scaling.md", "docs/sweeps.md", "README.md"):
        text = (REPO / page).read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"\s*python (-m moe_ablm (fit|curves) |benchmarks/coverage)", line):
                    yield page, shlex.split(line, comments=True)


COMMANDS = list(commands())


@pytest.mark.parametrize("page, words", COMMANDS, ids=[f"{p}-{i}" for i, (p, _) in
                                                       enumerate(COMMANDS)])  # fmt: skip
def test_a_printed_command_is_one_that_the_parser_takes(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[1] == "benchmarks/coverage.py":
        coverage.parser_of_flags().parse_args(words[2:])
        return
    verb, flags = words[3], words[4:]
    args = parser_of(verb).parse_args([verb, *flags])
    if verb != "fit":
        return
    for law in args.law or []:
        assert law == "compare" or resolve(law)
    named = {"columns": ROLES, "target": (*INPUTS, "unique_pairs"), "rule": ("k", *EXPONENTS)}
    for flag, known in named.items():
        given = [part.partition("=")[0] for part in getattr(args, flag).split(",") if part]
        assert set(given) <= set(known), flag


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 15 and {p for p, _ in COMMANDS} >= {"docs/scaling.md", "README.md"}
