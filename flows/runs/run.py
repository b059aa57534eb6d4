"""One method at one budget, as a Prefect flow: stages in order, each unit cached by content.

Prefect reads the annotations of flows at run time, so they are not postponed here.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from time import perf_counter
from typing import Any, cast

from prefect import flow

from compress_core.versions import library_versions
from flows.report.console import get_reporter
from flows.report.results import (
    as_stage,
    collect_result,
    curves_of,
    model_dir,
    save_run_record,
    stored_of,
)
from flows.runs.budget import resolve_budget
from flows.runs.pipeline import Pipeline, build_pipeline
from flows.runs.workspace import Workspace, open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig, write_yaml
from flows.settings.output import CONFIG_FILE, check_output
from tasks.engine.prefect_task import run_group
from tasks.engine.units import Group, Outcome, Session
from tasks.stages.materialise import publishing
from tasks.tracking.register import register

# The workspace that the command line has already opened; a deployment opens its own.
current_workspace: ContextVar[Workspace | None] = ContextVar("current_workspace", default=None)


@flow(
    name="eigenpress run",
    flow_run_name="{config.label} kept {config.kept} · {config.model}",
    persist_result=False,
)
def run_flow(config: RunConfig) -> dict[str, Any]:
    """Compresses one model with one method at one budget.

    Args:
        config: What is asked for.

    Returns:
        The result, as ``eigenpress run --json`` prints it.
    """
    if config.target_perplexity is not None:  # of a deployment: the command line knows which flow
        from flows.runs.target import target_flow

        return target_flow(config)
    started = perf_counter()
    workspace = current_workspace.get()
    if workspace is None:
        check_methods(config, [config.method], [config.kept] if config.kept else [])
        workspace = open_workspace(config)
        config = resolve_budget(workspace, config)
    pipeline = build_pipeline(workspace, config)
    session = new_session(workspace, config)
    outcomes = run_groups(pipeline.groups, session)
    workspace.models.drop("compressed")
    return finish(workspace, pipeline, session, outcomes, started)


def new_session(workspace: Workspace, config: RunConfig) -> Session:
    """A run's session against the workspace's store."""
    return Session(
        workspace.store,
        refresh=config.refresh,
        listener=get_reporter().inside,
        info={"device": workspace.model.device, "versions": library_versions()},
        refreshed=workspace.refreshed,
        earlier=workspace.earlier,
        release=workspace.models.drop,
    )


def run_groups(groups: Sequence[Group], session: Session) -> list[Outcome]:
    """Runs groups in order, each as one Prefect task; a line per stage for the user."""
    reporter = get_reporter()
    outcomes: list[Outcome] = []
    for line, members in groupby(groups, key=lambda group: group.line):
        of_line = list(members)
        with (
            _stopping(session),
            reporter.stage(line, sum(len(group.units) for group in of_line)),
        ):
            for group in of_line:
                reporter.group(len(group.units))
                future = run_group.submit(group.stage, group.label, session, group)
                done = cast(list[Outcome], future.result())  # what the state holds, not the state
                reporter.advance(done)
                outcomes += done
    return outcomes


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Tells the thread that computes to end where the main one is told to."""
    try:
        yield
    except BaseException:
        session.stopping.set()
        raise


def finish(
    workspace: Workspace,
    pipeline: Pipeline,
    session: Session,
    outcomes: list[Outcome],
    started: float,
) -> dict[str, Any]:
    """Publishes the folder, tracks and registers the run, and keeps a record of it."""
    config, reporter = pipeline.config, get_reporter()
    target = model_dir(pipeline, session)
    check_output(config, workspace.model.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with publishing(session.artifact(pipeline.folder), target) as staging:
        config_file = staging / CONFIG_FILE
        write_yaml(config, config_file)
        config_text = config_file.read_text(encoding="utf-8")
    result = collect_result(workspace, pipeline, session, outcomes)
    begun = perf_counter()
    with reporter.stage("register", 1):
        registered = register.submit(
            name=config.name or re.sub("[/:]", "-", workspace.model.name),  # MLflow's rule
            home=config.home.expanduser(),
            model=workspace.model,
            stored=stored_of(pipeline, session),
            result=result,
            config=config_text,
            curves=curves_of(pipeline, session),
        ).result()
        seconds = perf_counter() - begun
        label = f"{registered['name']} version {registered['version']}"
        outcome = Outcome("register", label, registered["run_id"], "computed", seconds)
        reporter.advance([outcome])
    result["stages"].append(as_stage(outcome))
    result["run_id"] = registered.pop("run_id")
    result["registered"] = registered
    result["seconds"] = round(perf_counter() - started, 3)
    save_run_record(config.home, config, result)
    return result
