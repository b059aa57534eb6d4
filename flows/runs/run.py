"""One method at one budget: stages in order, each unit cached by content."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from prefect import flow

from compress_core.hf.loading import check_loads
from compress_core.secrets import hide, hide_all
from flows.report.console import Reporter
from flows.runs.artifacts import Progress, show_run
from flows.runs.card import card_of
from flows.runs.hands import Hands
from flows.runs.opened import Opened
from flows.runs.pipeline import Pipeline
from flows.runs.records import save_run_record, tell_others
from flows.runs.results import (
    as_stage,
    collect_result,
    curves_of,
    model_dir,
    registered_name,
    stored_of,
)
from flows.settings.config import Settings
from flows.settings.output import check_output
from flows.settings.reading import write_yaml
from storage.disk import make_folder
from tasks.engine.session import Session, placed
from tasks.engine.units import Outcome
from tasks.engine.work import Group
from tasks.stages.materialise import publishing
from tasks.tracking.files import CARD_FILE, CONFIG_FILE
from tasks.tracking.package import write_package
from tasks.tracking.register import register, same_version
from tasks.tracking.speaking import TrackingError

_WORK: ContextVar[Callable[[], Any]] = ContextVar("work")


def in_flow(name: str, run_name: str, config: Settings | None, work: Callable[[], Any]) -> Any:
    """What ``work`` returns, done as one Prefect flow run that shows ``config``.

    A task that is sent to another process takes its flow along, so the flow does not hold the work.
    """
    options: dict[str, Any] = {"persist_result": False, "validate_parameters": False}
    shown = flow(name=name, flow_run_name=hide(run_name), **options)(_work)
    token = _WORK.set(work)
    try:
        return shown(None if config is None else hide_all(config.model_dump(mode="json")))
    finally:
        _WORK.reset(token)


def _work(config: dict[str, Any] | None) -> Any:
    return _WORK.get()()


def run_in_flow(opened: Opened, pipeline: Pipeline) -> dict[str, Any]:
    """A run as a flow of its own."""
    config = pipeline.config
    run_name = f"{config.label} kept {config.kept} · {config.model}"
    return cast(
        dict[str, Any],
        in_flow("eigenpress run", run_name, config, lambda: run_pipeline(opened, pipeline)),
    )


def run_pipeline(opened: Opened, pipeline: Pipeline) -> dict[str, Any]:
    """Runs all stages, publishes, tracks and registers.

    Returns:
        The result, as ``eigenpress run --json`` prints it.
    """
    started = perf_counter()
    session = opened.session()
    hands = opened.hands(pipeline, pipeline.groups, session)
    outcomes = run_groups(pipeline.groups, session, opened.reporter, hands)
    opened.workspace.models.drop()
    return finish(opened, pipeline, session, outcomes, started)


def run_groups(
    groups: Sequence[Group], session: Session, reporter: Reporter, hands: Hands
) -> list[Outcome]:
    """Runs groups, and says a line per stage to the user.

    Args:
        groups: In order.
        session: The run.
        reporter: Who tells people.
        hands: Who computes.
    """
    outcomes: list[Outcome] = []
    progress = Progress(sum(len(group.units) for group in groups), reporter.note)
    for line, members in groupby(groups, key=lambda group: group.line):
        of_line = list(members)
        with (
            _stopping(session),
            reporter.stage(line, sum(len(group.units) for group in of_line)),
        ):
            for group in of_line:
                reporter.group(len(group.units))
                done = hands.outcomes(group)
                reporter.advance(done)
                progress.advance(line, len(done))
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


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Says of a refusal at the end that nothing is lost by it."""
    try:
        yield
    except TrackingError as error:
        raise TrackingError(
            f"{error}. The model is in {folder} and everything computed is kept: the same command "
            "again only registers"
        ) from error


def finish(
    opened: Opened,
    pipeline: Pipeline,
    session: Session,
    outcomes: list[Outcome],
    started: float,
) -> dict[str, Any]:
    """Publishes the folder, tracks and registers the run, and keeps a record of it."""
    config, reporter, workspace = pipeline.config, opened.reporter, opened.workspace
    target = model_dir(pipeline, session)
    check_output(config, workspace.model.folder)
    make_folder(target.parent)
    result = collect_result(workspace, pipeline, session, outcomes)
    with publishing(session.artifact(pipeline.folder), target, config.link) as staging:
        config_file = staging / CONFIG_FILE
        write_yaml(config, config_file)
        config_text = config_file.read_text(encoding="utf-8")
        dense = workspace.model
        check_loads(staging, dense.tokenizer, trust_remote_code=dense.trust_remote_code)
        card = card_of(pipeline, dense, result)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
        write_package(staging, target.name)
    name, home = registered_name(config, workspace.model.name), config.home.expanduser()
    begun = perf_counter()
    with placed(lambda: "stage register"), reporter.stage("register", 1), _kept(target):
        same = None if opened.register_unchanged else same_version(home, name, result)
        if same is not None:
            found = {"name": name, "version": same.version, "run_id": same.run_id}
            registered: dict[str, Any] = found | {"unchanged": True}
        else:
            registered = register.submit(
                name=name,
                home=home,
                model=workspace.model,
                stored=stored_of(pipeline, session),
                result=result,
                config=config_text,
                curves=curves_of(pipeline, session),
            ).result()
        seconds = perf_counter() - begun
        label = f"{name} version {registered['version']}"
        state = "computed" if same is None else "cached"
        outcome = Outcome("register", label, registered["run_id"], state, seconds)
        reporter.advance([outcome])
    result["stages"].append(as_stage(outcome))
    result["run_id"] = registered.pop("run_id")
    result["registered"] = registered
    result["seconds"] = round(perf_counter() - started, 3)
    record = save_run_record(config.home, config, result, opened.sweep)
    tell_others(record, workspace.store, reporter.note)
    show_run(config.home.expanduser(), result, reporter.note)
    return result
