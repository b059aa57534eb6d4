"""`eigenpress deploy`: a configuration becomes a deployment that runs on a schedule."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from compress_core.errors import ConfigError
from flows.report.console import Reporter
from flows.report.lines import entry, make_console
from flows.runs.opened import open_command
from flows.runs.pipeline import with_absolute_paths
from flows.server import runtime
from flows.server.deploying import When, deploy
from flows.settings.config import RunConfig, Settings, SweepConfig

HINT = "start `eigenpress up` (on the same data directory), or set PREFECT_API_URL"


def deploy_config(
    settings: Settings,
    name: str,
    when: When,
    notify: str | None,
    as_json: bool,
    print_json: Callable[[Any], None],
) -> None:
    """Checks a configuration as far as the run itself would before any work, and deploys it.

    Raises:
        ConfigError, ServerError: It cannot run, it has no schedule, there is no server.
    """
    when.schedule()
    check_address(notify)
    if runtime.named_server() is None:
        raise ConfigError(f"there is no Prefect server to deploy to: {HINT}")
    reporter = Reporter(stderr=as_json, quiet=as_json)
    open_command(settings, reporter).prepare()
    settings = with_absolute_paths(settings)
    from flows.runs.execute import run_flow, sweep_flow

    flow = sweep_flow if isinstance(settings, SweepConfig) else run_flow
    with runtime.flow_settings(reporter.working):
        parameters = {"config": settings.model_dump(mode="json", exclude_unset=True)}
        parameters["config"]["home"] = str(settings.home)
        identity = deploy(flow, name, parameters, when, _about(settings), notify)
    full = f"{flow.name}/{name}"
    if as_json:
        print_json({"deployment": full, "id": identity, "cron": when.cron, "every": when.every})
        return
    console = make_console()
    entry(console, "deployed", full)
    entry(console, "schedule", _said(when))
    if notify is not None:
        entry(console, "notify", f"{urlsplit(notify).hostname} when a run fails or crashes")
    entry(console, "run now", f"prefect deployment run '{full}'")


def check_address(notify: str | None) -> None:
    """Refuses what a webhook's address cannot be, without a word of it that may be secret.

    Raises:
        ConfigError: It is no address of a web server.
    """
    if notify is not None:
        parts = urlsplit(notify)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("--notify is no address: it begins with https:// or http://")


def _about(settings: Settings) -> str:
    if isinstance(settings, RunConfig):
        return f"{settings.label} on {settings.model}"
    assert isinstance(settings, SweepConfig)
    return f"{', '.join(settings.methods)} on {settings.model}"


def _said(when: When) -> str:
    if when.cron:
        return f"{when.cron} ({when.timezone or 'UTC'})"
    return f"every {when.every}" if when.every else "none: it runs when somebody starts it"
