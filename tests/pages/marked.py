"""Parts of a page that are made: what stands between two marks is replaced, the rest is written."""

from pathlib import Path


def replaced(page: Path, name: str, text: str) -> str:
    """The page with ``text`` between its marks ``<!-- NAME: made by make docs -->`` and the end.

    Raises:
        ValueError: The marks are not there.
    """
    start, end = f"<!-- {name}: made by make docs -->\n\n", f"\n<!-- end of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page.name} lacks the marks of {name}")
    return before + start + text + end + after
