"""The command line as people meet it: its flags, and one clear line for every mistake.

Most mistakes are made in this process with every stage forbidden; what needs a real process (lazy
imports, a terminal, a full disk) starts one.
"""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows import cli, runtime
from tests.pipeline import pico

SETTINGS = (
    "--model --of --option --calibration --calibration-field --samples --length --seed --bos "
    "--products --eval-text --eval-field --eval-windows --tasks --task-path --task-limit --device "
    "--batch-size --home --name --refresh --trust-remote-code --config --json --help"
)
FLAGS = {
    "run": f"--method --kept {SETTINGS} --output",
    "sweep": f"--methods --kept {SETTINGS} --report",
    "plan": f"--method --methods --kept {SETTINGS} --output --report",
    "methods": "--json --help",
    "export": "--to --output --help",
    "demo": "--home --json --help",
    "store ls": "--stage --home --json --help",
    "store show": "--home --help",
    "store why": "--home --help",
    "store verify": "--home --help",
    "store gc": "--dry-run --recent-days --home --help",
}

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    return pico.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Runs a command line in this process, in an empty folder, with every flow forbidden."""

    def forbidden() -> None:
        pytest.fail("a flow was started")

    monkeypatch.setattr(runtime, "flow_settings", forbidden)
    monkeypatch.setattr(runtime, "start_early", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*words: object, **environment: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eigenpress", *map(str, words)])
        capsys.readouterr()
        quiet = pico.clean_environment(HF_HUB_OFFLINE="1", **environment)
        with pico.environment(quiet), pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, output.out, output.err

    return run


@pytest.fixture
def refuse(call: Call) -> Callable[..., str]:
    """The one line that a command line is refused with."""

    def run(*words: object, **environment: str) -> str:
        code, out, err = call(*words, **environment)
        assert (code, out) == (2, "")
        assert err.startswith("eigenpress: ") and err.endswith("\n") and err.count("\n") == 1
        return err.removeprefix("eigenpress: ").strip()

    return run


Refuse = Callable[..., str]


def words_of(inputs: pico.Inputs, **changes: Any) -> list[str]:
    """A good `run` in ./home, with changes; None leaves a flag out."""
    settings: dict[str, Any] = {
        "model": inputs.model,
        "calibration": inputs.calibration,
        "eval_text": inputs.evaluation,
        "kept": 0.6,
        "samples": 4,
        "length": 32,
        "device": "cpu",
        "home": "home",
    }
    words = ["run"]
    for name, value in (settings | changes).items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def commands() -> dict[str, Any]:
    """Every command by its words."""
    import typer

    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


# Flags and help


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
    assert "(float64 or float32; default: float64)" in text
    assert "else EIGENPRESS_HOME or ~/.eigenpress" in text


def test_no_words_show_the_help(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    assert all(name.split()[0] in out for name in FLAGS)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["store", "gc", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    heavy = ["torch", "prefect", "mlflow", "transformers", "datasets", "zarr", "numpy", "lm_eval"]
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from flows import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"found = [name for name in {heavy} if name in sys.modules]\n"
        "print(found, time.perf_counter() - start, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        check=True,
    )
    found, _, seconds = done.stderr.strip().rpartition(" ")
    assert found == "[]" and "Usage: eigenpress" in done.stdout
    assert float(seconds) < 1


# Mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rum"], r"No such command 'rum'.*\(see `eigenpress --help`\)"),
        (["store"], r"Missing command\. \(see `eigenpress store --help`\)"),
        (["store", "list"], r"No such command 'list'.*\(see `eigenpress store --help`\)"),
        (["run", "--colour", "red"], r"No such option: --colour.* \(see `eigenpress run --help`\)"),
        (["run", "stray"], r".*extra argument.*stray.* \(see `eigenpress run --help`\)"),
        (["run", "--kept"], r"Option '--kept' requires an argument"),
        (["run", "--kept", "half"], r"Invalid value for '--kept': .*"),
        (["run", "--samples", "2.5"], r"Invalid value for '--samples': .*"),
        (["export"], r"Missing argument 'DIR'.*\(see `eigenpress export --help`\)"),
        (["run", "--kept", "0.5"], r"model is missing \(--model or `model:` in --config\)"),
        (["sweep", "--model", "m", "--kept", "0.5"], r"methods is missing .*"),
        (["sweep", "--model", "m", "--methods", ",", "--kept", "0.5"], r"methods: .* at least 1"),
    ],
)
def test_words_that_mean_nothing(words: list[str], line: str, refuse: Refuse) -> None:
    assert re.match(line, refuse(*words))


@pytest.mark.parametrize("kept", ["0", "1.5", "-1", "nan"])
@pytest.mark.parametrize("command", ["run", "plan", "sweep"])
def test_kept_outside_its_range(command: str, kept: str, refuse: Refuse, tmp_path: Path) -> None:
    methods = ["--methods", "svd"] if command == "sweep" else []
    line = refuse(command, "--model", "m", "--kept", kept, *methods, "--home", tmp_path / "home")
    assert line.startswith(f"kept must be in (0, 1], got {float(kept):g}: it is the share of ")
    assert not (tmp_path / "home").exists()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "svdllm"}, "unknown method 'svdllm'. Did you mean 'svd_llm'?"),
    "option of another": ({"option": "alpha=1"}, "method 'svd_llm' has no option 'alpha'"),
    "option of no kind": (
        {"method": "asvd", "option": "alpha=high"},
        "option 'alpha' of method 'asvd' must be a float, got 'high'",
    ),
    "option out of range": (
        {"method": "asvd", "option": "alpha=-1"},
        "asvd needs alpha >= 0 and epsilon > 0, got alpha=-1",
    ),
    "option without value": ({"option": "alpha"}, "--option takes NAME=VALUE, got 'alpha'"),
    "no samples": ({"samples": 0}, "samples: input should be greater than or equal to 1, got 0"),
    "missing model": ({"model": "/nowhere/model"}, "no such folder: /nowhere/model"),
    "model is a file": ({"model": "a.txt"}, "a.txt is a file: give the model's folder"),
    "no model": ({"model": "./empty"}, "is a folder that is no model: it has no config.json"),
    "unknown hub id": ({"model": "no/such"}, "no/such: no such folder, and the hub could not"),
    "compressed model": ({"model": "./compressed"}, "is already compressed: start from the dense"),
    "missing text": ({"calibration": "no.txt"}, "no.txt does not exist; check the path"),
    "missing text path": ({"calibration": "./no"}, "./no does not exist; check the path"),
    "text is a folder": ({"calibration": "./empty"}, "./empty is a folder, not a text; give one"),
    "missing evaluation": ({"eval_text": "no.txt"}, "no.txt does not exist; check the path"),
    "no calibration": (
        {"calibration": None},
        "method 'svd_llm' needs calibration text: give ",
    ),
    "nothing to measure on": (
        {"method": "svd", "calibration": None, "eval_text": None},
        "nothing to evaluate on: give --eval-text FILE, --tasks NAME or --calibration FILE",
    ),
    "folder without tasks": ({"task_path": "empty"}, "--task-path without --tasks: say which "),
    "missing task folder": (
        {"task_path": "none", "tasks": "mine"},
        "task folder none does not exist; check the path",
    ),
    "unknown device": ({"device": "gpu"}, "--device gpu cannot be used: "),
    "device that computes nothing": ({"device": "meta"}, "--device meta computes nothing; use cpu"),
    "too small a budget": ({"kept": 0.001}, "kept=0.001 leaves layer model.layers.0.self_attn.q_p"),
    "budget without layers": (
        {"kept": 0.01, "of": "model"},
        "kept=0.01 of the whole model leaves nothing for the layers",
    ),
    "home is a file": ({"home": "a.txt"}, "the data directory a.txt is a file or lies "),
    "home below a file": (
        {"home": "a.txt/b"},
        "the data directory a.txt/b is a file or lies ",
    ),
    "missing settings": ({"config": "no.yaml"}, "cannot read --config no.yaml: No such file"),
    "unknown setting": ({"config": "unknown.yaml"}, "there is no setting called 'colour' (with "),
    "wrong setting": ({"config": "wrong.yaml"}, "seed: input should be a valid integer"),
    "not YAML": ({"config": "broken.yaml"}, "--config broken.yaml is not YAML: "),
    "output is a file": ({"output": "a.txt"}, "--output"),
    "output is in use": ({"output": "compressed"}, "--output"),
}


def make_mistakes(folder: Path) -> None:
    """The files that `MISTAKES` speaks of."""
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("words")
    (folder / "a.csv").write_text("a,b")
    (folder / "unknown.yaml").write_text("colour: red\n")
    (folder / "wrong.yaml").write_text("seed: red\n")
    (folder / "broken.yaml").write_text("a: [b\n")
    (folder / "compressed").mkdir()
    settings = {"quantization_config": {"quant_method": "eigenpress"}}
    (folder / "compressed" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_stage(
    mistake: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    changes, expected = MISTAKES[mistake]
    make_mistakes(tmp_path)

    assert expected in refuse(*words_of(inputs, **changes))


LATE = "texts are read by the stage tokenise; nothing reads them before"


@pytest.mark.xfail(strict=True, reason=LATE, raises=pytest.fail.Exception)
@pytest.mark.parametrize("which", ["calibration", "eval_text"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("table.csv", "a,b", "table.csv: cannot read a .csv file; give .txt, .jsonl or .parquet"),
        ("short.txt", "a few words", "tokens and one window needs 32; give more text"),
        ("empty.txt", "", "empty.txt holds no text; give a source with some"),
        ("other.jsonl", '{"body": "words"}\n', "no field 'text'; the fields there are: body"),
    ],
)
def test_text_that_will_not_do(
    which: str, name: str, text: str, expected: str, inputs: pico.Inputs, refuse: Refuse
) -> None:
    Path(name).write_text(text)

    assert expected in refuse(*words_of(inputs, **{which: name}))


@pytest.mark.xfail(strict=True, reason=LATE, raises=pytest.fail.Exception)
def test_a_model_without_a_tokenizer(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    shutil.copytree(inputs.model, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("token*"):
        file.unlink()

    assert "no tokenizer can be loaded from" in refuse(*words_of(inputs, model="./mute"))


@pytest.mark.slow
def test_unknown_tasks_are_named_with_the_nearest(inputs: pico.Inputs, refuse: Refuse) -> None:
    line = refuse(*words_of(inputs, tasks="arc_eazy"))
    assert line.startswith("no lm-eval task is called 'arc_eazy'; nearest: arc_easy")


def test_method_and_methods_together(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = ["plan", *words_of(inputs, method="svd")[1:], "--methods", "svd,asvd"]
    assert refuse(*words) == "give --method for a run or --methods for a sweep, not both"


def test_one_wrong_method_of_a_sweep(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = ["sweep", *words_of(inputs)[1:], "--methods", "svd,asvf"]
    assert refuse(*words).startswith("unknown method 'asvf'. Did you mean 'asvd'?")


def test_a_store_of_a_newer_version(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    store = tmp_path / "home" / "store"
    store.mkdir(parents=True)
    (store / "FORMAT.json").write_text('{"format": 99}')

    for words in (words_of(inputs), ["store", "ls", "--home", "home"]):
        line = refuse(*words)
        assert "99" in line and "newer" in line


@contextmanager
def another_user() -> Iterator[None]:
    """The process without the rights of root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_home_that_cannot_be_written(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    import flows.home  # noqa: F401  while everything can still be read

    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for home in (locked, locked / "inside"):
        with another_user():
            line = refuse(*words_of(inputs, home=home))
        assert line == (
            f"cannot write to the data directory {home}: Permission denied; "
            "choose another with --home or EIGENPRESS_HOME"
        )


def test_a_tracking_server_that_is_not_there(inputs: pico.Inputs, refuse: Refuse) -> None:
    started = time.perf_counter()
    line = refuse(*words_of(inputs), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert line.startswith("no MLflow server answers at http://127.0.0.1:9 (")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "dense"], "dense is not a model that eigenpress compressed: nothing to undo"),
        (["export", "none"], "no such folder: none"),
        (["export", "dense", "--to", "gguf"], "cannot export to 'gguf'; forms: dense"),
        (["store", "ls", "--home", "none"], "there is no store at none/store; choose a data dir"),
        (["store", "gc", "--home", "none"], "there is no store at none/store; choose a data dir"),
        (["store", "why", "abcdef", "--home", "home"], "abcdef"),
        (["store", "show", "abc", "--home", "home"], "key 'abc' is too short: give 4 digits"),
    ],
)
def test_other_commands(
    words: list[str], line: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    shutil.copytree(inputs.model, tmp_path / "dense")
    (tmp_path / "home" / "store").mkdir(parents=True)

    assert line in refuse(*words)
    assert not (tmp_path / "none").exists()


def test_ctrl_c_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", interrupted)
    code, out, err = call("run", "--model", "m", "--kept", "0.5")
    assert (code, out) == (130, "")
    assert err.strip() == "eigenpress: interrupted; the same command goes on from here"


def test_a_bug_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a library's own")

    monkeypatch.setattr(cli, "execute", broken)
    with pytest.raises(RuntimeError, match="a library's own"):
        call("run", "--model", "m", "--kept", "0.5")


def test_json_is_all_that_stdout_holds(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "execute", lambda *_: {"method": "svd", "perplexity": 3.5, "é": None})
    code, out, err = call("run", "--model", "m", "--kept", "0.5", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"method": "svd", "perplexity": 3.5, "é": None}


def test_methods_as_json(call: Call) -> None:
    code, out, _ = call("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and set(rows) >= {"svd", "asvd", "svd_llm"}
    assert rows["asvd"]["options"] == {"alpha": 0.5, "epsilon": 1e-6}


def test_plan_writes_no_artifact(inputs: pico.Inputs, call: Call, tmp_path: Path) -> None:
    code, out, err = call("plan", *words_of(inputs)[1:], "--json")
    assert (code, err) == (0, "")
    assert {unit["state"] for unit in json.loads(out)["units"]} == {"run"}
    assert not list((tmp_path / "home").rglob("manifest.json"))


# Real processes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    inputs: pico.Inputs, small_disk: Path, tmp_path: Path, blank_home: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(blank_home, home)
    (small_disk / "store").mkdir()
    (home / "store").symlink_to(small_disk / "store")
    filler = small_disk / "filler"
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(b"\0" * (room - 350_000))
    words = pico.arguments("run", inputs.settings(home, samples=32, length=64))

    full = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    lines = full.stderr.strip().splitlines()
    assert full.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("eigenpress: ") and "disk full" in lines[0]
    there = len(list((home / "store").rglob("manifest.json")))
    assert there > 0

    filler.unlink()
    again = subprocess.run(
        [*words, "--json"], capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    stages = json.loads(again.stdout)["stages"]
    cached = sum(pico.counts(stages, "cached").values())
    assert 0 < cached <= there and pico.counts(stages, "computed")


@pytest.fixture(scope="module")
def blank_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with MLflow's tables, which take seconds to make."""
    from tasks import tracking

    home = tmp_path_factory.mktemp("blank") / "home"
    with pico.environment(pico.clean_environment()):
        tracking.check_tracking(home)
    return home


def environment(**more: str) -> dict[str, str]:
    return pico.clean_environment(PYTHONPATH=str(pico.ROOT), **more)


def in_terminal(words: list[str], variables: Mapping[str, str], folder: Path) -> tuple[int, str]:
    """Runs a command line in a terminal of 100 columns; its exit code and all that it printed."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(words[0], words, {**variables, "COLUMNS": "100", "TERM": "xterm-256color"})
    printed = b""
    while True:
        select.select([terminal], [], [], 60)
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        printed += part
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), printed.decode()


def screen(printed: str) -> list[str]:
    """The lines that stay on a terminal: colours left out, moves of the cursor obeyed."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", printed):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token.endswith("2K"):
            lines[row] = ""
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column] + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


@pytest.mark.slow
def test_a_terminal_is_left_clean(inputs: pico.Inputs, tmp_path: Path, blank_home: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(blank_home, home)
    words = pico.arguments("run", inputs.settings(home))

    code, printed = in_terminal(words, environment(), tmp_path)
    assert code == 0, printed
    assert "━" in printed  # there was a bar
    assert printed.rfind("\x1b[?25h") > printed.rfind("\x1b[?25l")  # the cursor is back
    left = [line for line in screen(printed) if line]
    assert not any("━" in line for line in left)
    assert [line.split()[0] for line in left] == [
        *("tokenise", "collect", "whiten", "decompose", "allocate", "realise", "materialise"),
        *("evaluate", "register", "kept", "perplexity", "model", "registered"),
    ]
