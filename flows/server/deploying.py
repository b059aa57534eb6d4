"""Deployments on Prefect's server: a flow with its parameters, on a schedule, with a webhook."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from compress_core.errors import ConfigError
from flows.server.pool import POOL, make_pool
from flows.settings.threads import PASSIVE

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.flows import Flow
    from prefect.schedules import Schedule

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
ENDS = ("Failed", "Crashed", "TimedOut")  # names of states in which a run has come to nothing
LEAST = timedelta(seconds=30)
# `text` is what Slack, Mattermost and their like show. Every value is written as JSON.
TOLD = {
    "text": "'eigenpress: ' ~ flow_run.name ~ ' ' ~ flow_run.state.name ~ ': ' ~ "
    "flow_run.state.message",
    "deployment": "deployment.name",
    "flow_run": "flow_run.name",
    "flow_run_id": "flow_run.id | string",
    "state": "flow_run.state.name",
    "message": "flow_run.state.message",
    "address": "flow_run | ui_url",
}


@dataclass(frozen=True)
class When:
    """A schedule as people write it; without cron and every the deployment waits for people.

    Attributes:
        cron: Five fields, "0 2 * * *".
        every: A time, "6h".
        timezone: Of cron, "Europe/Berlin"; None is UTC.
    """

    cron: str | None = None
    every: str | None = None
    timezone: str | None = None

    def schedule(self) -> "Schedule | None":
        """As Prefect has it.

        Raises:
            ConfigError: It is none.
        """
        if self.cron and self.every:
            raise ConfigError("--cron and --every are two schedules: give one of them")
        if self.timezone and not self.cron:
            raise ConfigError("--timezone is that of --cron, which is not given")
        if self.cron:
            return _cron(self.cron, self.timezone)
        if self.every:
            from prefect.schedules import Interval

            return Interval(_interval(self.every))
        return None


def _cron(text: str, timezone: str | None) -> "Schedule":
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron
    from pydantic import ValidationError

    try:
        CronSchedule(cron=text, timezone=timezone)
    except ValidationError as error:
        found = {str(problem["loc"][0]) for problem in error.errors()}
        if "timezone" in found:
            raise ConfigError(
                f"--timezone {timezone!r} is no time zone; one looks like Europe/Berlin"
            ) from None
        raise ConfigError(
            f'--cron {text!r} is no schedule: minute, hour, day, month, day of week, like "0 2 * '
            '* *" for two in the morning'
        ) from None
    return Cron(text, timezone=timezone)


def _interval(text: str) -> timedelta:
    said = re.fullmatch(r"(\d{1,6})([smhd])", text)
    found = timedelta(**{UNITS[said[2]]: int(said[1])}) if said else None
    if found is None or found < LEAST:
        raise ConfigError(
            f"--every {text!r} is no time of at least {LEAST.seconds} seconds; one looks like 90s, "
            "30m, 6h or 1d"
        )
    return found


def deploy(
    flow: "Flow[..., Any]",
    name: str,
    parameters: Mapping[str, Any],
    when: When,
    description: str,
    notify: str | None = None,
) -> str:
    """Makes a deployment in the pool, or changes the one of that name.

    It has no limit of its own: the worker that `up` starts takes one run at a time.

    Args:
        flow: What it runs. The worker imports it by name, so it needs the same package.
        name: Its name.
        parameters: Of the flow, as JSON.
        when: Its schedule.
        description: For people.
        notify: Address that gets a POST when a run fails or crashes; None is none any more.

    Returns:
        The deployment's id.

    Raises:
        ConfigError: The schedule is none.
    """
    from prefect.client.orchestration import get_client
    from prefect.deployments.runner import EntrypointType, RunnerDeployment

    made = flow.to_deployment(  # its type has a coroutine for callers that are asynchronous
        name,
        schedule=when.schedule(),
        parameters=dict(parameters),
        description=description,
        tags=["eigenpress"],
        job_variables={"env": dict(PASSIVE)},  # has to be there before torch is imported
        work_pool_name=POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)
    with get_client(sync_client=True) as client:
        make_pool(client)
        identity = str(made.apply())
        _notify(client, f"eigenpress: {flow.name}/{name}", f"prefect.deployment.{identity}", notify)
    return identity


def _notify(client: "SyncPrefectClient", name: str, watched: str, address: str | None) -> None:
    """Lets the server tell an address what becomes of runs; in place of what it did before.

    The server does, and not the run, so that it is told of runs that were killed, too.
    """
    from prefect.automations import AutomationCore, EventTrigger
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import Posture

    for automation in client.read_automations_by_name(name):
        client.delete_automation(automation.id)
    if address is None:
        return
    block = Webhook(url=address, headers={"Content-Type": "application/json"})
    identity = block.save(_block_name(name), overwrite=True)
    values = ", ".join(f"{json.dumps(key)}: {{{{ ({of}) | tojson }}}}" for key, of in TOLD.items())
    client.create_automation(
        AutomationCore(
            name=name,
            description="Tells an address when a run of this deployment has come to nothing.",
            trigger=EventTrigger(
                expect={f"prefect.flow-run.{state}" for state in ENDS},
                match_related={
                    "prefect.resource.id": watched,
                    "prefect.resource.role": "deployment",
                },
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(0),
            ),
            actions=[CallWebhook(block_document_id=identity, payload=f"{{{values}}}")],
        )
    )


def _block_name(name: str) -> str:
    """As Prefect wants names of blocks: small letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
