"""What a user installs: the wheel, in an environment without this repository, from anywhere."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.pipeline import pico

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("flows", "tasks", "storage", "compress_core")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *PACKAGES)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and this one's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders beside the sources
    source.mkdir()
    for name in SOURCES:
        place = REPOSITORY / name
        copy = shutil.copytree if place.is_dir() else shutil.copyfile
        copy(place, source / name)
    build = (
        "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    )
    words = [sys.executable, "-c", build, str(folder)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    python = folder / "environment" / "bin" / "python"
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    # Only lines of this .pth are read: a .pth in the folder that it names, such as that of the
    # editable install, is not.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.unpack_archive(wheel, packages, "zip")
    return python


def test_a_compression_runs_from_the_wheel_in_another_folder(
    installed: Path, inputs: pico.Inputs, prepared_home: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared_home, tmp_path / "home")
    environment = pico.clean_environment(HF_HUB_OFFLINE="1")
    environment.pop("PYTHONPATH", None)
    where = "import flows, tasks, storage, compress_core as c; print(c.__path__, flows.__path__)"
    words = [str(installed), "-c", where]
    paths = subprocess.check_output(words, cwd=tmp_path, env=environment, text=True)
    assert str(REPOSITORY) not in paths and str(installed.parents[1]) in paths
    settings = inputs.settings(tmp_path / "home", method="svd_llm")
    words = [str(installed), *pico.arguments("run --json", settings)[1:]]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["model_dir"]).is_dir()


def test_every_module_and_template_is_in_it(installed: Path) -> None:
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    for package in PACKAGES:
        files = [f for f in (REPOSITORY / package).rglob("*.*") if f.suffix not in ("", ".pyc")]
        names = [file.relative_to(REPOSITORY) for file in files]
        assert [name for name in names if not (packages / name).is_file()] == []
