"""Config files that are wrong: which file, which line, and why."""

import pytest

from moe_ablm.config_file import load
from moe_ablm.errors import UserError

START = "from configs.base import get_config as base\n\n\ndef get_config(argument=None):\n"
WRONG = {
    "error": (
        START + "    c = base()\n    c.train.lr = 1 / 0\n",
        "",
        "line 6: ZeroDivisionError: ",
    ),
    "deeper": (
        START + "    return base(1, 2, 3)\n",
        "",
        "line 5: TypeError: get_config.. takes 0 ",
    ),
    "syntax": ("def get_config(:\n    return 1\n", "", "line 1: SyntaxError: invalid syntax"),
    "import": ("\nimport numppy\n", "", "line 2: ModuleNotFoundError: No module named 'numppy'"),
    "attribute": (START + "    base().trian.lr = 1\n", "", "line 5: AttributeError: .*trian"),
    "nothing": ("x = 1\n", "", "has no function get_config"),
    "an argument": ("def get_config():\n    pass\n", ":size=8m", "leave out ':size=8m'"),
    "no argument": ("def get_config(size):\n    pass\n", "", "needs an argument: --config="),
    "exit": ("import sys\ndef get_config():\n    sys.exit('no data')\n", "", "line 3.*no data"),
    "bytes": ("x = '\0'\n", "", "null bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_line(name, tmp_path):
    content, argument, words = WRONG[name]
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=words) as told:
        load(f"{tmp_path / 'mine.py'}{argument}")
    assert "mine.py" in str(told.value) and "\n" not in str(told.value)
    assert "Traceback" not in str(told.value)


def test_the_own_errors_of_a_file_are_its_message():
    with pytest.raises(UserError, match="^--config=...:sise=8m: .*did you mean 'size'"):
        load("configs/ladder.py:sise=8m")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("configs/quikstart.py", "is not there .did you mean 'configs/quickstart.py'"),
        ("configs/ladder", "is not there .did you mean 'configs/ladder.py'"),
        ("config/ladder.py", "is not there .did you mean 'configs/ladder.py'"),
        ("configs", "is a directory: expected a file such as configs/base.py"),
        ("README.md", "is no Python file"),
    ],
)
def test_which_file_was_meant(name, words):
    with pytest.raises(UserError, match=words):
        load(name)


def test_two_files_of_one_name_are_two_files(tmp_path):
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(
            f"def get_config(x=''):\n    return '{place}' + x\n"
        )
    assert load(f"{tmp_path}/a/mine.py") == "a" and load(f"{tmp_path}/b/mine.py:c,d=1") == "bc,d=1"
    (tmp_path / "b" / "mine.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no function"):
        load(f"{tmp_path}/b/mine.py")
