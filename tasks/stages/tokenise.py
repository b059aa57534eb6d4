"""Stage ``tokenise``: text to token windows, for calibration and for evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_core.hf.documents import read_documents
from compress_core.hf.text import (
    evaluation_windows,
    load_tokenizer,
    sample_windows,
    split_held_out,
)
from storage.digests import DigestCache, file_digest
from storage.keys import recipe_key
from tasks.engine.cost import Cost
from tasks.engine.dense_model import DenseModel
from tasks.engine.session import Group, Work
from tasks.engine.units import Unit
from tasks.stages.arrays import put_tensor

TEXT = "text"  # kind of the digests of files that only this stage reads


@dataclass(frozen=True)
class Text:
    """A text and which part of it is meant.

    Attributes:
        source: Local file or dataset id.
        field: Column that holds the text, or None for the usual one.
        part: "all", "calibration" (all but the held-out tenth) or "held-out".
    """

    source: str
    field: str | None = None
    part: str = "all"

    @property
    def label(self) -> str:
        """What people see."""
        name = Path(self.source).name
        return name if self.part != "held-out" else f"{name} (held-out tenth)"

    @property
    def format(self) -> str:
        """What decides how the bytes are read: the suffix of a file, or "dataset"."""
        path = Path(self.source).expanduser()
        return path.suffix.lower() if path.is_file() else "dataset"

    def documents(self, model: DenseModel) -> list[str]:
        """Reads the text.

        Raises:
            TextError: It cannot be read.
        """
        documents = read_documents(self.source, self.field, tokenizer=model.tokenizer)
        if self.part == "all":
            return documents
        return split_held_out(documents)[0 if self.part == "calibration" else 1]

    def digest(self, model: DenseModel, digests: DigestCache) -> str:
        """Content of the whole source."""
        path = Path(self.source).expanduser()
        if path.is_file():
            return digests.of(path, TEXT, lambda f: {"": file_digest(f)})[""]
        documents = read_documents(self.source, self.field, tokenizer=model.tokenizer)
        return recipe_key({"documents": documents})


def calibration_group(
    model: DenseModel,
    text: Text,
    digests: DigestCache,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: bool,
) -> Group:
    """Windows of ``length`` tokens drawn at random places of the calibration text."""
    how = {"samples": samples, "length": length, "seed": seed, "bos": bos}
    unit = Unit(
        "tokenise",
        "calibration",
        settings=how | {"part": text.part, "field": text.field, "format": text.format},
        code=[load_tokenizer, sample_windows],
        sources={"text": text.digest(model, digests), "tokenizer": model.tokenizer_digest},
        cost=Cost(disk=samples * length * 8),
    )
    return Group("tokenise", "calibration", [unit], _Windows(model, text, sample_windows, how))


def evaluation_group(
    model: DenseModel, text: Text, digests: DigestCache, *, length: int, windows: int | None
) -> Group:
    """Consecutive windows of an evaluation text."""
    how = {"length": length, "windows": windows}
    unit = Unit(
        "tokenise",
        f"evaluation on {text.label}",
        settings=how | {"part": text.part, "field": text.field, "format": text.format},
        code=[load_tokenizer, evaluation_windows],
        sources={"text": text.digest(model, digests), "tokenizer": model.tokenizer_digest},
        cost=Cost(disk=(windows or 0) * length * 8),
    )
    return Group("tokenise", unit.name, [unit], _Windows(model, text, evaluation_windows, how))


class _Windows:
    """Reads a text and cuts it into windows of tokens."""

    def __init__(
        self, model: DenseModel, text: Text, cut: Callable[..., Tensor], settings: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.text = text
        self.cut = cut
        self.settings = settings

    def __call__(self, work: Work) -> None:
        documents = self.text.documents(self.model)
        windows = self.cut(documents, self.model.tokenizer, **self.settings)
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", windows)
