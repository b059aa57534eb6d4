"""Help is in one style, in 80 columns, with nothing cut; unknown words get the nearest."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import typer

from compress_core.allocate import ALLOCATORS
from compress_core.methods import METHODS, option_defaults
from flows.commands import cli
from flows.commands.look import ALL, ARGUMENTS, EXAMPLES, OTHERS, broken
from flows.settings.belonging import GROUPS, belonging
from flows.settings.config import KINDS
from flows.settings.flags import method_names
from tests.contracts.command_words import words_of
from tests.contracts.test_cli import commands
from tests.pipeline import pico

Call = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]
PAGES = ["", "store", *commands()]


def page(call: Call, words: str, flag: str = "--help") -> str:
    code, out, err = call(*words.split(), flag)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("words", PAGES)
def test_a_page_of_help_fits_and_ends_with_an_example(words: str, call: Call) -> None:
    text = page(call, words)
    assert page(call, words, "-h") == text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    head, _, example = text.rpartition("\nExample:\n")
    assert " ".join(example.replace("\\\n", " ").split()) == EXAMPLES[words or "run"]
    headings = re.findall(r"^(\w.*):$", head, re.MULTILINE)
    known = [ARGUMENTS, *GROUPS, OTHERS, ALL, "Commands"]
    assert headings == [heading for heading in known if heading in headings]


@pytest.mark.parametrize("words", PAGES)
def test_nothing_on_a_page_is_cut(words: str, call: Call) -> None:
    text = " ".join(page(call, words).split())
    group: Any = typer.main.get_command(cli.app)
    for word in words.split():
        group = group.commands[word]
    for command in getattr(group, "commands", {}).values():
        assert " ".join(command.help.split("\n\n")[0].split()) in text
    for parameter in group.params:
        assert parameter.help[1:].removesuffix(".") in text, parameter.name


@pytest.mark.parametrize(("command", "kind"), [("run", "a run"), ("sweep", "a sweep")])
def test_a_flag_stands_under_the_heading_of_its_setting(
    command: str, kind: str, call: Call
) -> None:
    sections = re.split(r"^(\w.*):\n", page(call, command), flags=re.MULTILINE)
    by_heading = dict(zip(sections[1::2], sections[2::2], strict=True))
    for name, field in KINDS[kind].model_fields.items():
        heading = GROUPS[0] if field.is_required() else belonging(field).group
        flag = "--option" if name == "options" else "--" + name.replace("_", "-")
        assert re.search(rf"^  {flag} ", by_heading[heading], re.MULTILINE), name


@pytest.mark.parametrize("words", EXAMPLES)
def test_an_example_is_a_command_line(words: str) -> None:
    program, *given = shlex.split(EXAMPLES[words].replace(" \\", " "))
    assert program == "eigenpress"
    group: Any = typer.main.get_command(cli.app)
    while given and given[0] in getattr(group, "commands", {}):
        group = group.commands[given.pop(0)]
    with group.make_context("eigenpress", given) as context:
        assert context.args == []


def test_a_long_command_line_is_broken_before_flags() -> None:
    lines = broken("eigenpress run --model m --kept 0.8 --calibration t", 28)
    assert lines == ["eigenpress run --model m \\", "  --kept 0.8 \\", "  --calibration t"]


def test_versions_are_said_in_one_line(call: Call) -> None:
    names = ("eigenpress", "torch", "transformers")
    said = ", ".join(f"{name} {version(name)}" for name in names)
    assert call("--version") == (0, f"{said}\n", "")


COMPLETED = {
    "eigenpress sto": {"store"},
    "eigenpress store v": {"verify"},
    "eigenpress run --recover-s": {"--recover-steps", "--recover-seed"},
    "eigenpress run --of ": {"compressible", "model"},
    "eigenpress run --compute b": {"bfloat16"},
    "eigenpress sweep --refresh re": {"realise", "recover"},
    "eigenpress run --method svd": {"svd", "svd_llm", "svd_llm_v2"},
    "eigenpress methods wan": {"wanda"},
    "eigenpress export --to ": {"dense", "vllm"},
    "eigenpress run --model ": set(),  # names of files are the shell's own
}


def test_a_shell_completes_words_without_torch() -> None:
    script = (
        "import os, sys\n"
        "from flows.commands import cli\n"
        "for line in sys.argv[1:]:\n"
        "    words = line.split(' ')\n"
        "    os.environ |= {'_EIGENPRESS_COMPLETE': 'complete_bash', 'COMP_WORDS': line,"
        " 'COMP_CWORD': str(len(words) - 1)}\n"
        "    sys.argv = ['eigenpress']\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        "    print('---')\n"
        "print(sorted({'torch', 'prefect', 'mlflow'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *COMPLETED],
        capture_output=True,
        text=True,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        check=True,
    )
    *offered, heavy = done.stdout.split("---\n")
    assert [set(lines.split()) for lines in offered] == list(COMPLETED.values())
    assert heavy == "[]\n"


def test_the_names_of_methods_are_those_of_their_files() -> None:
    assert method_names() == sorted(METHODS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "SVD-LLM"}, "unknown method 'SVD-LLM'. Did you mean 'svd_llm'?"),
        ({"method": "spargegpt"}, "unknown method 'spargegpt'. Did you mean 'sparsegpt'?"),
        (
            {"option": "updat=u"},
            "has no option 'updat'; its options: update, toward_dense, prefix, factors, metric, "
            "metric_damp, bits, code_group, rounding.",
        ),
        ({"option": "update=U2"}, "must be one of none, u; got 'U2'. Did you mean 'u'?"),
        ({"allocate": "Hul"}, "unknown allocator 'Hul'. Did you mean 'hull'?"),
        ({"of": "modle"}, "got 'modle'. Did you mean 'model'?"),
        ({"compute": "bf16"}, "got 'bf16'. Did you mean 'bfloat16'?"),
        ({"recover": "lorra"}, "got 'lorra'. Did you mean 'lora'?"),
        ({"products": "flot64"}, "got 'flot64'. Did you mean 'float64'?"),
        ({"refresh": "colect"}, "got 'colect'. Did you mean 'collect'?"),
        ({"refresh": "learn,materialize"}, "got 'materialize'. Did you mean 'materialise'?"),
        (
            {"calibraton": "a.txt"},
            "No such option: --calibraton (Possible options: --calibration, ",
        ),
    ],
)
def test_an_unknown_word_gets_the_nearest(
    changes: dict[str, Any], message: str, inputs: pico.Inputs, refuse: Refuse
) -> None:
    assert message in refuse(*words_of(inputs, **changes))


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["swep"], "'sweep'"),
        (["store", "veryfy"], "'verify'"),
        (["methods", "adasvd"], "'ada_svd'"),
        (["methods", "Hul"], "'hull'"),
    ],
)
def test_an_unknown_command_gets_the_nearest(
    words: list[str], nearest: str, refuse: Refuse
) -> None:
    assert f"Did you mean {nearest}?" in refuse(*words)


def test_an_unknown_setting_of_a_file_gets_the_nearest(refuse: Refuse, tmp_path: Any) -> None:
    (tmp_path / "a.yaml").write_text("model: m\nkept: 0.5\nbatch-sise: 3\n")
    line = refuse("run", "--config", "a.yaml")
    assert "there is no setting called 'batch-sise'. Did you mean 'batch_size'?" in line


@pytest.mark.parametrize("name", [*METHODS, *ALLOCATORS])
def test_one_method_is_shown_in_full(name: str, call: Call) -> None:
    code, out, err = call("methods", name)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    options = option_defaults(name) if name in METHODS else {}
    assert all(re.search(rf"^  {option}(=| )", out, re.MULTILINE) for option in options)
    assert f" {name} " in " ".join(out.partition("Example:")[2].split())


def test_every_option_of_the_list_says_what_it_is(call: Call) -> None:
    _, out, _ = call("methods")
    said = re.findall(r"^  (\w+)(?:=\S*)?(?:\n)? +(\S+.*)$", out, re.MULTILINE)
    expected = [option for name in METHODS for option in option_defaults(name)]
    assert [option for option, _ in said][: len(expected)] == expected
