"""A real model of a few thousand weights with its own tokenizer and text, and ways to run it.

`walk` runs the stages of a configuration without Prefect and MLflow, which is all that most facts
about caching need; `run` is what the command line calls.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from flows.runs.budget import resolve_budget
from flows.runs.pipeline import Pipeline, build_pipeline
from flows.runs.workspace import open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig
from storage.store import Store
from tasks.engine.dense_model import FOLDER
from tasks.engine.session import Session
from tasks.engine.units import Outcome, Unit
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 3
UNITS = {  # units of each stage of a cold svd_llm run, by the shape of a Llama block
    "tokenise": 2,
    "collect": (4 + 1) * BLOCKS,  # its inputs, and the cosine over the block as a whole
    "weigh": 4 * BLOCKS,
    "decompose": 7 * BLOCKS,
    "allocate": 1,
    "realise": 7 * BLOCKS,
    "materialise": 1,
    "evaluate": 2,
}


@dataclass(frozen=True)
class Inputs:
    """A dense model and the two texts."""

    model: Path
    calibration: Path
    evaluation: Path

    def settings(self, home: Path, **changes: Any) -> dict[str, Any]:
        """Values of a RunConfig of `svd_llm`, or of a SweepConfig, that take a moment."""
        return {
            **({} if "methods" in changes else {"method": "svd_llm"}),
            "model": str(self.model),
            "calibration": str(self.calibration),
            "eval_text": [str(self.evaluation)],
            "kept": 0.6,
            "samples": 12,
            "length": 48,
            "eval_windows": 5,
            "device": "cpu",
            "home": home,
            **changes,
        }


def made_text(seed: int, words: int) -> str:
    """Sentences of made words, some of them frequent."""
    generator = random.Random(seed)
    known = ["".join(generator.choices("aeioubdklmnrst", k=1 + i % 6)) for i in range(80)]
    weights = [1 / (1 + i) for i in range(80)]
    lines = (
        " ".join(generator.choices(known, weights, k=9)).capitalize() + "."
        for _ in range(words // 9)
    )
    return "\n".join(lines)


def llama(vocabulary: int, blocks: int = BLOCKS) -> PreTrainedConfig:
    """Grouped queries, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )


def gpt2(vocabulary: int, blocks: int = BLOCKS) -> PreTrainedConfig:
    """Transposed weights, fused q, k, v, biases, tied embeddings."""
    return GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=blocks,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )


def make_inputs(
    folder: Path, seed: int = 0, config: Callable[[int], PreTrainedConfig] = llama
) -> Inputs:
    """A random model, and a tokenizer trained on its text.

    Args:
        folder: Where all of it goes.
        seed: Of the weights.
        config: Makes the model's configuration from the size of the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(folder / "pico", folder / "calibration.txt", folder / "evaluation.txt")
    inputs.calibration.write_text(made_text(1, 4000), encoding="utf-8")
    inputs.evaluation.write_text(made_text(2, 2000), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train([str(inputs.calibration)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config(len(fast))).save_pretrained(inputs.model)
    fast.save_pretrained(inputs.model)
    return inputs


def copy_inputs(inputs: Inputs, folder: Path) -> Inputs:
    """The same model and texts elsewhere, to be changed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(inputs.model, folder / "pico")
    for text in (inputs.calibration, inputs.evaluation):
        shutil.copyfile(text, folder / text.name)
    return Inputs(
        folder / "pico", folder / inputs.calibration.name, folder / inputs.evaluation.name
    )


def change_weight(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrites one tensor of a model folder."""
    file = model / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name] = change(tensors[name]).contiguous()
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@dataclass
class Walk:
    """What became of every unit of a run without Prefect and MLflow."""

    pipeline: Pipeline
    session: Session
    outcomes: list[Outcome]
    problems: list[str]

    @property
    def computed(self) -> dict[str, set[str]]:
        """Stage to the names of the units that were computed."""
        found: dict[str, set[str]] = {}
        for outcome in self.outcomes:
            if outcome.state == "computed":
                found.setdefault(outcome.stage, set()).add(outcome.unit)
        return found

    @property
    def folder(self) -> Path:
        """The compressed model folder, in the store."""
        return Path(self.session.artifact(self.pipeline.folder).file(FOLDER))

    @property
    def keys(self) -> dict[tuple[str, str], str]:
        """(stage, unit) to key."""
        return {(outcome.stage, outcome.unit): outcome.key for outcome in self.outcomes}

    @property
    def digests(self) -> dict[tuple[str, str], str]:
        """(stage, unit) to content digest."""
        return {(u.stage, u.name): m.digest for u, m in self.session.manifests.items()}

    def names(self, stage: str) -> set[str]:
        """The units of a stage."""
        return {unit.name for unit in self.session.manifests if unit.stage == stage}

    def metrics(self) -> dict[str, Any]:
        """The first text's metrics of the compressed model."""
        last = self.pipeline.evaluations[-1]
        assert last.model == "compressed"
        return dict(self.session.artifact(last.unit).attrs)


def build(settings: Mapping[str, Any]) -> tuple[Pipeline, Store, list[str]]:
    """The groups of a run, after the checks that the command line makes."""
    config = RunConfig(**settings)
    check_methods(config, [config.method], [config.kept] if config.kept else [])
    workspace = open_workspace(config)
    pipeline = build_pipeline(workspace, resolve_budget(workspace, config))
    return pipeline, workspace.store, workspace.notes


def walk(settings: Mapping[str, Any]) -> Walk:
    """Runs every stage but the registration."""
    pipeline, store, problems = build(settings)
    session = Session(store, refresh=RunConfig(**settings).refresh)
    outcomes = [outcome for group in pipeline.groups for outcome in session.run(group)]
    return Walk(pipeline, session, outcomes, problems)


def allocation_of(pipeline: Pipeline) -> Unit:
    """The ``allocate`` unit of a method that does not learn its shares."""
    assert isinstance(pipeline.allocation, Unit)
    return pipeline.allocation


def counts(stages: list[dict[str, Any]], state: str) -> dict[str, int]:
    """Stage to the number of its units in that state, of a result's ``stages``."""
    found: dict[str, int] = {}
    for stage in stages:
        if stage["state"] == state:
            found[stage["name"]] = found.get(stage["name"], 0) + 1
    return found


def tree(folder: Path) -> dict[str, str]:
    """Path to checksum, for every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def payload(store: Path) -> dict[str, str]:
    """As `tree`, of the arrays and files of all artifacts: what has no time and no host in it."""
    return {
        path: checksum
        for path, checksum in tree(store).items()
        if ("/arrays/" in path or "/files/" in path) and not path.startswith("tmp/")
    }


def artifact_folder(store: Path, stage: str, unit: str) -> Path:
    """The folder of the one artifact of a unit."""
    found = [
        file.parent
        for file in (store / stage).glob("*/*/manifest.json")
        if json.loads(file.read_text())["unit"] == unit
    ]
    assert len(found) == 1, found
    return found[0]


def scratch_left(store: Path) -> list[Path]:
    """What is left of hidden states between blocks."""
    return [path for path in (store / "scratch").glob("*/*") if path.is_dir()]


SERVER_WORDS = ("PREFECT_", "MLFLOW_", "AWS_", "EIGENPRESS_STORE", "NO_PROXY", "no_proxy")


def clean_environment(**more: str) -> dict[str, str]:
    """For a process that starts its own server, whatever runs in this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SERVER_WORDS)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """The process's environment, exchanged for a while."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def arguments(command: str, settings: Mapping[str, Any]) -> list[str]:
    """A command line with these settings as flags."""
    words = [sys.executable, "-c", "from flows.commands.cli import main; main()", *command.split()]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def start(words: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Starts a command line in a process of its own."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT), **more),
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """What a command that ends well prints as JSON, and what it says to people."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return dict(json.loads(out)), err


def register(home: Path, name: str, folders: list[Path]) -> None:
    """Makes each folder the next version of a name, all of one run, without any stage."""
    from tasks.tracking import client as tracking

    with environment(clean_environment()):
        nothing: dict[str, Any] = {"parameters": {}, "metrics": {}, "artifacts": {}, "tags": {}}
        run_id = tracking.record_run(home, experiment="tests", run_name="one", **nothing)
        for folder in folders:
            tracking.register_model(home, name=name, model_dir=folder, run_id=run_id, tags={})
