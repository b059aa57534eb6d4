"""Commits of a group's units on one thread beside its computation, in the order they came."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

from tasks.engine.units import Unit

MOST = 4
"""Commits that are under way or wait at once: what waits is on disk and takes no memory of ours,
but a crash would lose it."""


class Writer:
    """What takes the drafts of one group when their blocks have ended, and commits them.

    A commit that fails is the group's error, as if the computation had waited for it: what comes
    behind it is discarded, and whoever deals with the writer next is told.

    Attributes:
        failed: The unit whose commit failed.
        error: How.
    """

    def __init__(self) -> None:
        self.failed: Unit | None = None
        self.error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commits")  # starts with the first
        self._waiting: dict[Unit, Future[None]] = {}

    def make_room(self) -> None:
        """Waits where as many commits as may be are under way.

        Raises:
            BaseException: As of :meth:`check`.
        """
        self.check()
        while len(self._waiting) >= MOST:
            self.wait(next(iter(self._waiting)))

    def take(
        self, unit: Unit, commit: Callable[[], None], discard: Callable[[BaseException], None]
    ) -> None:
        """Has a draft committed.

        Args:
            unit: What it is of.
            commit: Does it, on the writer's thread.
            discard: Called there instead, with the error, if an earlier commit has failed.
        """
        self._waiting[unit] = self._thread.submit(self._do, unit, commit, discard)

    def check(self) -> None:
        """Tells of a commit that failed.

        Raises:
            BaseException: As it did.
        """
        if self.error is not None:
            raise self.error

    def wait(self, unit: Unit | None = None) -> None:
        """Waits until a unit is in the store, if it was taken; None for all that were.

        Raises:
            BaseException: As of :meth:`check`.
        """
        units = [unit] if unit is not None else list(self._waiting)
        for one in units:
            if one in self._waiting:
                wait([self._waiting[one]])  # may be interrupted, and is then asked again
                self._waiting.pop(one, None)
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits until everything that was taken is in the store or discarded.

        An interrupt meanwhile is raised when it is; a second one at once.

        Raises:
            BaseException: Of a commit, which is the earlier one where the computation failed, too.
        """
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:
            self._thread.shutdown()
            raise
        if error is None or (isinstance(error, Exception) and error is not self.error):
            self.check()

    def _do(
        self, unit: Unit, commit: Callable[[], None], discard: Callable[[BaseException], None]
    ) -> None:
        if self.error is not None:
            discard(self.error)
            return
        try:
            commit()
        except BaseException as error:
            self.failed, self.error = unit, error
