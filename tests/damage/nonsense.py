"""Values that nobody means, and small harms to files: what the hundreds of tries are made of."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**64, -(2**63), 0.5, -0.1, 1e308, 1e-300),
    *("", " ", "x", "nan", "-inf", "../../x", "/", ".", "a" * 300, "é\u2028", "null", "0x10"),
    *([], {}, [1, "a"], {"a": 1}, [[]], [None]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    found = [path] if path else []
    parts: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        parts = enumerate(value)
    for name, part in parts:
        found += places(part, (*path, name))
    return found


def mutate_json(file: Path, chance: random.Random) -> str:
    """Puts a value nobody means somewhere into a JSON file, or takes one away."""
    content = json.loads(file.read_text(encoding="utf-8"))
    found = places(content)
    if not found:
        return "nothing"
    shallow = [path for path in found if len(path) < 3]  # or it would nearly always be vocabulary
    *way, last = chance.choice(shallow)
    inside = content
    for name in way:
        inside = inside[name]
    if chance.random() < 0.25:
        del inside[last]
        done = "gone"
    else:
        inside[last] = chance.choice(VALUES)
        done = repr(inside[last])[:40]
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"{file.name}: {'.'.join(map(str, (*way, last)))} is {done}"


def flip(file: Path, chance: random.Random) -> str:
    """Turns one bit over."""
    data = bytearray(file.read_bytes())
    if not data:
        return "nothing"
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return f"{file.name}: a bit of byte {place}"


def cut(file: Path, chance: random.Random) -> str:
    """Keeps a part of the file."""
    data = file.read_bytes()
    size = chance.randrange(len(data) + 1)
    file.write_bytes(data[:size])
    return f"{file.name}: {size} of {len(data)} bytes"


def garble(file: Path, chance: random.Random) -> str:
    """Writes random bytes over a stretch of the file."""
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data) + 1)
    data[place : place + 16] = chance.randbytes(16)
    file.write_bytes(data)
    return f"{file.name}: garbled at {place}"


def lose(file: Path, chance: random.Random) -> str:
    """Takes it away."""
    file.unlink()
    return f"{file.name}: gone"


def become_folder(file: Path, chance: random.Random) -> str:
    """A folder of its name."""
    file.unlink()
    file.mkdir()
    return f"{file.name}: a folder"


def dangle(file: Path, chance: random.Random) -> str:
    """A link to nothing."""
    file.unlink()
    file.symlink_to("nothing-here")
    return f"{file.name}: a link to nothing"


def swap(file: Path, chance: random.Random) -> str:
    """The content of a neighbour."""
    others = [other for other in file.parent.iterdir() if other.is_file() and other != file]
    if not others:
        return "nothing"
    other = chance.choice(sorted(others))
    shutil.copyfile(other, file)
    return f"{file.name}: has the content of {other.name}"


HARMS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(flip, cut, garble, lose, become_folder, dangle, swap),
)


def harm(folder: Path, chance: random.Random) -> str:
    """Does one harm to one file below a folder, each kind as often."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    return chance.choice(HARMS)(file, chance)
