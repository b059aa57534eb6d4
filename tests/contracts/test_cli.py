"""The command line as people meet it: its flags, its help, what it prints where."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.commands import cli
from tests.contracts.command_words import words_of
from tests.pipeline import pico

SETTINGS = (
    "--model --of --allocate --option --calibration --calibration-field --samples --length --seed "
    "--bos --products --eval-text --eval-field --eval-windows --tasks --task-path --task-limit "
    "--num-fewshot --apply-chat-template --skip-bad-rows "
    "--device --compute --batch-size --memory --runner --workers --cluster --home --store --name "
    "--refresh --trust-remote-code "
    "--config --json --help --recover --recover-steps --recover-text --recover-held-back "
    "--recover-seed --learn-seed --link --rank-multiple --factors --metric --bits"
)
TARGETS = "--target-bytes --target-perplexity"
FLAGS = {
    "run": f"--method --kept {TARGETS} {SETTINGS} --output",
    "sweep": f"--methods --kept {SETTINGS} --report",
    "plan": f"--method --methods --kept {TARGETS} {SETTINGS} --output --report",
    "methods": "--json --help",
    "export": "--to --output --json --help",
    "report": "--generate --prompt --output --home --json --help",
    "bench": "--against --batch --prompt-tokens --new-tokens --repeats --device --compute "
    "--trust-remote-code --home --json --help",
    "push": "--to --private --dry-run --endpoint --home --json --help",
    "serve": "--follow --host --port --device --home --json --help",
    "demo": "--home --json --help",
    "up": "--prefect-port --mlflow-port --home --json --help",
    "deploy": "--cron --every --timezone --name --notify --home --json --help",
    "promote": "--version --to --gates --measure --why --dry-run --trust-remote-code --home --json "
    "--help",
    "rollback": "--why --dry-run --home --json --help",
    "history": "--home --json --help",
    "store ls": "--stage --limit --all --home --store --json --help",
    "store show": "--home --store --json --help",
    "store why": "--home --store --json --help",
    "store verify": "--home --store --json --help",
    "store gc": "--dry-run --recent-days --home --store --json --help",
}

Call = Callable[..., tuple[int, str, str]]


def commands() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


def test_the_flags_of_every_command() -> None:
    found = {}
    for name, command in commands().items():
        flags = [option for p in command.params for option in p.opts if option.startswith("--")]
        found[name] = {*flags, "--help"}
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}


def test_every_flag_and_command_says_what_it_is_for() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


@pytest.mark.parametrize("name", FLAGS)
def test_help_shows_every_flag(name: str, call: Call) -> None:
    code, out, err = call(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert all(flag in out for flag in FLAGS[name].split())


def test_help_shows_defaults_and_choices(call: Call) -> None:
    _, out, _ = call("run", "--help")
    text = " ".join(out.split())
    assert "calibration windows (default: 256)" in text
    assert "--products float64|float32 dtype of one batch's" in text
    assert "(default: float64)" in text
    assert "else EIGENPRESS_HOME or ~/.eigenpress" in text
    assert "how the budget is divided, see `eigenpress methods`" in text
    assert "--target-bytes SIZE bytes of the compressed weights, like 1.5GB, in place of" in text


def test_no_words_show_the_help(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    assert all(name.split()[0] in out for name in FLAGS)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["store", "gc", "--help"]])
def test_help_imports_little_and_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    heavy = ["torch", "prefect", "mlflow", "transformers", "datasets", "zarr", "numpy", "lm_eval"]
    script = (
        "import sys; before = set(sys.modules)\n"
        "from flows.commands import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"found = [name for name in {heavy} if name in sys.modules]\n"
        "print(found, len(set(sys.modules) - before), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        check=True,
    )
    found, _, modules = done.stderr.strip().rpartition(" ")
    assert found == "[]" and "Usage: eigenpress" in done.stdout
    assert int(modules) < 400  # 233 today; torch alone is a thousand


def test_ctrl_c_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", interrupted)
    code, out, err = call("run", "--model", "m", "--kept", "0.5")
    assert (code, out) == (130, "")
    assert err.strip() == "eigenpress: interrupted; the same command goes on from here"


def test_json_is_all_that_stdout_holds(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "execute", lambda *_: {"method": "svd", "perplexity": 3.5, "é": None})
    code, out, err = call("run", "--model", "m", "--kept", "0.5", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"method": "svd", "perplexity": 3.5, "é": None}


def test_methods_as_json(call: Call) -> None:
    code, out, _ = call("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and set(rows) >= {"svd", "asvd", "svd_llm"}
    of_all: dict[str, Any] = {"factors": "auto", "metric": "inputs", "metric_damp": 0.1}
    of_all |= {"bits": 16, "code_group": 32, "rounding": "gptq"}
    assert rows["asvd"]["options"] == {"alpha": 0.5, "epsilon": 1e-6} | of_all
    assert all(set(of_all) <= set(row["about"]) for row in rows.values() if row["kind"] == "method")


def test_plan_writes_no_artifact(inputs: pico.Inputs, call: Call, tmp_path: Path) -> None:
    code, out, err = call("plan", *words_of(inputs)[1:], "--json")
    assert (code, err) == (0, "")
    assert {unit["state"] for unit in json.loads(out)["units"]} == {"run"}
    assert not list((tmp_path / "home").rglob("manifest.json"))
