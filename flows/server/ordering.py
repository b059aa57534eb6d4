"""In which order the server of `up` looks at events for automations: as they come.

Prefect lets an event wait for the one that it follows, and publishes none for a run that its
scheduler makes. So what becomes of a run that was made within five minutes before it began waits a
quarter of an hour (and for ever where the server ends meanwhile), and so does the word of its
failure. Events of one server come in order. Named by PREFECT_SERVER_EVENTS_CAUSAL_ORDERING.
"""

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, that waits only for an event that is there."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        """Waits while the event that this one follows is in hand."""
        if event.follows and await self.event_has_started_processing(event.follows):
            await super().wait_for_leader(event)
