"""What is sent to another process: which groups of units to do, when, and their inputs' names.

No closure, model or tensor is in it: that process builds the same groups of the configuration.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group

Place = tuple[int, int]  # number of a group, number of one of its units


@dataclass(frozen=True)
class Order:
    """Groups to do, in order.

    Attributes:
        settings: The command's configuration.
        config: The run's configuration.
        numbers: The groups, by their place in the run.
        session: Name of the session that sends it.
        command: Name of the command that this is of.
        inputs: Place to key of every unit that they read and do not make; where they go on with a
            strand, of all that its earlier groups read and made, too.
        threads: Threads that a product is divided among; None leaves that to the process.
    """

    settings: Any
    config: Any
    numbers: tuple[int, ...]
    session: str
    command: str
    inputs: Mapping[Place, str]
    threads: int | None


def places_of(groups: Sequence[Group]) -> dict[Unit, Place]:
    """Unit to its place in a run."""
    return {
        unit: (number, place)
        for number, group in enumerate(groups)
        for place, unit in enumerate(group.units)
    }


def read_by(groups: Iterable[Group], before: Iterable[Group] = ()) -> list[Unit]:
    """Units that groups read and none of them makes, each once.

    Args:
        groups: They.
        before: What is done of their strand. What it handed on in memory is made again where it is
            lost, of all that it read and made.
    """
    groups, before = list(groups), list(before)
    made = {unit for group in groups for unit in group.units}
    units = [unit for group in [*before, *groups] for unit in group.units]
    read = [*(up for unit in units for up in unit.upstream.values()), *units]
    return [unit for unit in dict.fromkeys(read) if unit not in made]


class Waiting:
    """Groups that nobody has in hand yet, in order, those of one strand together.

    Args:
        groups: All of them.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        strands: dict[object, list[Group]] = {}
        for group in groups:
            strands.setdefault(group.strand or group, []).append(group)
        self._strands = [(strand, read_by(strand)) for strand in strands.values()]

    def __len__(self) -> int:
        return len(self._strands)

    def take(self, done: Container[Unit]) -> list[Group] | None:
        """The first strand whose inputs are all done, which waits no longer; None for none.

        Args:
            done: Units; what was among them stays so.
        """
        for place, (strand, missing) in enumerate(self._strands):
            while missing and missing[-1] in done:
                missing.pop()
            if not missing:
                del self._strands[place]
                return strand
        return None


def share_of_threads(threads: int, processes: int, groups: int) -> int:
    """Threads of a machine's for one of the processes that compute on it.

    Args:
        threads: Of the machine.
        processes: How many compute.
        groups: In the order: those of a strand, which can only go step by step, have all threads.
    """
    return threads if groups > 1 else max(1, threads // processes)


def provide(session: Session, groups: Sequence[Group], order: Order) -> None:
    """Gives a session its names and what an order says of the inputs.

    Raises:
        ArtifactMissingError: One is not in the store of this process.
    """
    session.name, session.command = order.session, order.command
    for (number, place), key in order.inputs.items():
        unit = groups[number].units[place]
        if unit in session.manifests and session.manifests[unit].key == key:
            continue
        session.done(unit, session.made_elsewhere(unit, key))
