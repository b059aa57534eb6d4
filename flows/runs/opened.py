"""A command, opened once: settings checked, workspace opened, every pipeline built; then it runs.

`run`, `sweep`, `plan`, the demonstration and deployments all come through here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from compress_core.errors import ConfigError
from flows.report.console import Reporter
from flows.report.lines import size
from flows.runs.budget import MOST, at_kept, resolve_budget
from flows.runs.estimate import largest_of, memory, refusal
from flows.runs.forecast import Planner
from flows.runs.hands import Elsewhere, Hands, Here
from flows.runs.pipeline import Pipeline, build_pipeline, with_absolute_paths
from flows.runs.records import new_name
from flows.runs.results import registered_name
from flows.runs.workspace import (
    Workspace,
    allowed_for_one,
    memory_of_one,
    open_workspace,
    read_texts,
)
from flows.server.runtime import others_reach_it
from flows.server.workers import Workers
from flows.settings.checks import check_methods, check_runner, sharing_memory
from flows.settings.config import RunConfig, Settings, SweepConfig
from flows.settings.fields import HERE
from flows.settings.heap import share_one_heap
from flows.settings.idle import idle_notes
from tasks.engine.free_memory import free_memory
from tasks.engine.session import Session
from tasks.engine.work import Group
from tasks.tracking.check import check_tracking


@dataclass
class Opened:
    """A command that may run.

    Attributes:
        settings: What was asked for, a budget in bytes turned into kept.
        workspace: What all its runs share.
        reporter: Who tells people.
        pipelines: One per run, in order; of a search for a perplexity that at the mildest kept.
        sweep: What a sweep is called, so that its runs can be found together; "" of one run.
        page: Where the page of a sweep will be; None where none is written.
        register_unchanged: Whether a model that is registered already becomes another version.
        workers: Other processes that compute; None where this one does.
    """

    settings: Settings
    workspace: Workspace
    reporter: Reporter
    pipelines: list[Pipeline]
    sweep: str = ""
    page: Path | None = None
    register_unchanged: bool = True
    workers: Workers | None = None

    @property
    def searched(self) -> bool:
        """Whether its budget is a perplexity that has to be looked for."""
        settings = self.settings
        return isinstance(settings, RunConfig) and settings.target_perplexity is not None

    def prepare(self) -> None:
        """Refuses what only texts, tracking and the store can show; tells what people should know.

        Raises:
            ConfigError: A stage that will run needs more than --memory.
            ObjectsError: The bucket of the store cannot be written.
            TextError: A text cannot be read or is too short for one window.
            TrackingError: Runs cannot be tracked.
        """
        self.workspace.store.begin()
        calibrated = any(p.job.method.needs_calibration for p in self.pipelines)
        with self.reporter.working("reading"):
            read_texts(self.workspace, calibrated or self.settings.recovery is not None)
        self._check_memory()
        model = self.workspace.model.name
        names = dict.fromkeys(registered_name(p.config, model) for p in self.pipelines)
        check_tracking(self.settings.home.expanduser(), names)
        self.workspace.notes += whole_notes(self.pipelines, self.workspace)
        self.workspace.notes.begin(self.reporter.note)

    def _check_memory(self) -> None:
        """Refuses a run whose stages do not fit --memory, as far as they are not cached."""
        workspace, allowed = self.workspace, allowed_for_one(self.settings)
        if allowed is None:
            return
        planner = Planner(workspace.store, self.settings.refresh)
        planned = [unit for pipeline in self.pipelines for unit in planner.plan(pipeline)]
        largest, needed = largest_of(planned, workspace.model.compute_dtype)
        if reason := refusal(largest, needed, allowed):
            raise ConfigError(reason)

    def session(self) -> Session:
        """A run's session against the workspace's store."""
        return self.workspace.session(self.settings.refresh, self.reporter.inside)

    def hands(self, pipeline: Pipeline, groups: Sequence[Group], session: Session) -> Hands:
        """Who computes groups of one of the command's runs."""
        if self.workers is None:
            return Here(session)
        return Elsewhere(
            pipeline, groups, session, self.workers, self._sent, self.workspace.notes, self.reporter
        )

    @cached_property
    def _sent(self) -> Settings:
        """The command's settings for one of several processes, which divide the memory."""
        settings = with_absolute_paths(self.settings)
        # what it is told is its own already: it shares with nobody
        own: dict[str, Any] = {"runner": HERE, "workers": None, "cluster": None}
        if sharing_memory(settings) > 1:
            own["memory"] = ByteSize(memory_of_one(settings, free_memory("cpu")))
        workspace = self.workspace
        own |= {"batch_size": workspace.batch_size, "device": workspace.model.device}
        return settings.model_copy(update=own)


def open_command(settings: Settings, reporter: Reporter, planning: bool = False) -> Opened:
    """Checks everything that can be refused before a stage runs, and builds what will.

    Args:
        settings: What is asked for.
        reporter: Who tells people.
        planning: Whether it is only planned, for which a model needs no weights.

    Raises:
        CompressError, StorageError: Something the user asked for cannot be had.
    """
    share_one_heap()
    check_runner(settings)
    _check_cluster(settings)
    runs = settings.runs()
    kepts = [run.kept for run in runs if run.kept is not None]
    methods = check_methods(settings, list(dict.fromkeys(run.method for run in runs)), kepts)
    workspace = open_workspace(settings, planning)
    workspace.methods |= methods
    workspace.notes += idle_notes(settings, methods)
    if isinstance(settings, RunConfig):
        settings = resolve_budget(workspace, settings)
        # Of a search nothing is known yet; what is refused at a mild share is refused at all.
        runs = [settings if settings.kept is not None else at_kept(settings, MOST)]
    pipelines = [build_pipeline(workspace, run) for run in runs]
    _check_refreshed(settings, pipelines)
    sweep = new_name() if isinstance(settings, SweepConfig) else ""
    return Opened(settings, workspace, reporter, pipelines, sweep)


def whole_notes(pipelines: list[Pipeline], workspace: Workspace) -> list[str]:
    """What trains the whole model at once and so cannot go block by block, and what it needs."""
    needed: dict[str, int] = {}
    for pipeline in pipelines:
        for unit in (unit for group in pipeline.groups for unit in group.units):
            if unit.cost.whole and unit.stage in ("learn", "recover"):
                most = memory(unit.cost, workspace.model.compute_dtype)
                needed[unit.stage] = max(most, needed.get(unit.stage, 0))
    return [
        f"{stage} trains the whole model, which cannot go block by block: it needs about "
        f"{size(most)} beyond the libraries"
        for stage, most in needed.items()
    ]


def _check_cluster(settings: Settings) -> None:
    """Refuses a cluster whose processes cannot tell Prefect's server what they do.

    Raises:
        ConfigError: It is private to this command.
    """
    if settings.runner != HERE and settings.cluster is not None and not others_reach_it():
        raise ConfigError(
            f"--cluster {settings.cluster}: its processes report to Prefect's server, and that of "
            "a single command is reached from this machine alone; run `eigenpress up` or set "
            "PREFECT_API_URL"
        )


def _check_refreshed(settings: Settings, pipelines: list[Pipeline]) -> None:
    """Refuses to compute again what no run computes.

    Raises:
        ConfigError: A stage of --refresh is in no run.
    """
    there = list(dict.fromkeys(group.stage for p in pipelines for group in p.groups))
    for stage in settings.refresh:
        if stage not in there:
            raise ConfigError(
                f"--refresh {stage}: nothing here has that stage; the stages are {', '.join(there)}"
            )
