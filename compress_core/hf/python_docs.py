"""Text that every Python installation has: documentation topics and its standard library's sources.

It is cut into parts for training, calibration and evaluation.
"""

import math
import os
import random
from pathlib import Path

from compress_core.errors import TextError

LONGEST_DOCUMENT = 16_000
"""Characters taken of one module or topic, so that no single long one dominates a part."""

HELD_SHARE = 0.1
"""Share of the characters that calibration and evaluation get, each."""

# Installed or generated code, tests, and tables of character codes.
_NOT_PROSE = frozenset(
    (
        *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "__pycache__"),
        *("pydoc_data", "encodings", "__phello__", "test", "tests", "idle_test"),
    )
)


def gather_python_text(max_characters: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Training, calibration and evaluation documents from the running interpreter's own library.

    A document is one help topic or one module and goes wholly into one part, so that no part has
    seen another's. Which ones are taken depends on the seed and the installed Python alone.

    Args:
        max_characters: At most so many in the three parts together.
        seed: Decides the order, hence the parts.

    Raises:
        TextError: The standard library has no sources here, or too few for three parts.
    """
    documents = _topics() + _modules(Path(os.__file__).parent)
    random.Random(seed).shuffle(documents)
    available = min(max_characters, sum(map(len, documents)))
    limits = [available * HELD_SHARE, available * HELD_SHARE, math.inf]
    parts: list[list[str]] = [[], [], []]
    part = held = total = 0
    for document in documents:
        if total + len(document) > max_characters:
            break
        parts[part].append(document)
        held, total = held + len(document), total + len(document)
        if held >= limits[part]:
            part, held = part + 1, 0
    if not parts[2]:
        raise TextError(
            f"the standard library gave {total} of {max_characters} characters; "
            "this Python has no sources, or more characters must be asked for"
        )
    evaluation, calibration, training = parts
    return training, calibration, evaluation


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [_cut(text) for _, text in sorted(topics.items())]


def _modules(library: Path) -> list[str]:
    """Sources in the order of their paths; files that are not UTF-8 are no text to learn from."""
    documents = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _NOT_PROSE)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                text = Path(folder, name).read_text(encoding="utf-8", errors="ignore")
                if len(text) > 200:
                    documents.append(_cut(text))
    return documents


def _cut(text: str) -> str:
    """The beginning of a text, up to the last line that ends within the longest document."""
    if len(text) <= LONGEST_DOCUMENT:
        return text
    return text[: text.rfind("\n", 0, LONGEST_DOCUMENT) + 1] or text[:LONGEST_DOCUMENT]
