"""The whole way from an empty data directory to a champion that answers, in real processes."""

import glob
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.pipeline import pico
from tests.pipeline.whole_way import walk

pytestmark = pytest.mark.slow


def test_from_an_empty_home_to_a_champion_that_answers_and_back(
    shared: Path, tmp_path: Path
) -> None:
    with pico.environment(pico.clean_environment()):
        walk(tmp_path / "home", shared, print)


def test_the_same_on_postgresql_by_environment_variables_alone(
    shared: Path, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg2")
    if not (glob.glob("/usr/lib/postgresql/*/bin/initdb") or shutil.which("initdb")):
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    home = tmp_path / "home"
    words = [sys.executable, "-m", "tests.pipeline.whole_way", str(home), str(shared)]
    done = subprocess.run(
        [str(pico.ROOT / "deployments" / "with-postgres.sh"), *words],
        cwd=pico.ROOT,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("everything is down\n")
    assert not (home / "mlflow.db").exists()
    assert not (home / "prefect" / "prefect.db").exists()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    data = [line for line in left.stdout.splitlines() if "postgres -D /tmp/tmp." in line]
    assert data == []
