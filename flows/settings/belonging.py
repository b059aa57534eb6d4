"""What a setting says about itself besides its type and range: where it stands and who reads it.

Both are part of the field. Help, the refusal of what nothing reads and shell completion are made of
them, so that a new setting is one field and nothing else.
"""

from dataclasses import dataclass

from pydantic.fields import FieldInfo

GROUPS = (
    REQUIRED := "Required",  # never said of a field: those without a default are in it
    TEXT := "Model and text",
    BUDGET := "Budget",
    METHOD := "Method",
    TRAINING := "Training",
    EVALUATION := "Evaluation",
    OUTPUT := "Output",
    MACHINE := "Machine",
)
"""Headings of ``--help``, in their order."""

METHOD_WORD = "METHOD"
"""Stands in help for the name of a method, which the shell completes."""


@dataclass(frozen=True)
class Belongs:
    """Annotation of a field.

    Attributes:
        group: One of ``GROUPS``: the heading under which its flag stands.
        reader: What reads the setting, a key of ``flows.settings.idle.READERS``; "" for what every
            command reads.
        word: What stands for its value in help: FILE, NAME; "" for the word of its type.
    """

    group: str
    reader: str = ""
    word: str = ""


def belonging(field: FieldInfo) -> Belongs:
    """The annotation of a field; every setting has one."""
    return next(entry for entry in field.metadata if isinstance(entry, Belongs))
