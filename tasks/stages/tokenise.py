"""Stage ``tokenise``: text to token windows, for calibration and for evaluation."""

from dataclasses import dataclass
from pathlib import Path

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
from tasks.engine.session import Work
from tasks.engine.units import Group, Unit
from tasks.stages.arrays import put_tensor


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
            return digests.of(path, "file", lambda f: {"": file_digest(f)})[""]
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
    unit = Unit(
        "tokenise",
        "calibration",
        settings={"samples": samples, "length": length, "seed": seed, "bos": bos}
        | {"part": text.part, "field": text.field, "format": text.format},
        code=[load_tokenizer],
        sources={"text": text.digest(model, digests), "tokenizer": model.tokenizer_digest},
        cost=Cost(disk=samples * length * 8),
    )
    return Group("tokenise", "calibration", [unit], _Sample(model, text, unit))


def evaluation_group(
    model: DenseModel, text: Text, digests: DigestCache, *, length: int, windows: int | None
) -> Group:
    """Consecutive windows of an evaluation text."""
    unit = Unit(
        "tokenise",
        f"evaluation on {text.label}",
        settings={"length": length, "windows": windows}
        | {"part": text.part, "field": text.field, "format": text.format},
        code=[load_tokenizer],
        sources={"text": text.digest(model, digests), "tokenizer": model.tokenizer_digest},
        cost=Cost(disk=(windows or 0) * length * 8),
    )
    return Group("tokenise", unit.name, [unit], _Consecutive(model, text, unit))


class _Sample:
    def __init__(self, model: DenseModel, text: Text, unit: Unit) -> None:
        self.model = model
        self.text = text
        self.settings = unit.settings

    def __call__(self, work: Work) -> None:
        windows = sample_windows(
            self.text.documents(self.model),
            self.model.tokenizer,
            **{name: self.settings[name] for name in ("samples", "length", "seed", "bos")},
        )
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", windows)


class _Consecutive:
    def __init__(self, model: DenseModel, text: Text, unit: Unit) -> None:
        self.model = model
        self.text = text
        self.settings = unit.settings

    def __call__(self, work: Work) -> None:
        windows = evaluation_windows(
            self.text.documents(self.model),
            self.model.tokenizer,
            **{name: self.settings[name] for name in ("length", "windows")},
        )
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", windows)
