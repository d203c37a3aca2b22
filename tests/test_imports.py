"""Which way imports run: the rooms of the house, read from the source, and every module imports."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "moe_ablm"
ROOMS = ("data", "model", "parallel", "training", "evaluation", "scaling", "interop", "inference")
# what every room may import
GROUND = {"errors", "files"}
# what a room may import of the package beside itself and the ground floor
MAY_IMPORT = {
    "data": {"cache"},
    "parallel": set(),
    "model": {"parallel"},
    "training": {"model", "parallel", "results"},
    "evaluation": {"model", "data", "inference", "interop", "results", "page"},
    "interop": {"model", "data", "training", "config", "config_schema"},
    "inference": {"model", "data", "interop", "parallel", "cache"},
    "scaling": {"page", "results"},
}
# the computing libraries, and which files may import them where a room as a whole may not
COMPUTING = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FORBIDDEN = {
    "data": COMPUTING | {"ml_collections", "absl"},
    "scaling": COMPUTING | {"grain", "ml_collections", "absl"},
    "model": {"optax", "orbax", "grain", "ml_collections", "absl", "pyarrow"},
    "parallel": {"optax", "grain", "ml_collections", "absl", "pyarrow"},
    "training": {"grain", "ml_collections", "absl", "pyarrow"},
    "evaluation": {"orbax", "grain", "ml_collections", "absl"},
    "interop": {"optax", "orbax", "grain", "ml_collections", "absl"},
    "inference": {"optax", "orbax", "grain", "ml_collections", "absl", "safetensors"},
}
ONLY_IN = {
    "grain": {"data/pipeline.py"},
    "orbax": {"training/checkpoint.py", "parallel/multihost.py"},
    "ml_collections": {"command_line.py"},
}
HEAVY = sorted(COMPUTING | {"grain", "torch", "transformers"})
# rooms and modules that must work where no computing library is installed
WITHOUT_JAX = ("data", "scaling", "model/families.py", "model/spec.py", "model/flops.py",
               "training/spec.py", "training/peaks.py", "training/stability.py", "errors.py",
               "files.py", "endings.py", "preemption.py", "results.py", "page.py", "cache.py",
               "config.py", "config_keys.py", "config_schema.py", "config_checks.py",
               "outcome.py")  # fmt: skip


WITHOUT_HEAVY = f"""
import importlib, sys

class Missing:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def sources(under: str = "") -> list[Path]:
    path = REPO / PACKAGE / under
    # a folder that is no package holds code for others, such as what an export copies
    found = (p for p in path.rglob("*.py") if (p.parent / "__init__.py").exists())
    return [path] if path.is_file() else sorted(found)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it, lazily too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from a import b` may name a module b of package a
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """Rooms or top-level modules of the package that a file imports, without the package."""
    inside = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in inside if parts[0] == PACKAGE and len(parts) > 1}


def others(path: Path) -> set[str]:
    """Top-level names of what a file imports from outside the package."""
    return {name.split(".")[0] for name in imports(path)} - {PACKAGE}


def label(path: Path) -> str:
    return path.relative_to(REPO / PACKAGE).as_posix()


def modules() -> list[str]:
    names = []
    for path in sources():
        parts = path.relative_to(REPO).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.endswith("__main__")]


def test_the_reader_of_imports_sees_every_kind(tmp_path):
    """The rest of this file is worth what this function is."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b, c as d\nfrom e import f\n"
        "def g():\n    from moe_ablm import data\n    import moe_ablm.model.spec\n"
    )
    assert imports(file) >= {"a.b", "c", "e", "moe_ablm.data", "moe_ablm.model.spec"}
    assert own(file) == {"data", "model"} and others(file) == {"a", "c", "e"}


def test_every_room_has_a_rule():
    rooms = {p.name for p in (REPO / PACKAGE).iterdir() if (p / "__init__.py").exists()}
    assert rooms - {"verbs"} == set(ROOMS) == set(MAY_IMPORT) == set(FORBIDDEN)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_stands_on(room):
    wrong = {
        label(path): sorted(found)
        for path in sources(room)
        if (found := own(path) - MAY_IMPORT[room] - GROUND - {room})
    }
    assert not wrong, f"{room} stands on {sorted(MAY_IMPORT[room] | GROUND)} only"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_nothing_of_the_libraries_of_others(room):
    wrong = {
        label(path): sorted(found)
        for path in sources(room)
        if (found := others(path) & FORBIDDEN[room])
    }
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_lives_in_one_file(library):
    assert {label(p) for p in sources() if library in others(p)} == ONLY_IN[library]


def test_rooms_stand_on_each_other_without_a_circle():
    """MAY_IMPORT itself is a way down."""
    below: set[str] = GROUND | {"results", "page", "cache"}
    while left := [room for room in ROOMS if room not in below]:
        # config is no room: it stands on what describes data, models and training
        free = [r for r in left if MAY_IMPORT[r] - {"config", "config_schema"} <= below]
        assert all("config" not in MAY_IMPORT[r] or {"data", "training"} <= below for r in free)
        assert free, f"a circle among {left}"
        below |= set(free)


def test_nothing_but_the_command_line_stands_on_verbs():
    wrong = [label(p) for p in sources() if "verbs" in own(p) and p.parent.name != "verbs"]
    assert set(wrong) <= {"__main__.py"}
    assert not [
        label(p)
        for p in sources()
        if {"train", "trainer"} & own(p) and label(p).split("/")[0] in ROOMS
    ]


OUTSIDE = {
    # settings, and from config alone what a cell is and what it costs; rates by a law
    "sweeps": {"config", "config_schema", "endings", "errors", "files", "results", "feed",
               "data.dataset", "data.simulated", "model.families", "model.flops", "model.spec",
                "scaling.design", "scaling.result", "scaling.run_directories", "scaling.runs",
                "store_copies", "stores", "training.peaks"},
    # what a cell is, its config, what it takes of a device; the program that a run compiles, to
    # compile it for devices that are not here; how it ended
    "launch": {"endings", "errors", "files", "outcome", "preemption", "config", "config_schema",
               "command_line", "program", "model.flops", "model.spec", "training.memory",
               "parallel.mesh"},
}  # fmt: skip


@pytest.mark.parametrize("folder", OUTSIDE)
def test_what_plans_and_launches_runs_touches_only_what_describes_them(folder):
    """Neither makes an array: the trainer and the encoder stay out."""
    known = {name.removeprefix(f"{PACKAGE}.") for name in modules()}
    for path in sorted((REPO / folder).rglob("*.py")):
        found = {n.removeprefix(f"{PACKAGE}.") for n in imports(path) if n.startswith(PACKAGE)}
        assert found & known <= OUTSIDE[folder] | {"model", PACKAGE}, path


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    importlib.import_module(name)


def test_what_needs_no_jax_imports_without_it():
    """In a fresh interpreter where every computing library is missing."""
    paths = [p for under in WITHOUT_JAX for p in sources(under) if label(p) != "data/pipeline.py"]
    names = [f"{PACKAGE}." + label(p).removesuffix(".py").replace("/", ".") for p in paths]
    names = [name.removesuffix(".__init__") for name in names]
    command = [sys.executable, "-c", WITHOUT_HEAVY, *names]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(names) > 20


def test_the_picture_of_the_architecture_is_what_the_sources_do():
    text = (REPO / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"^  (\w+) --> (\w+)$", text, re.M))
    real = {
        (room, other) for room in ROOMS for p in sources(room) for other in own(p) if other in ROOMS
    }
    assert drawn == {(room, other) for room, other in real if room != other}


# stays of a walk that take what is before them from a file, and by name
HANDED_OVER = {"moe_ablm/config.py", "sweeps/collect.py", "moe_ablm/scaling/readers.py"}
WALKS = dict(
    re.findall(
        r"^\*\*([\w ]+)\.\*\* (.+?)(?:\n\n|\Z)",
        (REPO / "docs" / "architecture.md").read_text().partition("## Five walks")[2],
        re.M | re.S,
    )
)


def test_there_are_five_walks():
    assert set(WALKS) == {
        "Antibody to gradient", "Logits to combine", "Config key to effect", "Run to law",
        "Foreign weight to encoder",
    }  # fmt: skip


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_goes_along_imports(walk):
    """Each file is there, and imports or is imported by one before it."""
    stays = re.findall(r"`([\w/]+\.py)`", WALKS[walk])
    assert 4 <= len(stays) <= 9
    module = {stay: stay.removesuffix(".py").replace("/", ".") for stay in stays}
    imported = {stay: imports(REPO / stay) for stay in stays}
    for i, stay in enumerate(stays[1:], 1):
        linked = any(
            module[stay] in imported[other] or module[other] in imported[stay]
            for other in stays[:i]
        )
        assert linked or stay in HANDED_OVER, stay
