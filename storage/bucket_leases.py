"""Leases in a bucket, so that no two machines compute the same at once.

A lease is an object `leases/<stage>/<key>/<generation>` that its holder puts again and again, each
time with another number in it. It is over when its holder was a process of this host and is gone,
or when it stood still for `LEASE_SECONDS` before the eyes of who wants the key: the clocks of two
machines are never compared. Who takes a key puts the next generation, which only one can.

A holder that stood still itself, or could not reach the bucket, may lose a key to somebody else.
Then both compute it, and whose manifest comes first counts.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from storage.bucket import LEASES
from storage.disk import each
from storage.errors import LeaseHeldError, StorageError
from storage.hosts import runs, this_host, this_process
from storage.leases import Claim
from storage.manifest import FORMAT
from storage.objects import Object, Objects
from storage.records import NoRecordError, seal, unseal

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
SOMEBODY = "another machine"
_LOG = logging.getLogger(__name__)

Clock = Callable[[], float]


class BucketLeases:
    """The leases of all who share a bucket, as one of them sees them.

    Args:
        objects: what is there.
        clock: seconds since any moment; never goes back.
        host: this one.
        renew_seconds: between two puttings of a lease.
    """

    def __init__(
        self,
        objects: Objects,
        clock: Clock = time.monotonic,
        host: str | None = None,
        renew_seconds: float = RENEW_SECONDS,
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._host = host or this_host()
        self._renew_seconds = renew_seconds
        self._seen: dict[str, tuple[bytes, float]] = {}  # name -> what it held, and since when

    def claim(self, stage: str, keys: Iterable[str]) -> Claim:
        """Take the leases of all these keys, or of none; nobody is waited for.

        They are renewed in a thread until they are given back.

        Raises:
            LeaseHeldError: somebody else holds one of them.
            ObjectsError: the bucket cannot be used.
        """
        wanted = sorted(set(keys))
        held: list[_Lease] = []

        def attempt(key: str) -> Exception | None:
            try:
                held.append(self._take(stage, key))
            except Exception as error:  # the others are waited for, so that all are given back
                return error
            return None

        with ExitStack() as ends:
            ends.callback(self._give_back, held)
            ends.enter_context(self._renewing(held))
            # the first key alone: of two who want the same keys, one gets all of them
            for some in (wanted[:1], wanted[1:]):
                for error in filter(None, each(attempt, some)):
                    raise error
            return Claim(ends.pop_all())

    def _take(self, stage: str, key: str) -> "_Lease":
        what, below = f"{stage} {key[:12]}", f"{LEASES}/{stage}/{key}"
        known = self._generations(below)
        holders = [self._holder(one.name) for one in known]  # of all, so that all are watched
        for holder in filter(None, holders):
            raise LeaseHeldError(what, holder)
        name = f"{below}/{1 + max(map(_generation, known), default=0)}"
        lease = _Lease(self._objects, name, self._host, self._clock)
        if not self._objects.create(name, lease.text()) and not lease.is_there():
            raise LeaseHeldError(what, self._holder(name) or SOMEBODY)
        try:
            over = self._look_back(name, below, known, what)
            self._objects.delete(over)  # while ours is there, so that no number is taken anew
        except BaseException:
            with suppress(StorageError):  # it ends by itself
                self._objects.delete([name])
            raise
        return lease

    def _look_back(self, name: str, below: str, known: list[Object], what: str) -> list[str]:
        """Return the names of the leases that are over, once this one is the only one beside them.

        Who followed them first may have given back and deleted all of it since they were known.
        Then somebody else may have begun anew, below our number.

        Raises:
            LeaseHeldError: so it was.
        """
        places = {one.name: one.version for one in self._generations(below)}
        mine = places.pop(name, None)
        over = {one.name: one.version for one in known}
        others = [other for other, version in places.items() if over.get(other) != version]
        if others or mine is None:
            raise LeaseHeldError(what, next(filter(None, map(self._holder, others)), SOMEBODY))
        for one in over:
            self._seen.pop(one, None)
        return list(places)

    def _generations(self, below: str) -> list[Object]:
        """The leases on a key, those that are over among them."""
        found = self._objects.list(below)
        return [one for one in found if one.name.rpartition("/")[2].isdecimal()]

    def _holder(self, name: str) -> str | None:
        """Who holds a lease; None where it is over or gone."""
        asked = self._clock()
        try:
            text = self._objects.read(name)
        except FileNotFoundError:
            return None
        before, since = self._seen.get(name, (None, 0.0))
        if text != before:
            self._seen[name] = text, self._clock()
        elif asked - since >= LEASE_SECONDS:
            return None
        try:
            fields = unseal(text)
            host, process, who = fields["host"], int(fields["pid"]), str(fields["who"])
        except (NoRecordError, KeyError, TypeError, ValueError):
            return SOMEBODY
        return None if host == self._host and not runs(process) else who

    @contextmanager
    def _renewing(self, held: "list[_Lease]") -> Iterator[None]:
        over = threading.Event()

        def turns() -> None:
            while not over.wait(self._renew_seconds):
                failed = [error for error in each(_renew, list(held)) if error is not None]
                if failed:
                    _LOG.warning("%d leases wait to be renewed: %s", len(failed), failed[0])

        thread = threading.Thread(target=turns, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # what it puts now would come after what is deleted next

    def _give_back(self, held: "list[_Lease]") -> None:
        try:
            ours = [lease.name for lease in held if lease.is_ours()]
            self._objects.delete(ours)
        except StorageError as error:
            _LOG.warning("leases were not given back and end in %.0f s: %s", LEASE_SECONDS, error)


class _Lease:
    """One that is taken.

    Args:
        objects: where it is.
        name: of its object.
        host: of its holder.
        clock: as of `BucketLeases`.
    """

    def __init__(self, objects: Objects, name: str, host: str, clock: Clock) -> None:
        self.name = name
        self._objects = objects
        self._host = host
        self._clock = clock
        self._token = secrets.token_hex(8)
        self._turn = 0
        self._put = clock()  # when it was put last, or earlier

    def text(self) -> bytes:
        """What its object holds: another thing every turn."""
        holder = {"host": self._host, "pid": os.getpid(), "who": this_process()}
        return seal({"format": FORMAT, "token": self._token, "turn": self._turn, **holder})

    def renew(self) -> None:
        """Put it again, unless somebody else has its place."""
        if self.is_ours():
            moment = self._clock()
            self._turn += 1
            text = self.text()
            self._objects.send(self.name, [text], len(text))
            self._put = moment

    def is_ours(self) -> bool:
        """Tell whether nobody can have followed it; who put it in time need not ask."""
        return self._clock() - self._put < LEASE_SECONDS or self.is_there()

    def is_there(self) -> bool:
        """Tell whether its object is this one."""
        try:
            return bool(unseal(self._objects.read(self.name)).get("token") == self._token)
        except (FileNotFoundError, NoRecordError):
            return False


def _renew(lease: _Lease) -> StorageError | None:
    try:
        lease.renew()
    except StorageError as error:  # it is tried again at the next turn
        return error
    return None


def _generation(lease: Object) -> int:
    return int(lease.name.rpartition("/")[2])
