"""Stage ``train``: the demonstration's model, for a machine that has none.

A small Llama learns the standard library's documentation and sources; it is cached like any
other stage.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from compress_core.hf.pretrain import PretrainSettings, pretrain
from compress_core.hf.python_docs import gather_python_text
from storage.artifact import Artifact
from storage.keys import recipe_key
from tasks.engine.cost import Cost
from tasks.engine.dense_model import FOLDER
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.materialise import publish

TEXTS = ("calibration.jsonl", "evaluation.jsonl")


def train_group(settings: PretrainSettings) -> Group:
    """The one unit that trains the model and keeps it with its calibration and evaluation text."""
    train, *others = gather_python_text(settings.max_characters, settings.seed)
    unit = Unit(
        "train",
        "python-llama",
        settings=asdict(settings),
        code=[gather_python_text],
        sources={"text of the standard library": recipe_key({"parts": [train, *others]})},
        cost=Cost(disk=40_000_000),
    )
    return Group("train", "python-llama", [unit], _Pretrain(settings, train, others))


class _Pretrain:
    def __init__(
        self, settings: PretrainSettings, train: Sequence[str], others: Sequence[Sequence[str]]
    ) -> None:
        self.settings = settings
        self.train = train
        self.others = others

    def __call__(self, work: Work) -> None:
        with work.draft(work.missing[0]) as draft:
            pretrain(self.train, draft.add_file(FOLDER), self.settings, progress=work.progress)
            for name, documents in zip(TEXTS, self.others, strict=True):
                write_documents(draft.add_file(name), documents)


def write_documents(file: Path, documents: Sequence[str]) -> None:
    """A JSON record with a ``text`` per line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    file.write_text("".join(lines), encoding="utf-8")


def publish_trained(artifact: Artifact, target: Path) -> None:
    """Puts the model at ``target/python-llama`` and its two texts beside it."""
    target.mkdir(parents=True, exist_ok=True)
    publish(artifact, target / "python-llama")
    for name in TEXTS:
        (target / name).write_bytes(artifact.file(name).read_bytes())
