"""Refusals of values that are no value whatever the setting: empty, unprintable, too long."""

import os
import re
import reprlib
import unicodedata
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError

LONGEST_NAME = 255  # bytes of one name on every file system of note
LONGEST_PATH = 4096  # bytes that Linux takes; others take fewer
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of pairs, ends of lines


def check_value(name: str, value: Any, *, boolean: bool) -> None:
    """Refuses what can be no value of any setting.

    Args:
        name: The setting.
        value: What was given: a number, a word, or a list or a mapping of them.
        boolean: Whether the setting itself, or one of its options, may be true or false.

    Raises:
        ConfigError: A word is empty, unprintable or too long, or a truth is where none belongs.
    """
    if isinstance(value, bool) and not boolean:
        raise ConfigError(f"{name}: {value} is no value of it; a word like {value} goes in quotes")
    if isinstance(value, str | Path):
        check_word(name, value)
    elif isinstance(value, list | tuple):
        for item in value:
            check_value(name, item, boolean=boolean)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_value(name, key, boolean=boolean)
            check_value(f"{name} {key}", item, boolean=boolean)


def check_word(name: str, value: str | Path) -> None:
    """Refuses a word or a path that can be neither.

    Args:
        name: Whose value it is, for the message.
        value: The word or path.

    Raises:
        ConfigError: It is empty, unprintable, too long, or in the home of a user who is not there.
    """
    text = str(value)
    if not text.strip():
        raise ConfigError(f"{name} {text!r} is empty: leave it out, or give a value")
    odd = next((sign for sign in text if unicodedata.category(sign) in CONTROL), None)
    if odd is not None:
        what = "a byte that is not UTF-8" if "\udc80" <= odd <= "\udcff" else "a control character"
        raise ConfigError(f"{name} holds {what} ({odd!a}): give it without")
    separators = "/" if isinstance(value, Path) else "[/:]"  # options of a method stand behind ':'
    longest = max(len(os.fsencode(part)) for part in re.split(separators, text))
    if longest > LONGEST_NAME or len(os.fsencode(text)) > LONGEST_PATH:
        raise ConfigError(
            f"{name} is too long: a name has at most {LONGEST_NAME} bytes and all of it "
            f"{LONGEST_PATH:,}, got {reprlib.repr(text)}"
        )
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        raise ConfigError(f"{name} {text}: there is no user {text[1:].partition('/')[0]!r} here")


def path_of(name: str, text: str) -> Path:
    """The path that was given as a word, with ``~`` resolved.

    Raises:
        ConfigError: As :func:`check_word`.
    """
    check_word(name, text)
    check_word(name, Path(text))
    return Path(text).expanduser()
