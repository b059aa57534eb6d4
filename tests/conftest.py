"""Fixtures shared by all tests: the folder of real models and texts, where there is one."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real models beside the repository; tests that need it skip elsewhere."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the real models in {SHARED}, which this machine does not have")
    return SHARED
