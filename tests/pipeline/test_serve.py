"""`eigenpress serve`, asked by OpenAI's client: many at once, across a promotion, and its end."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import APIStatusError, APITimeoutError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress_core.hf  # noqa: F401  loads the compressed folder in this process
from tasks.tracking.speaking import speaking
from tests.patience import PATIENCE, wait_for
from tests.pipeline import pico

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PROMPTS = [f"Ae {word}" for word in ("de", "be", "ko", "lu", "mi", "na", "ro", "su")]
NEW = 8  # tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("code_cache")]


@dataclass
class Answering:
    """A running `serve pico@champion --follow`."""

    process: subprocess.Popen[str]
    client: OpenAI
    home: Path

    def ask(self, prompt: str, **more: Any) -> Any:
        return self.client.completions.create(
            model="pico", prompt=prompt, max_tokens=NEW, temperature=0, **more
        )

    def backends(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture(scope="module")
def folders(
    cold: dict[str, Any], inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Three versions of a model: compressed, dense, and one that will be altered."""
    place = tmp_path_factory.mktemp("versions")
    for number, folder in enumerate((Path(cold["model_dir"]), inputs.model), 1):
        shutil.copytree(folder, place / str(number))
        (place / str(number) / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(place / "1", place / "3")
    return [place / "1", place / "2", place / "3"]


@pytest.fixture(scope="module")
def written(folders: list[Path]) -> list[dict[str, str]]:
    """What each version writes after each prompt, likeliest token by token, in this process."""
    texts: list[dict[str, str]] = []
    for folder in folders[:2]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts.append({})
        for prompt in [*PROMPTS, *(f"user: {prompt}\n" for prompt in PROMPTS)]:
            tokens = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**tokens, max_new_tokens=NEW, do_sample=False)
            new = out[0, tokens["input_ids"].shape[1] :]
            texts[-1][prompt] = str(tokenizer.decode(new, skip_special_tokens=True))
    assert texts[0] != texts[1]
    return texts


@pytest.fixture(scope="module")
def answering(
    folders: list[Path], blank_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Answering]:
    home = tmp_path_factory.mktemp("serving") / "home"
    home.mkdir()
    shutil.copyfile(blank_home / "mlflow.db", home / "mlflow.db")
    pico.register(home, "pico", folders)
    (folders[2] / "config.json").write_text("{}")
    promote(home, 1)
    words = pico.arguments("serve pico@champion --follow --json", {"port": 0, "home": home})
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=(home / "stderr").open("w"),
        text=True,
        env=pico.clean_environment(),
        cwd=home,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1].rstrip() != "}":
        lines.append(process.stdout.readline())
        assert lines[-1], "it ended"
    ready = json.loads("".join(lines))
    assert ready["model"] == "pico"
    client = OpenAI(base_url=ready["url"], api_key="none", max_retries=0, timeout=PATIENCE)
    answers = Answering(process, client, home)
    yield answers
    for backend in answers.backends() if process.poll() is None else []:
        backend.kill()  # one that a failed test left suspended would stay for ever
    process.kill()
    process.wait()


def promote(home: Path, number: int) -> None:
    with pico.environment(pico.clean_environment()), speaking(home, "to promote") as client:
        client.set_registered_model_alias("pico", "champion", str(number))


def test_requests_at_once_are_answered_each_by_its_own_text(
    answering: Answering, written: list[dict[str, str]]
) -> None:
    def ask(number: int) -> tuple[str, str]:
        prompt = PROMPTS[number // 4]
        if number % 4 == 0:
            return prompt, answering.ask(prompt).choices[0].text
        if number % 4 == 1:
            parts = answering.ask(prompt, stream=True)
            return prompt, "".join(part.choices[0].text for part in parts)
        chat = {
            "model": "pico",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": NEW,
            "temperature": 0,
        }
        create: Any = answering.client.chat.completions.create
        if number % 4 == 2:
            return f"user: {prompt}\n", create(**chat).choices[0].message.content
        parts = [part.choices[0].delta.content or "" for part in create(**chat, stream=True)]
        return f"user: {prompt}\n", "".join(parts)

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, range(4 * len(PROMPTS))))
    assert [text for _, text in answers] == [written[0][prompt] for prompt, _ in answers]


def test_nothing_but_its_one_model_is_answered_for(
    answering: Answering, folders: list[Path]
) -> None:
    assert [model.id for model in answering.client.models.list()] == ["pico"]
    for other in ("gpt2", str(folders[1])):
        with pytest.raises(APIStatusError, match="pinned to 'pico'") as refused:
            answering.client.completions.create(model=other, prompt="x")
        assert refused.value.status_code == 400
    with pytest.raises(APIStatusError, match="there is no /load_model") as refused:
        answering.client.post(
            f"{str(answering.client.base_url).removesuffix('v1/')}load_model",
            body={"model": str(folders[1])},
            cast_to=object,
        )
    assert refused.value.status_code == 404
    for wrong, status in (({"max_tokens": 0}, 400), ({"prompt": ""}, 500)):
        asked: dict[str, Any] = {"model": "pico", "prompt": "Ae", **wrong}
        with pytest.raises(APIStatusError, match="Error: ") as refused:
            answering.client.completions.create(**asked)
        assert refused.value.status_code == status  # and the connection is still good
    assert answering.ask("Ae").choices


def test_a_version_that_is_not_what_was_registered_does_not_take_over(
    answering: Answering, written: list[dict[str, str]]
) -> None:
    promote(answering.home, 3)
    wait_for(lambda: (answering.home / "stderr").read_text().endswith("\n"))
    (line,) = (answering.home / "stderr").read_text().splitlines()
    assert line.startswith("eigenpress: pico version 1 is served on: ")
    assert "config.json" in line
    assert answering.ask(PROMPTS[0]).choices[0].text == written[0][PROMPTS[0]]


def test_a_promoted_version_takes_over_and_what_is_in_flight_ends_on_the_old_one(
    answering: Answering, written: list[dict[str, str]]
) -> None:
    prompt = PROMPTS[0]
    long: dict[str, Any] = {"model": "pico", "prompt": prompt, "max_tokens": 300, "temperature": 0}
    whole = answering.client.completions.create(**long).choices[0].text
    (old,) = answering.backends()
    stream = iter(answering.client.completions.create(**long, stream=True))
    streamed = next(stream).choices[0].text
    old.suspend()  # so that both are in flight for as long as this takes
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(answering.ask, prompt)
        wait_for(lambda: _connections(answering, old) == 2)
        promote(answering.home, 2)
        # The new one is loaded beside it; from the switch on it answers, and at once.
        assert _first_of_new(answering, prompt) == written[1][prompt]
        assert old.is_running() and not waiting.done()
        old.resume()
        assert waiting.result(PATIENCE).choices[0].text == written[0][prompt]
    streamed += "".join(part.choices[0].text for part in stream)
    assert streamed == whole
    wait_for(lambda: not old.is_running())
    assert answering.ask(prompt).choices[0].text == written[1][prompt]


def _connections(answering: Answering, backend: psutil.Process) -> int:
    """How many the front has to a backend, accepted there or not yet."""
    ports = {c.laddr.port for c in backend.net_connections("tcp") if c.status == "LISTEN"}
    own = psutil.Process(answering.process.pid).net_connections("tcp")
    return sum(bool(c.raddr) and c.raddr.port in ports for c in own)


def _first_of_new(answering: Answering, prompt: str) -> str:
    """Asks until the new backend answers; what the suspended one got waits with the others."""
    brief = answering.client.with_options(timeout=1)

    def answer() -> Any:
        with suppress(APITimeoutError):
            return brief.completions.create(
                model="pico", prompt=prompt, max_tokens=NEW, temperature=0
            )

    return str(wait_for(answer).choices[0].text)


def test_killed_it_leaves_no_process(answering: Answering) -> None:
    (backend,) = answering.backends()
    place = Path(backend.cmdline()[-1])
    assert place.is_dir()
    os.kill(answering.process.pid, signal.SIGKILL)
    wait_for(lambda: not backend.is_running())
    assert not place.exists()


def test_a_port_in_use_is_one_line(inputs: pico.Inputs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            pico.arguments(f"serve {inputs.model}", {"port": port, "home": tmp_path}),
            env=pico.clean_environment(),
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"--port {port}: Address already in use; end what is there" in line
