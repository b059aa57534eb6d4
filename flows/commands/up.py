"""`eigenpress up`: servers and a worker for schedules, until told to end."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress_core.secrets import hide
from flows.report.lines import entry, make_console
from flows.server.together import Together
from tasks.tracking.pages import pages_command


def run_together(
    home: Path,
    prefect_port: int,
    mlflow_port: int,
    as_json: bool,
    print_json: Callable[[Any], None],
) -> None:
    """Starts everything, says where it is, and waits for Ctrl-C, SIGTERM or the end of a part."""
    console = make_console(stderr=as_json)

    def say(line: str) -> None:
        entry(console, "run", line)

    together = Together(home, prefect_port, mlflow_port, lambda: pages_command(home), say)
    with suppress(KeyboardInterrupt), together.running() as addresses:
        if as_json:
            print_json({**addresses, "home": str(home), "logs": str(together.logs)})
        for name in ("prefect", "mlflow"):
            if name in addresses:
                entry(console, name, addresses[name])
        entry(console, "worker", f"one run at a time; logs are in {together.logs}")
        data = "" if "EIGENPRESS_HOME" in os.environ else f" --home {home}"
        entry(
            console,
            "next",
            f"`eigenpress deploy CONFIG{data}` finds them; elsewhere "
            f"export PREFECT_API_URL={hide(addresses['api'])}. Ctrl-C ends them",
        )
        together.watch()
