"""The Prefect task that covers one group of units.

The store decides what is a hit; Prefect only shows it, as a state called Cached. Prefect's own
result cache is off: it cannot know whether the artifact behind a record still exists.
"""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from tasks.engine.session import Session
from tasks.engine.units import Outcome
from tasks.engine.work import Group


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{stage} · {label}")
def run_group(stage: str, label: str, session: Session, group: Group) -> State[list[Outcome]]:
    """Finds or computes the units of ``group``; the state's data are their outcomes.

    Args:
        stage: Name of the stage, for the run's name.
        label: What the group is about, for the run's name.
        session: The run it belongs to.
        group: The units.
    """
    outcomes = session.run(group)
    computed = sum(outcome.state == "computed" for outcome in outcomes)
    message = f"{computed} computed, {len(outcomes) - computed} reused"
    name = "Completed" if computed else "Cached"
    return Completed(name=name, message=message, data=outcomes)
