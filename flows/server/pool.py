"""The work pool of deployments, and runs in it whose worker is gone.

A run takes its place (and the slot of a deployment with a limit) when a worker picks it up, before
its process runs. Prefect frees neither where the worker ends then: a deployment with a limit of one
waits for ever and nobody is told. Here such a run becomes Crashed, which frees both and is
something that automations see.
"""

import os
import re
import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POOL, KIND = "eigenpress", "process"
WORKER_LABEL = "prefect.worker.name"  # Prefect's own, of a run that a worker has taken
PENDING_MINUTES = 10  # a process takes seconds to start, and a minute on a very busy machine
NAME = re.compile(r"up-(?P<host>.+)-(?P<pid>\d+)-(?P<begun>\d+)")


def worker_name() -> str:
    """Of the worker that this process starts and ends: says whether it can still be there."""
    return f"up-{socket.gethostname()}-{os.getpid()}-{_begun(os.getpid())}"


def make_pool(client: "SyncPrefectClient") -> None:
    """Makes the work pool where there is none."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        new = WorkPoolCreate(name=POOL, type=KIND, base_job_template=template)
        with suppress(ObjectAlreadyExists):  # another process made it meanwhile
            client.create_work_pool(new)


def is_online(client: "SyncPrefectClient", worker: str) -> bool:
    """Whether a worker of the pool has said that it is there."""
    return worker in _online(client, POOL)


def end_dead_runs(client: "SyncPrefectClient", ended: str | None = None) -> list[str]:
    """Marks runs as Crashed that no process runs any more.

    Those are what a worker of an `up` on this machine took that is gone, and what has been waiting
    for its process for `PENDING_MINUTES` under a worker that is offline. A run that runs under
    another worker is that worker's business: its process may live on alone.

    Args:
        client: Of the server.
        ended: A worker whose processes are known to have ended.

    Returns:
        A line for each, with its name.
    """
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    kinds = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    taken = FlowRunFilter(state=FlowRunFilterState(type=kinds))
    found = []
    online: dict[str, set[str]] = {}
    for run in client.read_flow_runs(flow_run_filter=taken):
        if run.deployment_id is None or not run.work_pool_name:
            continue  # of a command: the process that made it reports its end
        pool = run.work_pool_name
        if pool not in online:
            online[pool] = _online(client, pool)
        if reason := _why_dead(run, online[pool], ended):
            client.set_flow_run_state(run.id, Crashed(message=reason))
            found.append(f"{run.name}: {reason}")
    return found


def _why_dead(run: "FlowRun", online: set[str], ended: str | None) -> str | None:
    worker = str(run.labels.get(WORKER_LABEL, ""))
    again = "everything computed is kept, and the next run goes on from there"
    if worker and (worker == ended or _is_gone(worker)):
        return f"the worker {worker} ended before this run did; {again}"
    assert run.state is not None
    waiting = datetime.now(UTC) - run.state.timestamp
    left = run.state.is_pending() and worker not in online
    if left and waiting > timedelta(minutes=PENDING_MINUTES):
        minutes = int(waiting.total_seconds() // 60)
        return f"no process began within {minutes} minutes and its worker is gone; {again}"
    return None


def _online(client: "SyncPrefectClient", pool: str) -> set[str]:
    from prefect.client.schemas.objects import WorkerStatus

    workers = client.read_workers_for_work_pool(pool)
    return {worker.name for worker in workers if worker.status == WorkerStatus.ONLINE}


def _is_gone(worker: str) -> bool:
    """Whether it is a worker of an `up` on this machine that does not run any more."""
    said = NAME.fullmatch(worker)
    if said is None or said["host"] != socket.gethostname():
        return False
    return _begun(int(said["pid"])) != int(said["begun"])


def _begun(pid: int) -> int:
    """When a process began, in seconds since 1970; 0 where there is none of that number."""
    import psutil

    try:
        return int(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0
