"""How a method's parts (frozen dataclasses) enter a recipe beside their code: by their fields."""

import dataclasses
from typing import Any


def describe(component: Any) -> dict[str, Any]:
    """The kind and the fields of a frozen dataclass, as JSON; fields may be such ones, too."""
    fields = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    fields = {n: describe(v) if dataclasses.is_dataclass(v) else v for n, v in fields.items()}
    return {"kind": type(component).__name__, **fields}
