"""Clean-up: what nothing needs leaves the store, and runs that no process runs are ended.

Prefect reads the annotations of flows at run time, so they are not postponed here.
"""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.runs.free import as_fields, free_store, told
from flows.runs.records import RECENT_DAYS
from flows.runs.stores import open_store
from flows.server.pool import end_dead_runs
from flows.settings.home import check_places, default_home, default_store, use_home

Days = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@flow(name="eigenpress clean", persist_result=False)
def clean_flow(
    home: Path | None = None,
    recent_days: Days = RECENT_DAYS,
    dry_run: bool = False,
    store: str | None = None,
) -> State[dict[str, Any]]:
    """Frees what nothing needs in the store, and ends runs that no process runs any more.

    It fails, and frees nothing, while a run of the same data directory goes on.

    Args:
        home: Data directory; else EIGENPRESS_HOME or ~/.eigenpress.
        recent_days: Runs newer than this keep what they made.
        dry_run: Only say what would go.
        store: Address of the bucket that is freed, too; else EIGENPRESS_STORE.

    Returns:
        Bytes freed, artifacts removed and kept, and the runs that were ended.
    """
    logger = get_run_logger()
    where = use_home(home or default_home())
    check_places(where)
    ended: list[str] = []
    if not dry_run:
        with get_client(sync_client=True) as client:
            ended = end_dead_runs(client)
    message = f"there is no store in {where}"
    freed: dict[str, Any] = {"freed_bytes": 0, "removed": 0, "kept": 0}
    address = store or default_store()
    if address or (where / "store").is_dir():
        opened = open_store(where, address, logger.warning)
        report = free_store(where, opened, recent_days, dry_run=dry_run)
        message = told(report, dry_run=dry_run)
        freed = as_fields(report)
    for line in [*ended, message]:
        logger.info(line)
    return Completed(message=message, data={**freed, "ended": ended, "dry_run": dry_run})
