"""The process that holds a served model: the child that backend.py starts, run as a script.

python -P model_server.py SOCKET PARENT FOLDER NAME DEVICE PLACE
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where this lies, wherever that is
from flows.server.leash import Leash, WithoutSecrets

if __name__ == "__main__":
    number, parent, folder, name, device, place = sys.argv[1:]
    leash = Leash(int(parent))

    def leave() -> None:
        """Nothing is served yet, and a parent that was killed removes no folder."""
        shutil.rmtree(place, ignore_errors=True)
        os._exit(0)

    leash.end = leave
    sys.stdout, sys.stderr = WithoutSecrets(sys.stdout), WithoutSecrets(sys.stderr)

    from compress_core.hf.serving import serve_folder

    def started(server: Any) -> None:
        """The leash ends a server that answers by its own word."""

        def end() -> None:
            shutil.rmtree(place, ignore_errors=True)
            server.should_exit = True

        leash.end = end

    listener = socket.socket(fileno=int(number))
    serve_folder(Path(folder), name, listener, device, Path(place), started)
