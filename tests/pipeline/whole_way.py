"""From an empty data directory to a champion that answers, as docs/whole-way.md tells it.

Of the two methods there one, which makes versions enough.

    python -m tests.pipeline.whole_way HOME SHARED

All by commands, each a process of its own. What the environment says of databases holds for all:
`deployments/with-postgres.sh python -m tests.pipeline.whole_way ...` is the same on PostgreSQL.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from openai import OpenAI

from tests.patience import PATIENCE, wait_for
from tests.pipeline import pico

NAME, PROMPT = "wiki", "The city is the capital of"
GATES = {
    "perplexity": {"worse_than_dense": "50%", "worse_than_champion": "2%"},
    "generation": {"prompts": [PROMPT], "new_tokens": 16, "max_repetition": 1},
}


class Way:
    """One walk; every step says what came of it."""

    def __init__(self, home: Path, shared: Path) -> None:
        self.home, self.shared = home, shared
        self.place = home.parent
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(pico.ROOT),
            "OMP_NUM_THREADS": "1",
            "EIGENPRESS_HOME": str(home),
        }

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of a sweep or a run on the 5M model, small enough to take seconds."""
        return {
            "model": str(self.shared / "models/wiki-llama-5m"),
            "calibration": str(self.shared / "data/wiki2015/valid.jsonl"),
            "eval_text": [str(self.shared / "data/wiki2015/test.jsonl")],
            "samples": 16,
            "length": 128,
            "eval_windows": 8,
            "device": "cpu",
            "name": NAME,
            **more,
        }

    def write(self, name: str, content: Any) -> Path:
        """A YAML file."""
        file = self.place / name
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file

    def command(self, *words: object) -> tuple[int, Any, str]:
        """Exit code, what is printed as JSON, and the last line for people."""
        done = subprocess.run(
            [*pico.arguments(str(words[0]), {}), *map(str, words[1:]), "--json"],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, last[0]

    @contextmanager
    def running(self, *words: object) -> Iterator[Any]:
        """A command that lasts; what it says once it is ready. SIGTERM ends it, nothing is left."""
        with (self.place / f"{words[0]}.stderr".replace(" ", "-")).open("w") as errors:
            process = subprocess.Popen(
                [*pico.arguments(str(words[0]), {}), *map(str, words[1:]), "--json"],
                cwd=self.place,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert process.stdout is not None
        try:
            lines: list[str] = []
            while not lines or lines[-1].rstrip() != "}":
                lines.append(process.stdout.readline())
                assert lines[-1], f"it ended: {Path(errors.name).read_text()}"
            yield json.loads("".join(lines))
        finally:
            family = [process, *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
            process.stdout.close()
            left = psutil.wait_procs(family[1:], timeout=PATIENCE)[1]
        assert left == []

    def champion(self) -> int:
        """The version that is champion."""
        from tasks.tracking.versions import read_aliases

        with pico.environment(self.environment):
            return read_aliases(self.home, NAME)["champion"]


def scheduled(way: Way, api: str, deployment: str, number: int) -> list[Any]:
    """The first runs of a schedule, oldest first, once they have ended; no other begins."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:

        def begun() -> list[Any]:
            runs = [run for run in client.read_flow_runs() if run.start_time]
            runs = [run for run in runs if str(run.deployment_id) == deployment]
            return sorted(runs, key=lambda run: run.start_time) if len(runs) >= number else []

        def ended() -> list[Any]:
            runs = begun()[:number]
            return runs if all(run.state and run.state.is_final() for run in runs) else []

        wait_for(begun, every=2)
        client.pause_deployment(deployment)
        return list(wait_for(ended, every=2))


def walk(home: Path, shared: Path, say: Callable[[str], None]) -> None:
    """The whole way; an assertion fails where it does not hold."""
    way = Way(home, shared)
    sweep = way.write("nightly.yaml", way.settings(methods=["svd"], kept=[0.6, 0.4]))
    gates = way.write("gates.yaml", GATES)
    with ExitStack() as stack:
        up = stack.enter_context(way.running("up", "--prefect-port", 0, "--mlflow-port", 0))
        say(f"up: {up}")
        code, made, line = way.command("deploy", sweep, "--every", "30s")
        assert code == 0, line
        first, second = scheduled(way, up["api"], made["id"], 2)
        assert first.state.name == second.state.name == "Completed", (first.state, second.state)
        assert f"new: {NAME} version 1" in first.state.message
        assert second.state.message.startswith("nothing changed: all ")
        for run in (first, second):
            say(f"scheduled: {run.state.message} ({run.total_run_time.total_seconds():.1f} s)")

        code, told, line = way.command(
            "promote", NAME, "--version", "best:perplexity", "--gates", gates
        )
        assert code == 0, (told, line)
        best = way.champion()
        say(f"champion: version {best}")

        served = stack.enter_context(
            way.running("serve", f"{NAME}@champion", "--follow", "--port", 0)
        )
        client = OpenAI(base_url=served["url"], api_key="none", timeout=PATIENCE)

        def ask() -> str:
            answer = client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=24, temperature=0
            )
            return answer.choices[0].text

        before = ask()
        assert before.strip()
        say(f"{PROMPT} →{before!r}")

        worse = next(number for number in (1, 2) if number != best)
        code, told, line = way.command("promote", NAME, "--version", worse, "--gates", gates)
        assert (code, way.champion()) == (1, best), (told, line)
        say(f"version {worse} is refused: {line}")

        better = way.write("better.yaml", way.settings(method="svd_llm", kept=0.95))
        code, told, line = way.command("run", "--config", better)
        assert code == 0, line
        number = told["registered"]["version"]
        code, told, line = way.command(
            "promote", NAME, "--gates", gates, "--why", "a larger budget"
        )
        assert (code, way.champion()) == (0, number), (told, line)
        after = wait_for(lambda: (text := ask()) != before and text)
        say(f"version {number} is champion: {PROMPT} →{after!r}")

        code, told, line = way.command("rollback", NAME, "--why", "as a test")
        assert (code, way.champion()) == (0, best), (told, line)
        assert wait_for(lambda: ask() == before)
        say(f"rolled back to version {best}")
        code, moves, line = way.command("history", NAME)
        assert [move["after"]["champion"] for move in moves] == [best, number, best], line
        assert [move["why"] for move in moves] == ["", "a larger budget", "as a test"]
    say("everything is down")


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    walk(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), print)
