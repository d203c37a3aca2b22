"""What `--out` may be: types of flags, so that a verb refuses before it computes anything."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from moe_ablm.files import in_store
from moe_ablm.stores import DRIVERS

# a directory of such a name would be taken for a file by whoever finds it
FILE_ENDINGS = (
    *(".csv", ".tsv", ".txt", ".xlsx", ".xls", ".parquet", ".arrow", ".json", ".jsonl", ".npz"),
    *(".npy", ".h5", ".h5ad", ".html", ".png", ".svg", ".pdf", ".fasta", ".fa", ".fastq", ".py"),
    *(".safetensors", ".pt", ".bin", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"),
)


def out_directory(text: str) -> Path:
    """A directory to make, or to write into."""
    path = _named(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file: name a directory")
    if path.suffix.lower() in FILE_ENDINGS and not path.exists():
        raise argparse.ArgumentTypeError(
            f"{path} would become a directory: a name that ends in {path.suffix} is a file's"
        )
    return _within_reach(path)


def out_file(*endings: str) -> Callable[[str], Path]:
    """A file to write, with one of the endings that a verb knows."""

    def checked(text: str) -> Path:
        path = _named(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a directory: name a file in it")
        if path.suffix not in endings:
            raise argparse.ArgumentTypeError(
                f"{path}: expected a name that ends in {', '.join(endings)}"
            )
        return _within_reach(path)

    return checked


def add_results_directory(parser: argparse.ArgumentParser) -> None:
    """`--out` of verbs that write numbers and a page."""
    about = "results.json, report.html, ..."
    parser.add_argument("--out", type=out_directory, required=True, metavar="DIR", help=about)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The flag without which a file of the user is not replaced."""
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _named(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    if (refused := in_store(text)) and text.partition(":")[0] not in DRIVERS:
        raise argparse.ArgumentTypeError(refused)
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text[:200]!r}: {reason}") from error
    return Path(text)


def _within_reach(path: Path) -> Path:
    """The path, if it can be made where it is to be; of a store that is seen later."""
    if in_store(path):
        return path
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: {place} is not a directory")
    folder = place if place.is_dir() else place.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path}: no permission to write in {folder}")
    return path
