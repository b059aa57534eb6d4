"""How every command's help looks, and what a command line is refused for whatever it asks.

Settings stand under the headings that their fields name, in 80 columns, nothing cut; an example
ends the page.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from flows.settings.belonging import GROUPS, MACHINE, OUTPUT
from flows.settings.fields import Fields
from flows.settings.words import path_of

ARGUMENTS, OTHERS, ALL = "Arguments", "General", "Options"
FEW = 6  # flags that need no headings
WIDEST = 26  # columns of a flag and its value; a longer one has its text on the next line
UsageError: Any = typer.BadParameter.__base__  # which module it is in depends on typer's version

EXAMPLES = {
    "run": "eigenpress run --model ./my-llama --kept 0.3 --calibration texts.jsonl",
    "sweep": "eigenpress sweep --model ./my-llama --methods svd,svd_llm --kept 0.8,0.6 "
    "--calibration texts.jsonl",
    "plan": "eigenpress plan --model ./my-llama --kept 0.3 --calibration texts.jsonl",
    "methods": "eigenpress methods svd_llm",
    "report": "eigenpress report my-llama/3 --output report.html",
    "bench": "eigenpress bench my-llama@champion --batch 1,8 --prompt-tokens 128",
    "export": "eigenpress export ./my-llama-small --to dense --output ./my-llama-again",
    "push": "eigenpress push ./my-llama-small --to me/my-llama-small --dry-run",
    "promote": "eigenpress promote my-llama --version 3 --gates gates.yaml",
    "rollback": "eigenpress rollback my-llama --why 'loops in the chat'",
    "history": "eigenpress history my-llama",
    "serve": "eigenpress serve my-llama@champion --follow --port 8000",
    "up": "eigenpress up --home /data/eigenpress",
    "deploy": 'eigenpress deploy nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin',
    "demo": "eigenpress demo --home /tmp/eigenpress",
    "store": "eigenpress store ls",
    "store ls": "eigenpress store ls --stage collect",
    "store show": "eigenpress store show 7d3f09ab",
    "store why": "eigenpress store why 7d3f09ab",
    "store verify": "eigenpress store verify",
    "store gc": "eigenpress store gc --dry-run --recent-days 30",
}
"""Of every command, by its words, as help lists them; the program as a whole has that of `run`."""


class _Page:
    """Help in one style: flags under headings, then commands, then an example."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        parameters = self.get_params(ctx)  # type: ignore[attr-defined]
        for parameter in parameters:
            if parameter.param_type_name == "argument":
                row = (parameter.metavar, parameter.help)
                sections.setdefault(ARGUMENTS, []).append(row)
            elif record := parameter.get_help_record(ctx):
                group = parameter.rich_help_panel or OTHERS
                group = ALL if len(parameters) <= FEW else group
                sections.setdefault(group, []).append((record[0], _plain(record[1])))
        cells = [len(cell) for rows in sections.values() for cell, _ in rows]
        width = max(cell for cell in cells if cell <= WIDEST)
        for heading in (ARGUMENTS, *GROUPS, OTHERS, ALL):
            if heading in sections:
                with formatter.section(heading):
                    rows = [(cell.ljust(width), text) for cell, text in sections[heading]]
                    formatter.write_dl(rows, col_max=WIDEST)
        if commands := getattr(self, "commands", {}):
            path = ctx.command_path.partition(" ")[2]
            listed = sorted(commands, key=lambda n: list(EXAMPLES).index(f"{path} {n}".strip()))
            with formatter.section("Commands"):
                formatter.write_dl([(n, _first_sentence(commands[n].help)) for n in listed])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = ["[OPTIONS]"]
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            if parameter.param_type_name == "argument":
                pieces.append(parameter.metavar if parameter.required else f"[{parameter.metavar}]")
        return pieces + (["COMMAND [ARGS]..."] if hasattr(self, "commands") else [])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        example = EXAMPLES[ctx.command_path.partition(" ")[2] or "run"]
        with formatter.section("Example"):
            formatter.write("".join(f"  {line}\n" for line in broken(example, formatter.width - 2)))


class Command(_Page, TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses a flag that is there twice and takes one value: which one counts nobody sees."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, times in Counter(order).items():
                if times > 1 and parameter.param_type_name == "option" and not parameter.multiple:
                    raise UsageError(f"{parameter.opts[0]} is there twice; give it once", ctx=ctx)
        return super().parse_args(ctx, args)


class Group(_Page, TyperGroup):
    """A command with commands of its own."""


class App(typer.Typer):
    """A command line in which every command looks so."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=Group,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,  # its boxes leave a quarter of the line to the descriptions
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """As typer's."""
        return super().command(name, cls=Command, **settings)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _plain(text: str) -> str:
    """A flag's text as we write them; typer's own begin with a capital and end with a stop."""
    return (text[:1].lower() if text[1:2].islower() else text[:1]) + text[1:].removesuffix(".")


def broken(command: str, width: int) -> list[str]:
    """A command line on as many lines as it takes, broken before flags."""
    lines = [""]
    for part in command.replace(" --", "\n--").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}".strip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return lines


def _folder(name: str) -> Any:
    def parse(text: str) -> Path:
        try:
            return path_of(name, text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def path_option(name: str, text: str, word: str = "DIR", group: str = OUTPUT) -> Any:
    """A flag that takes a path, for commands that have no settings."""
    flag = f"--{name}"
    return typer.Option(flag, help=text, metavar=word, parser=_folder(name), rich_help_panel=group)


def path_argument(text: str, word: str = "DIR") -> Any:
    """A path that a command cannot do without."""
    return typer.Argument(help=text, metavar=word, parser=_folder(word))


def said(text: str, word: str | None, group: str = OTHERS, flag: str | None = None) -> Any:
    """A flag of a command that has no settings; ``flag`` where its name alone does not say it."""
    words = () if flag is None else (flag,)
    return typer.Option(*words, help=text, metavar=word, rich_help_panel=group)


Home = Annotated[
    Path | None,
    path_option("home", Fields.model_fields["home"].description or "", group=MACHINE),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="print JSON on stdout and nothing else there", rich_help_panel=OUTPUT
    ),
]
