"""What tracking prepares before it speaks to MLflow: names, lengths, batches, artifacts.

Pure functions without MLflow, so that they can be used and tested without loading it.
"""

import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TypeVar

from compress_core.secrets import hide

NAME_LENGTH = 250
VALUE_LENGTH = 6000  # of a parameter; a tag of a run may have 8000
TAG_LENGTH = 5000  # of a tag of a version; the newest servers take 100000, older ones this
NAMES_PER_CALL = 100
METRICS_PER_CALL = 1000
POINTS = 1000  # of one curve
CLIPPED = " … (clipped)"
PARTS = ".parts"

Item = TypeVar("Item")


def fit_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and ``_-. /:``, not too long."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:NAME_LENGTH]


def clip(value: str) -> str:
    """A value that MLflow takes: without secrets, marked at its end where some of it had to go."""
    value = hide(value)
    return value if len(value) <= VALUE_LENGTH else value[: VALUE_LENGTH - len(CLIPPED)] + CLIPPED


def is_number(value: object) -> bool:
    """Whether a value can be a metric; truth values are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def pieces(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`."""
    rest = list(items)
    for at in range(0, len(rest), size):
        yield rest[at : at + size]


def thin(curve: Sequence[float], most: int = POINTS) -> list[tuple[int, float]]:
    """Steps and values of a curve where it has any: evenly fewer if they are many, the last kept.

    Args:
        curve: A value per step, not-a-number or infinite where there is none.
        most: Points that are left at most, two or more.
    """
    points = [(step, float(value)) for step, value in enumerate(curve) if math.isfinite(value)]
    if len(points) <= most:
        return points
    return [points[i * (len(points) - 1) // (most - 1)] for i in range(most)]


def split(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags with a value that is too long as ``name.0``, ``name.1``, ... and their number.

    `join` undoes it.
    """
    fitting: dict[str, str] = {}
    for name, value in tags.items():
        value = hide(value)
        if len(value) <= TAG_LENGTH:
            fitting[name] = value
            continue
        parts = ["".join(part) for part in pieces(value, TAG_LENGTH)]
        fitting[name + PARTS] = str(len(parts))
        fitting.update({f"{name}.{number}": part for number, part in enumerate(parts)})
    return fitting


def join(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as they were before `split`."""
    whole = dict(tags)
    for mark in [name for name in tags if name.endswith(PARTS)]:
        name = mark.removesuffix(PARTS)
        count = int(whole.pop(mark))
        whole[name] = "".join(whole.pop(f"{name}.{number}") for number in range(count))
    return whole


def lay_out(artifacts: Mapping[str, Path | str], folder: Path) -> None:
    """Fill a folder with a run's artifacts, laid out as the run shall show them.

    Args:
        artifacts: Path inside the folder to a file, a folder, or the text itself.
        folder: An empty folder.
    """
    for name, content in artifacts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(hide(content), encoding="utf-8")
        elif content.is_dir():
            shutil.copytree(content, target)
        else:
            shutil.copyfile(content, target)
