"""Lines of text that fit the width there is."""

import textwrap

from rich.console import Console

from compress_core.secrets import hide

WIDTH = 80  # where there is no terminal to ask
HEAD = 13  # a line's first word and the blanks behind it


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console of the terminal's width; of a page's where there is no terminal."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def say(console: Console, line: str, indent: int = 0) -> None:
    """A line, broken between words where it is too long; words (paths, names) stay whole."""
    lines = textwrap.wrap(
        hide(line),
        console.width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    for part in lines or [""]:
        console.print(part, markup=False)


def entry(console: Console, head: str, body: str, indent: int = HEAD) -> None:
    """A line that begins with a word for what it is about; it goes on below its body."""
    say(console, f"{head:<{HEAD - 1}} {body}", indent)


def duration(seconds: float) -> str:
    """A time in two units at most: "40 s", "3 min 20 s", "12 min", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min" + (f" {rest} s" if rest and minutes < 10 else "")
    hours, rest = divmod(whole // 60, 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")


def size(nbytes: float) -> str:
    """Memory in three digits: "812 MB", "1.23 GB", "12.3 GB"."""
    if nbytes < 999.5e6:
        return f"{nbytes / 1e6:.0f} MB"
    giga = nbytes / 1e9
    return f"{giga:.{2 if giga < 10 else 1 if giga < 100 else 0}f} GB"
