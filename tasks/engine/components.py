"""How a method's parts (frozen dataclasses) enter a recipe: by their fields and by their code."""

import dataclasses
from typing import Any


def describe(component: Any) -> dict[str, Any]:
    """The kind and the fields of a frozen dataclass, as JSON."""
    fields = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    return {"kind": type(component).__name__, **fields}


def code_of(component: Any) -> str:
    """Dotted name of the component's class."""
    return f"{type(component).__module__}.{type(component).__qualname__}"
