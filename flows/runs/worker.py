"""What a process that computes for another does: it opens the command once, and does its orders."""

import os
import traceback
from dataclasses import dataclass

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows.runs.inside import Telling
from flows.runs.pipeline import Pipeline, build_pipeline
from flows.runs.stores import FOLDER
from flows.runs.workspace import Workspace, open_workspace
from flows.settings.config import RunConfig, Settings
from flows.settings.heap import give_back, share_one_heap
from storage.layout import Layout
from tasks.engine.order import Order, provide
from tasks.engine.own_device import own_device
from tasks.engine.peak_memory import Peak, PeakMemory
from tasks.engine.session import Session
from tasks.engine.units import Outcome


@dataclass(frozen=True)
class Done:
    """What came of an order.

    Attributes:
        outcomes: Of every group, in order.
        notes: What people should know.
        peaks: Line that people see a stage by, to the most memory that the process took for it.
    """

    outcomes: list[list[Outcome]]
    notes: list[str]
    peaks: dict[str, Peak]


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{line} · {label}")
def run_order(line: str, label: str, order: Order) -> State[Done]:
    """Does the groups of an order; the state's data say what came of it.

    Args:
        line: What people know the stage by, for the run's name.
        label: What the groups are about, for the run's name.
        order: The groups.
    """
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    opened = _OPENED.get(order)
    told, outcomes, peaks = len(opened.workspace.notes), [], dict[str, Peak]()
    opened.session.listener = Telling(opened.workspace.notes.append)
    try:
        provide(opened.session, opened.pipeline.groups, order)
        for number in order.numbers:
            group, memory = opened.pipeline.groups[number], PeakMemory()
            try:
                outcomes.append(opened.session.run(group))
            finally:
                peaks[group.line] = peaks.get(group.line, Peak()) | memory.stop()
            give_back()
    except Exception as error:
        error.add_note(f"in process {os.getpid()}:\n{traceback.format_exc()}")  # lost on the way
        raise
    computed = sum(one.state == "computed" for made in outcomes for one in made)
    total = sum(map(len, outcomes))
    return Completed(
        message=f"{computed} computed, {total - computed} reused",
        data=Done(outcomes, opened.workspace.notes[told:], peaks),
    )


@dataclass(frozen=True)
class _Run:
    """One run, as this process has opened it."""

    workspace: Workspace
    pipeline: Pipeline
    session: Session


class _Opened:
    """The command and the run of it that were opened last: orders of one run come together.

    A process of a cluster outlives the command: the next one, be it the same to the letter, may
    find other files, and is opened anew.
    """

    def __init__(self) -> None:
        self._command: tuple[str, Workspace] | None = None
        self._run: tuple[RunConfig, _Run] | None = None
        self._devices: dict[str, str] = {}  # what was asked for -> what this process has of it

    def get(self, order: Order) -> _Run:
        """The run that an order is of, opened if it was not yet."""
        settings: Settings = order.settings
        if self._command is None or self._command[0] != order.command:
            self._command = self._run = None  # its memory is free before the next one's is taken
            share_one_heap()
            own = settings.model_copy(update={"device": self._device(settings)})
            self._command = order.command, open_workspace(own)
        if self._run is None or self._run[0] != order.config:
            workspace = self._command[1]
            workspace.models.drop()  # of another run, perhaps its compressed model
            pipeline = build_pipeline(workspace, order.config)
            self._run = order.config, _Run(workspace, pipeline, workspace.session(settings.refresh))
        return self._run[1]

    def _device(self, settings: Settings) -> str:
        """The device that this process has for itself, the same as long as it lives."""
        if settings.device not in self._devices:
            layout = Layout(settings.home.expanduser() / FOLDER)
            self._devices[settings.device] = own_device(settings.device, layout)
        return self._devices[settings.device]


_OPENED = _Opened()
