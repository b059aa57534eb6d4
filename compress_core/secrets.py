"""What must not be printed, logged or recorded: passwords and tokens in addresses and messages."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# Ends of names of environment variables, and parts of names of an address's parameters, whose value
# is a secret. (PWD is where somebody stands, and CREDENTIALS are a file.)
_VARIABLES = "token|password|passwd|secret|api_?key|access_?key|auth_string"
_PARAMETERS = f"{_VARIABLES}|pwd|signature|sig|credential"
_VARIABLE = re.compile(rf"(?:^|_)(?:{_VARIABLES})s?$", re.IGNORECASE)
_SHORTEST = 6  # of a variable's value: shorter ones are found in any text

_PATTERNS = (
    # user:password@ of an address. A "/" before the "@" is the password's only where a ":" that
    # begins no port comes first; else it is a path, and paths have an "@" of their own.
    (re.compile(r"(?<=://)(?:[^\s/@:'\"]*:(?!\d+/)[^\s'\"]+|[^\s/'\"]+)@"), f"{HIDDEN}@"),
    # ?token=..., &X-Amz-Signature=..., and a whole connection string of a database
    (
        re.compile(rf"([?&#](?:[\w.%-]*?(?:{_PARAMETERS})[\w.%-]*|odbc_connect)=)[^&\s'\"]+", re.I),
        rf"\1{HIDDEN}",
    ),
    # An authorisation header as exceptions and logs show it
    (
        re.compile(r"(authorization\W{1,5}(?:basic|bearer)\s+)[^\s'\"]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    # Tokens that say what they are: HuggingFace, Prefect Cloud, Databricks, GitHub
    (re.compile(r"\b(hf_|pn[ub]_|dapi|gh[pousr]_)[A-Za-z0-9]{16,}"), rf"\1{HIDDEN}"),
)


def hide(text: str) -> str:
    """The text without the secrets in it: for messages, logs, records, and whatever is shown.

    Passwords and tokens in addresses, tokens that say what they are, and what the environment holds
    of both (values of variables whose names end in TOKEN, PASSWORD, API_KEY and the like; passwords
    of addresses) become ``***``. Text without them comes back as it was, and hiding twice changes
    nothing more.

    Args:
        text: Anything that may hold an address or a message of a library.
    """
    return _hide(text, tuple(_of_environment()))


def hide_all(value: Any) -> Any:
    """As `hide`, of every text inside lists and mappings: for what is kept as JSON or YAML."""
    return _hide_all(value, tuple(_of_environment()))


def _hide(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _hide_all(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _hide(value, secrets)
    if isinstance(value, dict):
        return {name: _hide_all(inner, secrets) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_all(inner, secrets) for inner in value]
    return value


def _of_environment() -> Iterator[str]:
    """Secrets that a library may show out of their address, as they are written and decoded."""
    for name, value in os.environ.items():
        user = value.partition("://")[2].rpartition("@")[0]
        secret = value if _VARIABLE.search(name) else user.partition(":")[2]
        if re.match(r"\d+/", secret):
            continue  # a port, and the "@" is in the path behind it
        for form in {secret, unquote(secret)}:
            if len(form) >= _SHORTEST:
                yield form
