"""Completion in a shell: `eval "$(register-python-argcomplete moe-ablm)"`."""

import subprocess

import pytest
from conftest import command


@pytest.mark.parametrize(
    ("typed", "among"),
    [
        ("moe-ablm sc", {"scan", "score"}),
        ("moe-ablm embed --le", {"--level"}),
        ("moe-ablm scan --method m", {"masked-marginal", "mutant-marginal"}),
    ],
)
def test_a_shell_completes_verbs_flags_and_choices(typed, among, tmp_path):
    """Through the protocol of argcomplete's hook for bash: answers are written to descriptor 8."""
    pytest.importorskip("argcomplete")
    argv, options = command("moe_ablm")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed))}
    options["env"] = {**options["env"], **asked, "_ARGCOMPLETE_IFS": "\n"}
    answers = tmp_path / "answers"
    shell = 'exec 8> "$0" 9> /dev/null; "$@"'
    subprocess.run(["bash", "-c", shell, answers, *argv], check=False, **options)
    assert {word.strip() for word in answers.read_text().split("\n") if word.strip()} == among
