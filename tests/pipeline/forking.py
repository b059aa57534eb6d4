"""Scripts in processes of their own that need not wait for libraries: forks of one that has them.

One interpreter imports torch and transformers once, nothing of ours, and forks for each script,
before it has computed anything or started a thread. `python -I` on this file is that interpreter.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    *("torch", "peft", "safetensors.torch", "zarr", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
)
OURS = ("compress_core", "flows", "storage", "tasks", "tests")


def serve() -> None:
    """For each line, what `_become` is given, forks; answers the child's exit code."""
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not sys.modules.keys() & set(OURS)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(
    script: str, words: list[str], folder: str, path: list[str], out: str, err: str
) -> NoReturn:
    os.chdir(folder)
    for place, number in ((out, 1), (err, 2)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # transformers has read its environment already
    importlib.import_module("transformers.dynamic_module_utils").__dict__["HF_MODULES_CACHE"] = str(
        Path(folder, "modules")
    )
    sys.path[:0] = path
    sys.argv = ["-c", *words]
    code: Any = 0
    try:
        exec(compile(script, "-c", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@cache
def _server() -> subprocess.Popen[str]:
    from tests.pipeline.pico import clean_environment  # not where this file is the interpreter's

    process = subprocess.Popen(
        [sys.executable, "-I", __file__],
        env=clean_environment(HF_HUB_OFFLINE="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # closes its stdin, which ends it
    return process


def run_script(script: str, *words: object, folder: Path, path: Sequence[Path] = ()) -> str:
    """What a script prints in a process of its own, which must not fail.

    Args:
        script: Python, as for `python -c`.
        words: Its arguments.
        folder: Where it runs; code of models is copied to ``modules`` there.
        path: Where packages of ours are found, if any may be.
    """
    server, places = _server(), [folder / ".out", folder / ".err"]
    asked = {
        "script": script,
        "words": [str(word) for word in words],
        "folder": str(folder),
        "path": [str(place) for place in path],
        "out": str(places[0]),
        "err": str(places[1]),
    }
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    out, err = (place.read_text() for place in places)
    for place in places:
        place.unlink()
    assert answer == "0\n", err
    return out


if __name__ == "__main__":
    serve()
