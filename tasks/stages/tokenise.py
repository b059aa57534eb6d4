"""Stage ``tokenise``: text to token windows, for calibration and for evaluation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_core.errors import ModelError, TextError
from compress_core.hf.documents import Documents, read_documents, source_files, source_format
from compress_core.hf.text import (
    check_vocabulary,
    evaluation_windows,
    first_refused,
    load_tokenizer,
    sample_windows,
    split_held_out,
)
from storage.digests import DigestCache, file_digest
from storage.keys import recipe_key
from tasks.engine.cost import Cost
from tasks.engine.dense_model import DenseModel
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import put_tensor

NOTES = "notes"  # what people should be told of a text, recorded with its windows
TEXT = "text"  # kind of the digests of files that only this stage reads


@dataclass(frozen=True)
class Text:
    """A text and which part of it is meant.

    Attributes:
        source: Local file or folder, or dataset id.
        field: Column that holds the text, or None for the usual one.
        part: "all", "calibration" (all but the held-out tenth) or "held-out".
        skip_bad_rows: How many rows that are no documents are left out, a count or a share.
        role: What it is for, as people read it: "calibration" or "evaluation".
        field_setting: What the user sets ``field`` with.
    """

    source: str
    field: str | None = None
    part: str = "all"
    skip_bad_rows: float = 0
    role: str = "evaluation"
    field_setting: str = "--eval-field"

    @property
    def label(self) -> str:
        """What people see."""
        name = Path(self.source).name
        return name if self.part != "held-out" else f"{name} (held-out tenth)"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which documents its bytes are."""
        with self._named():
            kind = source_format(self.source)
        return {
            "part": self.part,
            "field": self.field,
            "format": kind,
            "skip_bad_rows": self.skip_bad_rows,
        }

    def documents(self, model: DenseModel) -> Documents:
        """Reads the text; all of it, also where a part is meant.

        Raises:
            TextError: It cannot be read.
        """
        with self._named():
            return read_documents(
                self.source,
                self.field,
                tokenizer=model.tokenizer,
                skip_bad_rows=self.skip_bad_rows,
                field_setting=self.field_setting,
            )

    def windows(
        self, documents: Documents, tokenizer: Any, cut: Callable[..., Tensor], **how: Any
    ) -> Tensor:
        """The meant part of its documents, cut into windows.

        Raises:
            TextError: It is too short, or the tokenizer cannot encode it.
        """
        try:
            texts = documents.texts
            if self.part != "all":
                texts = split_held_out(texts)[0 if self.part == "calibration" else 1]
            return cut(texts, tokenizer, **how)
        except TextError as error:
            index = first_refused(documents.texts, tokenizer)
            place = "" if index is None else f" {documents.places[index]}".rstrip()
            raise TextError(f"{self.role} text {self.source}{place}: {error}") from error

    def digest(self, model: DenseModel, digests: DigestCache) -> str:
        """Content of the whole source."""
        with self._named():
            files = source_files(self.source)
        try:
            found = [digests.of(file, TEXT, lambda f: {"": file_digest(f)})[""] for file in files]
        except OSError as error:
            line = f"{self.role} text {self.source} cannot be read: {error.strerror}"
            raise TextError(line) from error
        if len(found) == 1:
            return found[0]
        if not found:
            return recipe_key({"documents": self.documents(model).texts})
        names = [file.name for file in files]
        return recipe_key({"files": [list(pair) for pair in zip(names, found, strict=True)]})

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Refusals of the source, which they begin with, say what it is for."""
        try:
            yield
        except TextError as error:
            raise TextError(f"{self.role} text {error}") from error


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
        settings=how | text.settings,
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
        settings=how | text.settings,
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
        tokenizer, text = self.model.tokenizer, self.text
        documents = text.documents(self.model)
        windows = text.windows(documents, tokenizer, self.cut, **self.settings)
        try:
            check_vocabulary(windows, tokenizer, self.model.config)
        except ModelError as error:
            raise ModelError(
                f"{self.model.folder} on {text.role} text {text.source}: {error}"
            ) from error
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", windows)
            draft.info[NOTES] = documents.notes
