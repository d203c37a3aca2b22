"""Objects of a store: their names, and errors of drivers in one line."""

import pytest
from folder_store import UNREACHABLE, FolderStore, failing, fill

from moe_ablm.errors import UserError
from moe_ablm.store_copies import fetched
from moe_ablm.stores import StoreError


def test_an_object_cannot_leave_the_cache(bucket, monkeypatch):
    fill(bucket / "x", {"a": "1"})
    found = {f"{bucket}/x/../../evil": {"type": "file", "size": 1}}
    monkeypatch.setattr(FolderStore, "find", lambda *a, **k: found)
    with pytest.raises(StoreError, match="has no name of a file"):
        fetched("s3://bucket/x", "--input")


WRONG = {
    "no bucket": ("s3://other/x", None, "--input s3://other/x is not there (.*bucket"),
    "no bucket named": ("s3://", None, "--input s3:// names no bucket"),
    "nothing there": ("s3://bucket/x", None, "--input s3://bucket/x is not there: nothing"),
    "credentials": ("s3://bucket/x", PermissionError(13, "Access Denied"), "access refused"),
    "no credentials": ("s3://bucket/x", ValueError("Unable to locate credentials"), "refused"),
    "network": ("s3://bucket/x", OSError(UNREACHABLE), "cannot be reached .*unreachable"),
    "other stores": ("az://bucket/x", None, "--input az://bucket/x is in an object store"),
    "out of the cache": ("s3://bucket/runs/..", None, "expected s3://BUCKET/NAME without"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_store_is_one_line(name, bucket):
    address, error, line = WRONG[name]
    if error:
        failing("find", error=error)
    with pytest.raises(UserError, match=line.replace("(", r"\(")) as found:
        fetched(address, "--input")
    assert "\n" not in str(found.value)


def test_a_driver_that_is_not_installed_is_named(bucket):
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"gs://b/x needs the package gcsfs: .*\[stores\]"):
            fetched("gs://b/x", "--input")
    else:
        pytest.skip("gcsfs is installed")
