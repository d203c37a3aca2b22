"""A store for tests that several processes see: `s3://` is a folder, through fsspec.

As in S3, an object is replaced as a whole, and a bucket that is not there is an error. Real clients
talk to real fakes in test_stores_live.py.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

FOLDER = "MOE_ABLM_TEST_STORE"  # the folder, whose folders are buckets
UNREACHABLE = "[Errno 101] Network is unreachable"
DIE_AT = "MOE_ABLM_TEST_DIE_AT"  # end of the name of an object at which the process kills itself


class FolderStore(LocalFileSystem):
    """What `s3://` is after `register`.

    `fault(operation, name)` is called before each operation, and may raise.
    """

    fault = staticmethod(lambda operation, name: None)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).rstrip("/")
        return f"{os.environ[FOLDER]}/{path[5:]}" if path.startswith("s3://") else path

    def _begin(self, operation, path):
        name = self._strip_protocol(path).removeprefix(os.environ[FOLDER]).lstrip("/")
        FolderStore.fault(operation, name)
        if not (Path(os.environ[FOLDER]) / name.split("/")[0]).is_dir():
            raise FileNotFoundError(2, "The specified bucket does not exist")

    def find(self, path, **options):
        self._begin("find", path)
        return super().find(path, **options)

    def exists(self, path, **options):
        self._begin("exists", path)
        return super().exists(path, **options)

    def get_file(self, source, target, **options):
        self._begin("get", source)
        shutil.copyfile(self._strip_protocol(source), target)

    def put_file(self, source, target, **options):
        if os.environ.get(DIE_AT) and target.endswith(os.environ[DIE_AT]):
            os.kill(os.getpid(), signal.SIGKILL)
        self._begin("put", target)
        self._write(target, Path(source).read_bytes())

    def pipe_file(self, target, value, **options):
        self._begin("put", target)
        self._write(target, value)

    def _write(self, target, value):
        path = Path(self._strip_protocol(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent.parent / f"{path.name}.{os.getpid()}"
        temporary.write_bytes(value)
        temporary.replace(path)

    def cat_file(self, path, **options):
        self._begin("cat", path)
        return Path(self._strip_protocol(path)).read_bytes()

    def rm_file(self, path):
        self._begin("rm", path)
        Path(self._strip_protocol(path)).unlink()


def register(folder: Path) -> Path:
    """Makes `s3://` this folder, with a bucket; returns the folder of the bucket."""
    os.environ[FOLDER] = str(folder)
    FolderStore.fault = staticmethod(lambda operation, name: None)
    fsspec.register_implementation("s3", FolderStore, clobber=True)
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    return folder / "bucket"


def failing(*operations, error=None):
    """From now on these operations of the store fail."""

    def fault(operation, name):
        if operation in operations:
            raise error or OSError(UNREACHABLE)

    FolderStore.fault = staticmethod(fault)


def counting(operation):
    """The names with which an operation is called from now on."""
    names = []
    FolderStore.fault = staticmethod(lambda o, name: names.append(name) if o == operation else None)
    return names


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_run(run: Path, losses: dict[int, float | None]) -> None:
    fill(run, {"config.json": "{}", "results.jsonl": "", "tensorboard/events": "x" * 99})
    for step, loss in losses.items():
        evaluation = {} if loss is None else {"step": step, "loss": loss}
        folder = run / "checkpoints" / str(step)
        fill(folder, {"record/metadata": json.dumps({"evaluation": evaluation})})
        fill(folder, {"state/d/0": f"{step}", "state/manifest": "", "commit_success.txt": ""})
