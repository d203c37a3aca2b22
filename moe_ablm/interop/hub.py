"""Models by name on the Hugging Face hub: `hf:ORG/NAME[@REVISION]`, fetched and pushed.

Of a repository only weights in safetensors and what describes them are fetched: neither pickled
weights nor code. Cache, tokens and mirrors are those of huggingface_hub (`HF_HOME`, `HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_ablm.errors import UserError

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FETCHED = ["*.json", "*.safetensors", "vocab.txt", "README.md"]
# of a model that was pushed before under the name; beside other weights they would be read as its
_WEIGHTS = (".safetensors", ".safetensors.index.json", "model.json", "head.json")


def local_directory(run: Path | str, flag: str) -> Path:
    """The directory of a run: itself, or where a model of the hub is kept once it is fetched.

    Args:
      run: a directory, or `hf:ORG/NAME`, `hf:ORG/NAME@REVISION`.
      flag: flag or config key that gave it, for messages.

    Raises:
      UserError: there is no such model, the hub cannot be reached and nothing is cached, or
        huggingface_hub is not installed.
    """
    if not is_hub_name(run):
        return Path(run)
    match = _NAME.fullmatch(str(run))
    if match is None:
        raise UserError(f"{flag} {run}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION")
    name, revision = match.groups()
    _require_client(f"{flag} {run}")
    from huggingface_hub import snapshot_download

    with _told(f"{flag} {run}", revision):
        found = snapshot_download(
            name, revision=revision, allow_patterns=_FETCHED, ignore_patterns=["*/*"]
        )
    if not list(Path(found).glob("*.safetensors")):
        raise UserError(
            f"{flag} {run} holds no safetensors weights; pickled weights can run code and are not "
            "fetched: convert them where you trust them, then import the directory"
        )
    return Path(found)


def is_hub_name(run: Path | str) -> bool:
    """Whether a run is named by its name on the hub."""
    return str(run).startswith(PREFIX)


def require_pushable(name: str) -> None:
    """UserError unless a model could be pushed under this name: it is one, and a token is there."""
    if _NAME.fullmatch(PREFIX + name) is None or "@" in name:
        raise UserError(f"--push {name}: expected ORG/NAME")
    _require_client(f"--push {name}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            f"--push {name}: no token: log in (hf auth login), or set HF_TOKEN to a token that may "
            "write"
        )


def push(directory: Path, name: str) -> str:
    """Uploads the files of an export in one commit; returns the address of the repository.

    A repository that is new is private. Weights that are there under other names are deleted.

    Args:
      directory: what `export` wrote.
      name: ORG/NAME.

    Raises:
      UserError: the hub refuses, or cannot be reached. The directory stays.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, files = HfApi(), sorted(directory.iterdir())
    with _told(f"--push {name} ({directory} is complete: hf upload {name} {directory})", None):
        url = str(api.create_repo(name, private=True, exist_ok=True))
        gone = set(api.list_repo_files(name)) - {file.name for file in files}
        stale = sorted(n for n in gone if "/" not in n and n.endswith(_WEIGHTS))
        api.create_commit(
            name,
            [
                *(CommitOperationAdd(file.name, file) for file in files),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message="Export of moe_ablm",
        )
    return url


def _require_client(what: str) -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{what} needs the package huggingface_hub: pip install 'moe_ablm[hub]'"
        ) from error


@contextmanager
def _told(what: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's client in one line; its bars are drawn on terminals only."""
    from huggingface_hub import constants, errors, utils

    quiet = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what}: access is granted on its page of {constants.ENDPOINT}: ask there, then "
            "log in (hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: there is no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: {constants.ENDPOINT} knows no such model, or it is private: check the name, "
            "or log in (hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{what}: {constants.ENDPOINT} cannot be reached, and the model is not whole in the "
            f"cache ({constants.HF_HUB_CACHE}): fetch it once where there is a network"
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:  # of the transport, too
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what}: {constants.ENDPOINT} refuses: {reason}") from error
    finally:
        if quiet:
            utils.enable_progress_bars()
