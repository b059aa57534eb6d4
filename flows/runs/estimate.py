"""What a run or a sweep would take: seconds, memory and disk, by what its units cost."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flows.runs.forecast import Planned
from flows.runs.machine import Machine, known_machine
from flows.runs.schedule import Played, Processes, play
from flows.runs.workspace import LIBRARIES, Workspace, allowed_for_one
from flows.settings.checks import sharing_memory, workers_of
from flows.settings.threads import affinity, cores, cpu_quota
from tasks.engine.cost import MODEL, Cost
from tasks.engine.free_memory import free_memory
from tasks.engine.work import Group

UNIT_SECONDS = 0.02  # of a unit's key, its artifact and its place in the flow


@dataclass(frozen=True)
class Estimate:
    """What the units that may run will take, on this machine when it does nothing else.

    Attributes:
        seconds: In all, the start of the command, and of the processes that compute, aside.
        workers: How many processes compute.
        alone: Seconds of one process.
        stages: Stage to its part of those.
        memory: Peak bytes on the device of the process that takes most, the libraries aside.
        largest: What takes them.
        together: Peak bytes of all processes that share a memory, libraries and all.
        disk: Bytes that are added to the data directory: to the store, and copies of the models.
        models: Bytes of each compressed model's folder, ascending.
        free_memory: Bytes that the device still has.
        free_disk: Bytes that the data directory's disk still has.
        computes_in: Dtype of the models' products.
        not_counted: What may run too and has no estimate.
        allowed_memory: Bytes that --memory allows each process; None without it.
    """

    seconds: float
    workers: int
    alone: float
    stages: dict[str, float]
    memory: int
    largest: Planned | None
    together: int
    disk: int
    models: list[int]
    free_memory: int
    free_disk: int
    computes_in: str
    not_counted: list[str]
    allowed_memory: int | None = None

    @property
    def shortages(self) -> list[str]:
        """What will not fit, a sentence each."""
        found = [] if self.refusal is None else [self.refusal]
        for what, needed, free in (
            # Libraries of this process are not among what is free any more, and no device has any.
            ("memory", self.together - LIBRARIES, self.free_memory),
            ("disk", self.disk, self.free_disk),
        ):
            if needed > free:
                found.append(
                    f"{what} will not do: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
                )
        return found

    @property
    def refusal(self) -> str | None:
        """Why a run is refused: what needs more than --memory allows, and what would help."""
        return refusal(self.largest, self.memory, self.allowed_memory)


def refusal(largest: Planned | None, needed: int, allowed: int | None) -> str | None:
    """Why a run is refused, if it is.

    Args:
        largest: What takes the most memory.
        needed: Its bytes, the libraries aside.
        allowed: Bytes that --memory allows, if any.
    """
    if allowed is None or largest is None or needed + LIBRARIES <= allowed:
        return None
    if largest.cost.whole:
        why = (
            "it holds the whole model, which cannot go block by block: give more, or leave out "
            "what asks for it (an allocator or training that needs gradients, --tasks)"
        )
    else:
        why = "give more, or a smaller --batch-size, --length or --samples"
    return (
        f"--memory {allowed / 1e6:,.0f} MB will not do: {largest.stage}, {largest.unit} needs "
        f"about {(needed + LIBRARIES) / 1e6:,.0f} MB, {LIBRARIES / 1e6:,.0f} of them for "
        f"libraries; {why}"
    )


def largest_of(planned: Sequence[Planned], computes_in: str) -> tuple[Planned | None, int]:
    """What takes the most memory of all that may run, and its bytes."""
    todo = [unit for unit in planned if unit.state != "cached"]
    largest = max(todo, key=lambda unit: memory(unit.cost, computes_in), default=None)
    return largest, 0 if largest is None else memory(largest.cost, computes_in)


def estimate(runs: Sequence[Mapping[Group, Sequence[Planned]]], workspace: Workspace) -> Estimate:
    """Work by kind, divided by what this machine does of each in a second.

    Args:
        runs: Group to the units that no earlier run has, one run after another.
        workspace: What they share.
    """
    planned = [unit for run in runs for units in run.values() for unit in units]
    todo = [unit for unit in planned if unit.state != "cached"]
    settings, device = workspace.settings, workspace.model.device
    home, computes_in = settings.home.expanduser(), workspace.model.compute_dtype
    shared = sharing_memory(settings) > 1
    threads, here = torch.get_num_threads(), cores(affinity(), cpu_quota())
    processes = Processes(workers_of(settings), threads, here if shared else None)
    speeds = _Speeds(home, device, computes_in, todo)
    stages: dict[str, float] = {}
    for unit in todo:
        took = speeds.seconds(unit.cost, threads)
        stages[unit.stage] = stages.get(unit.stage, 0.0) + took
    largest, most = largest_of(planned, computes_in)
    played = [_play(run, speeds, processes) for run in runs]
    together = max((one.memory for one in played), default=0) if shared else most
    return Estimate(
        seconds=sum(one.seconds for one in played),
        workers=processes.count,
        alone=sum(stages.values()),
        stages=stages,
        memory=most,
        largest=largest,
        together=together + LIBRARIES * sharing_memory(settings),
        disk=sum(unit.cost.disk * (2 if unit.published else 1) for unit in todo),
        models=sorted({unit.cost.disk for unit in planned if unit.stage == "materialise"}),
        free_memory=free_memory(device),
        free_disk=shutil.disk_usage(home).free,
        computes_in=computes_in,
        not_counted=_not_counted(todo),
        allowed_memory=allowed_for_one(settings),
    )


class _Speeds:
    """What this machine takes for a unit, with so many threads.

    Args:
        home: Data directory, where that is kept.
        device: Where the model runs.
        computes_in: The dtype that it runs in.
        todo: All that may run.
    """

    def __init__(self, home: Path, device: str, computes_in: str, todo: Sequence[Planned]) -> None:
        self.home, self.device, self.computes_in = home, device, computes_in
        kinds = {kind for unit in todo for kind in unit.cost.products}
        self.dtypes = sorted({computes_in, *kinds} - {MODEL})
        self._known: dict[int, Machine] = {}

    def seconds(self, cost: Cost, threads: int) -> float:
        """Of a unit; the machine is measured where that was not done yet."""
        if threads not in self._known:
            self._known[threads] = known_machine(self.home, self.device, self.dtypes, threads)
        return seconds(cost, self._known[threads], self.computes_in)


def _play(run: Mapping[Group, Sequence[Planned]], speeds: _Speeds, processes: Processes) -> Played:
    """How the processes come through a run."""
    costs = {
        group: [unit.cost for unit in units if unit.state != "cached"]
        for group, units in run.items()
    }
    todo = {
        group: max(memory(cost, speeds.computes_in) for cost in own)
        for group, own in costs.items()
        if own
    }

    def took(group: Group, threads: int) -> float:
        return sum(speeds.seconds(cost, threads) for cost in costs[group])

    return play(list(run), todo, took, processes)


def seconds(cost: Cost, machine: Machine, computes_in: str) -> float:
    """How long a unit takes; what it stores is read once, too."""
    products = sum(
        count / machine.products[computes_in if kind == MODEL else kind]
        for kind, count in cost.products.items()
    )
    disk = cost.disk / machine.write + cost.disk / machine.read
    return (
        UNIT_SECONDS + products + cost.eigen / machine.eigen + cost.logits / machine.logits + disk
    )


def memory(cost: Cost, computes_in: str) -> int:
    """Peak bytes of a unit."""
    return cost.memory + cost.held * getattr(torch, computes_in).itemsize


def _not_counted(todo: Sequence[Planned]) -> list[str]:
    """Evaluations of unknown length."""
    return [
        unit.unit for unit in todo if unit.stage == "evaluate" and not unit.cost.products.get(MODEL)
    ]
