"""What a user installs: the wheel, in an environment without this repository, from anywhere."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

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


def test_every_module_is_in_it(installed: Path) -> None:
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    for package in PACKAGES:
        modules = [file.relative_to(REPOSITORY) for file in (REPOSITORY / package).rglob("*.py")]
        assert [name for name in modules if not (packages / name).is_file()] == []
