"""The notebooks: whole, without outputs, and (--slow) run from top to end in an empty folder."""

import ast
import json
import re
import shlex

import numpy as np
import pytest
from conftest import REPO

from moe_ablm.__main__ import QUICKSTART, VERBS, parser_of
from moe_ablm.command_line import parse

CHECKED = r"\g<0>\n\g<1>assert not _exit_code, 'a command failed'"
NOTEBOOKS = {path.stem: path for path in sorted((REPO / "notebooks").glob("*.ipynb"))}


def cells(name: str, kind: str = "code") -> list[str]:
    found = json.loads(NOTEBOOKS[name].read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def python(cell: str) -> str:
    """A cell without what only IPython reads, continued lines of commands included."""
    if cell.startswith("%%writefile"):
        return cell.partition("\n")[2]
    return re.sub(r"^(\s*)[!%](?:.*\\\n)*.*", r"\1pass", cell, flags=re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(notebook, arguments) of every command of moe_ablm."""
    found = []
    for name in NOTEBOOKS:
        for cell in cells(name):
            for line in re.findall(r"!\{MOE_ABLM\} ((?:.*\\\n)*.*)", cell):
                found.append((name, shlex.split(line.replace("\\\n", " "))))
    return found


def test_there_are_three_and_each_leads_to_the_next():
    assert set(NOTEBOOKS) == {"mixture", "repertoire", "design"}
    for name in NOTEBOOKS:
        links = re.findall(r"\((\w+)\.ipynb\)", "".join(cells(name, "markdown")))
        assert set(links) <= set(NOTEBOOKS)
        assert links or name == "design"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    for cell in json.loads(NOTEBOOKS[name].read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_python_and_pictures_have_words(name):
    for cell in cells(name):
        tree = ast.parse(python(cell), name)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") == "Image":
                # `alt=` is unknown to the IPython of Colab
                metadata = next(k.value for k in call.keywords if k.arg == "metadata")
                assert [key.value for key in metadata.keys] == ["alt"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_only_what_is_missing(name):
    """The same in all of them; here moe_ablm is there, so that nothing happens."""
    first = cells(name)[0]
    assert first == cells("mixture")[0]
    assert "%pip install" in first and "moe_ablm" in first
    space: dict = {}
    exec(python(first), space)  # noqa: S102 - a file of the checkout
    assert "source" not in space


def test_where_it_is_missing_its_repository_is_asked_for(monkeypatch, tmp_path):
    """The address of a fork or of a private repository is known to the reader alone."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        exec(python(cells("mixture")[0]), {})  # noqa: S102 - a file of the checkout


def test_every_command_is_of_the_python_of_the_notebook():
    """`python` may be another one, where the environment of Jupyter is not activated."""
    assert len(commands()) >= 6
    for name in NOTEBOOKS:
        for cell in cells(name):
            assert set(re.findall(r"^\s*!(\S+)", cell, re.MULTILINE)) <= {"{MOE_ABLM}"}


@pytest.mark.parametrize(("name", "arguments"), commands(), ids=lambda value: value[0])
def test_commands_have_flags_that_exist(name, arguments):
    verb, *flags = arguments
    if verb == QUICKSTART:
        flags = [flag.format(RUN="work/run") for flag in flags]
        parse(["train", "--config=configs/quickstart.py", *flags])
    else:
        assert verb in VERBS
        parser_of(verb).parse_args(arguments)


def executed(name: str, folder) -> str:
    """What a notebook prints, run with IPython in a folder; commands end with code 0."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # IPython itself goes on after a command that failed
            cell.source = re.sub(r"^(\s*)!(?:.*\\\n)*.*", CHECKED, cell.source, flags=re.MULTILINE)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    return "".join(output.get("text", "") for output in outputs)


def numbers(text: str) -> np.ndarray:
    return np.array([float(n) for n in re.findall(r"\d+\.?\d*", text)])


@pytest.mark.slow
def test_what_the_first_notebook_says_happens(tmp_path):
    """Collapse without the balance loss, none with it; experts over-fit more than a dense layer."""
    text = executed("mixture", tmp_path)
    said = dict(re.findall(r"weight (0\.[01]): (.*)", text))
    alive, error = {}, {}
    for weight, line in said.items():
        left, right = line.split(", error")
        alive[weight], error[weight] = numbers(left), numbers(right)
    assert (alive["0.0"] <= 5).all() and (alive["0.1"] >= 6).all()
    assert error["0.1"].mean() < error["0.0"].mean()
    tuned = re.findall(r"(.+?) +error on its 64 points ([\d.]+), on unseen points ([\d.]+)", text)
    on_few, unseen = ({kind.strip(): float(v[i]) for kind, *v in tuned} for i in (0, 1))
    assert on_few["experts, all"] < on_few["dense, all"]
    assert unseen["experts, all"] > 1.5 * unseen["dense, all"]
    assert unseen["experts, shared layer"] < unseen["dense, all"]


@pytest.mark.slow
def test_the_others_one_after_the_other(tmp_path):
    """The third takes the model that the second trained."""
    text = executed("repertoire", tmp_path)
    assert (tmp_path / "work" / "evaluation" / "report.html").exists()
    fitted = json.loads((tmp_path / "work" / "fit" / "fit.json").read_text())
    for name, truth in (("alpha", 0.35), ("beta", 0.4)):
        interval = fitted["intervals"][name][0]
        assert interval["low"] < truth < interval["high"]
    text = executed("design", tmp_path)
    assert "trastuzumab" in text and len(re.findall(r"-?[\d.]+ nats", text)) >= 11
