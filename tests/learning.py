"""A tiny model with all that a learner is given, made in memory."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from compress_core.decompose import Decomposer, ProjectOutputs
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.learn.base import Assignment, Atoms, Chosen, Learned, Learner, pick
from compress_core.learn.loop import Training
from compress_core.learn.teacher import Teacher, teach
from compress_core.methods import METHODS
from compress_core.metric import Plain
from compress_core.types import LayerRef, ModelLayout
from tests.families import tiny_model, token_batch


class Stopped(Exception):
    """What kills a training in a test."""


class Memory:
    """Checkpoints in memory; stops the training at a step if asked to."""

    def __init__(self, stop: int | None = None) -> None:
        self.saved: dict[str, Tensor] | None = None
        self.stop = stop

    def load(self) -> dict[str, Tensor] | None:
        return None if self.saved is None else {n: t.clone() for n, t in self.saved.items()}

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}

    def progress(self, done: int, total: int, detail: str) -> None:
        if done == self.stop:
            self.stop = None
            raise Stopped


@dataclass(frozen=True)
class Lesson:
    """The model, its layers' atoms, the text, and what the dense model says of it."""

    model: Callable[[], Any]
    """A fresh copy of the dense model."""
    layout: ModelLayout
    atoms: dict[str, Atoms]
    windows: Tensor
    teacher: Teacher

    def learn(
        self, learner: Learner, kept: float, memory: Memory | None = None, seed: int = 0
    ) -> Learned:
        """Trains, again and again where it is stopped."""
        memory = memory or Memory()
        while True:
            try:
                return learner.learn(self.assignment(learner, kept, memory, seed))
            except Stopped:
                continue

    def assignment(
        self, learner: Learner, kept: float, memory: Memory | None = None, seed: int = 0
    ) -> Assignment:
        """What a learner is given, with a model of its own."""
        memory = memory or Memory()
        training = Training(
            self.windows, "cpu", learner.batch, seed, checkpoints=memory, progress=memory.progress
        )
        return Assignment(self.model(), self.layout, self.read, kept, self.teacher, training)

    def read(self, layer: LayerRef) -> Atoms:
        """A layer's atoms."""
        return self.atoms[layer.name]

    def cost(self, learned: Learned) -> int:
        """Numbers stored for all layers."""
        return sum(learned.chosen[layer.name].cost(layer) for layer in self.layout.layers)

    @property
    def dense_cost(self) -> int:
        """Numbers of all dense weights."""
        return sum(layer.dense_cost for layer in self.layout.layers)

    def compressed(self, chosen: Mapping[str, Chosen]) -> Any:
        """The dense model with the weights and biases that were chosen."""
        model = self.model()
        for layer in self.layout.layers:
            factors = pick(self.atoms[layer.name], chosen[layer.name])
            if factors is None:
                continue
            module: Any = model.get_submodule(layer.name)
            weight = factors.dense()
            module.weight.data = weight.T.contiguous() if layer.transposed else weight
            if factors.bias is not None:
                bias = factors.bias if module.bias is None else module.bias + factors.bias
                module.bias = torch.nn.Parameter(bias.detach())
        return model


def shortened(method: str) -> str:
    """The variant of a method that trains in few steps: each option that counts them set to 8.

    Such an option is an int above 8 that is called ``steps``, ``iterations`` or ``phase1``,
    ``phase2`` and so on.
    """
    short = [method]
    for name, parameter in inspect.signature(METHODS[method]).parameters.items():
        counts = name in ("steps", "iterations") or name.removeprefix("phase").isdigit()
        if counts and type(parameter.default) is int and parameter.default > 8:
            short.append(f"{name}=8")
    return ":".join(short)


def few_turns(method: str) -> str:
    """The variant of a method that takes two turns where its default is more of them.

    For what does not hang on their number; golden values are those of the default.
    """
    name = method.partition(":")[0]
    turns = inspect.signature(METHODS[name]).parameters.get("turns")
    return f"{method}:turns=2" if turns is not None and turns.default > 2 else method


def same(one: Learned, other: Learned) -> bool:
    """Whether two trainings came to the same end on the same way."""

    return (
        all(one.chosen[name].same(other.chosen[name]) for name in one.chosen)
        and all(
            torch.equal(one.curves[name].nan_to_num(), other.curves[name].nan_to_num())
            for name in one.curves
        )
        and one.report == other.report
    )


def dense_weight(model: Any, layer: LayerRef) -> Tensor:
    """(out, in), however the model stores it."""
    weight: Tensor = model.get_submodule(layer.name).weight.detach()
    return weight.T if layer.transposed else weight


@cache
def lesson(family: str = "llama", decomposer: Decomposer | None = None, samples: int = 8) -> Lesson:
    """Random weights, random text; decomposed without statistics."""
    decomposer = decomposer or ProjectOutputs(whole=True)
    return prepare_lesson(lambda: tiny_model(family), decomposer, token_batch(5, samples, 16))


def prepare_lesson(make: Callable[[], Any], decomposer: Decomposer, windows: Tensor) -> Lesson:
    """Decomposes the model without statistics, and asks it about the text."""
    model = make()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        layout = inspect_model(Checkpoint(Path(folder)))
    atoms = {}
    for layer in layout.layers:
        weight = dense_weight(model, layer)
        found = decomposer.prepare(weight, Plain(), min(weight.shape))
        ut, v = found.arrays["ut"], found.arrays["v"]
        energy = (found.loss[:-1] - found.loss[1:])[: len(ut)]
        atoms[layer.name] = Atoms(ut, v, energy, found.sparse)
    teacher = teach(model, windows, 24, batch_size=4, device="cpu")
    return Lesson(make, layout, atoms, windows, teacher)
