"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout (or in $MOE_ABLM_DATA); skips where absent."""
    path = Path(os.environ.get("MOE_ABLM_DATA", REPO.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set MOE_ABLM_DATA)")
    return path
