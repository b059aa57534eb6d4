"""The process that holds a served model: the child that backend.py starts, run as a module."""

import socket
import sys
from pathlib import Path

from flows.server.private import Leash, WithoutSecrets

if __name__ == "__main__":
    number, parent, folder, name, device, place = sys.argv[1:]
    leash = Leash(int(parent))
    sys.stdout, sys.stderr = WithoutSecrets(sys.stdout), WithoutSecrets(sys.stderr)

    from compress_core.hf.serving import serve_folder

    serve_folder(
        Path(folder),
        name,
        socket.socket(fileno=int(number)),
        device,
        Path(place),
        lambda server: setattr(leash, "server", server),
    )
