"""A run of groups against a store: each unit is found there, or computed and kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from random import uniform
from threading import Event
from time import perf_counter
from typing import Any
from uuid import uuid4

from compress_core.errors import NumericsError
from storage.artifact import Artifact
from storage.errors import ArtifactMissingError, LeaseHeldError
from storage.keys import recipe_key
from storage.manifest import Manifest
from storage.store import Store
from tasks.engine.stages import STAGES
from tasks.engine.units import Outcome, Unit
from tasks.engine.work import (
    COMMAND,
    CPU_SECONDS,
    ONCE,
    SECONDS,
    SESSION,
    Group,
    Work,
)
from tasks.engine.writer import Writer

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between looks whether another flow has finished what it has in hand."""


@contextmanager
def placed(place: Callable[[], str]) -> Iterator[None]:
    """Notes on whatever is raised inside where it was: the one place that knows it.

    Args:
        place: Says so, once something is raised; it begins with "stage ".
    """
    try:
        yield
    except Exception as error:
        error.add_note(place())
        raise


Listener = Callable[[str, int, int], None]  # label, done, in all


class Session:
    """One run against one store: which artifact each unit turned out to be.

    Args:
        store: Where artifacts are kept.
        refresh: Stages that are computed again even when they are cached.
        listener: Told of progress inside a group.
        info: Recorded with every artifact computed; never part of its identity.
        refreshed: Keys computed again already; runs of one sweep share it.
        release: Called before a stage that needs memory for itself computes.
        confirm: Called with a stage before one of its artifacts is kept; raises where the files it
            was computed from have changed since their digests were taken.
        earlier: Key to outcome of units that the same command computed before this run; the run
            reports them as its own, once.
        command: Name of the command, which its runs share; None draws one.

    Attributes:
        name: Its own, drawn at random; a process that computes for it has the same.
        store_now: The store, whatever is still on its way into it.
        stopping: Set when the command was told to stop: groups run in threads, where Ctrl-C does
            not reach them.
    """

    def __init__(
        self,
        store: Store,
        refresh: Sequence[str] = (),
        listener: Listener = lambda label, done, total: None,
        info: Mapping[str, Any] | None = None,
        refreshed: set[str] | None = None,
        earlier: dict[str, Outcome] | None = None,
        release: Callable[[], None] = lambda: None,
        confirm: Callable[[str], None] = lambda stage: None,
        command: str | None = None,
    ) -> None:
        self.store_now = store
        self.refresh = frozenset(refresh)
        self.listener = listener
        self.info = dict(info or {})
        self.earlier = {} if earlier is None else earlier
        self.release = release
        self.confirm = confirm
        self.name = uuid4().hex
        self.command = command or uuid4().hex
        self.stopping = Event()
        self._recipes: dict[Unit, tuple[str, dict[str, Any]]] = {}  # of units about to be found
        self.refreshed = set() if refreshed is None else refreshed
        self._manifests: dict[Unit, Manifest] = {}
        self._writer: Writer | None = None  # of the group that is computed

    @property
    def store(self) -> Store:
        """The store, with all in it that was computed: commits that go on are waited for.

        Raises:
            BaseException: As one of them did.
        """
        self._wait()
        return self.store_now

    @property
    def manifests(self) -> dict[Unit, Manifest]:
        """Of all units that are done; waits and raises as :attr:`store`."""
        self._wait()
        return self._manifests

    def manifest(self, unit: Unit) -> Manifest:
        """Of a unit that is done; its own commit, if it goes on, is waited for.

        Raises:
            BaseException: As a commit did.
        """
        self._wait(unit)
        return self._manifests[unit]

    def _wait(self, unit: Unit | None = None) -> None:
        if self._writer is not None:
            self._writer.wait(unit)

    def done(self, unit: Unit, manifest: Manifest) -> None:
        """A unit has its artifact, whose recipe stays on disk: thousands of them are no trifle."""
        self._manifests[unit] = replace(manifest, recipe={})

    def artifact(self, unit: Unit) -> Artifact:
        """The artifact of a unit that is done; waits and raises as :meth:`manifest`."""
        return self.store_now.open(self.manifest(unit).key, unit.stage)

    def recipe(self, unit: Unit) -> dict[str, Any]:
        """The recipe of a unit whose inputs are done."""
        return unit.recipe(
            lambda upstream: self.manifest(upstream).digest,
            lambda upstream, part: part(self.artifact(upstream)),
        )

    def run(self, group: Group) -> list[Outcome]:
        """Finds or computes every unit of a group.

        Raises:
            CompressError: As the computation did; errors of numbers with stage and group named,
                which what a user brought has nothing to do with.
        """
        work = Work(self, group)
        with placed(lambda: work.place):
            return self._run(group, work)

    def _run(self, group: Group, work: Work) -> list[Outcome]:
        self.find(work)
        if work.missing:
            with self._claimed(work):
                self._compute(group, work)
            for unit in work.missing:
                spent = self.manifests[unit].info[CPU_SECONDS]
                work.outcomes[unit] = Outcome(
                    unit.stage, unit.name, work.keys[unit], "computed", work.seconds[unit], spent
                )
        if group.after is not None:
            group.after(self, self.recipe(group.units[-1]))
        return [work.outcomes[unit] for unit in group.units]

    def find(self, work: Work) -> None:
        """Looks for every unit that was not found yet; what is not there is put on the list."""
        work.missing.clear()
        for unit in work.group.units:
            if unit in work.outcomes:
                continue
            started = perf_counter()
            key, recipe, manifest = self._look_up(unit)
            if manifest is None:
                work.add(unit, key, recipe)
                continue
            self.done(unit, manifest)
            seconds = perf_counter() - started
            spent = manifest.info.get(CPU_SECONDS)
            cached = Outcome(unit.stage, unit.name, key, "cached", seconds, spent)
            work.outcomes[unit] = self.earlier.pop(key, cached)

    def _look_up(self, unit: Unit) -> tuple[str, dict[str, Any], Manifest | None]:
        """Key, recipe and what the store has of it; ``refresh`` takes that away, once."""
        known = self._recipes.pop(unit, None)
        key, recipe = known if known is not None else self._keyed(unit)
        if self._is_stale(unit, key):
            with suppress(ArtifactMissingError):  # removed this moment: computed anyway
                self.store.remove(key)
        if unit.stage in self.refresh:
            self.refreshed.add(key)
        return key, recipe, self.store.find(key, unit.stage)

    def _is_stale(self, unit: Unit, key: str) -> bool:
        """Whether ``refresh`` asks for what is there; not what this command has made, anywhere."""
        if unit.stage not in self.refresh or key in self.refreshed:
            return False
        manifest = self.store.peek(key, unit.stage)
        return manifest is not None and manifest.info.get(COMMAND) != self.command

    def _keyed(self, unit: Unit) -> tuple[str, dict[str, Any]]:
        """Key and recipe of a unit whose inputs are done."""
        recipe = self.recipe(unit)
        return recipe_key(recipe), recipe

    def absent(self, group: Group) -> bool:
        """Whether any unit of a group, whose inputs are done, is still to be computed.

        Where none is, the group is run next, and no key is computed again.
        """
        keyed = {}
        for unit in group.units:
            key, _ = keyed[unit] = self._keyed(unit)
            if self._is_stale(unit, key) or self.store.find(key, unit.stage) is None:
                return True
        self._recipes |= keyed
        return False

    def standing(self, group: Group) -> list[Outcome] | None:
        """What became of a group that other processes make, once all of it is there."""
        found = {}
        for unit in group.units:
            key = recipe_key(self.recipe(unit))
            self.store.look_again(unit.stage, [key])
            manifest = self.store.peek(key, unit.stage)
            if manifest is None or self._is_stale(unit, key):
                return None
            found[unit] = manifest
        for unit, manifest in found.items():
            self.done(unit, manifest)
        return [
            Outcome(
                unit.stage,
                unit.name,
                manifest.key,
                "computed" if manifest.info.get(SESSION) == self.name else "cached",
                manifest.info[SECONDS],
                manifest.info.get(CPU_SECONDS),
            )
            for unit, manifest in found.items()
        ]

    def settle(self, group: Group, outcomes: Sequence[Outcome]) -> None:
        """Takes over what another process says that it made of a group.

        Raises:
            ArtifactMissingError: It is not in this store, or not what was asked for.
        """
        self.store.look_again(group.stage, [outcome.key for outcome in outcomes])  # all at once
        for unit, outcome in zip(group.units, outcomes, strict=True):
            manifest = self.made_elsewhere(unit, outcome.key)
            if not self._is_of(unit, manifest):
                raise ArtifactMissingError(
                    f"stage {unit.stage}, {group.label}: another process computed {unit.name} of "
                    "other inputs or with other code: all need the same model, texts and versions"
                )
            self.done(unit, manifest)

    def made_elsewhere(self, unit: Unit, key: str) -> Manifest:
        """What another process says is in the store.

        Raises:
            ArtifactMissingError: This one does not find it there.
        """
        self.store.look_again(unit.stage, [key])
        manifest = self.store.find(key, unit.stage)
        if manifest is None:
            raise ArtifactMissingError(
                f"stage {unit.stage}: {unit.name} is not in {self.store.where}, as this process "
                "sees it: all need one --home on a shared disk, or one --store"
            )
        return manifest

    def _is_of(self, unit: Unit, manifest: Manifest) -> bool:
        """Whether an artifact is what this run means by a unit."""
        recipe = dict(manifest.recipe)
        recipe.pop(ONCE, None)
        return recipe_key(recipe) == recipe_key(self.recipe(unit))

    @contextmanager
    def _claimed(self, work: Work) -> Iterator[None]:
        """Nobody else computes meanwhile what is missing; waits while another flow does so.

        Raises:
            Interrupted: The command was told to stop.
        """
        pause = FIRST_PAUSE
        with ExitStack() as held:
            while work.missing:
                claimed = [work.keys[unit] for unit in work.missing]
                try:
                    held.enter_context(self.store.claim(work.group.stage, claimed))
                except LeaseHeldError as error:
                    work.progress(0, len(claimed), f"waits for {error.who}")
                    self.stopping.wait(pause * uniform(0.5, 1))  # or two might refuse each other
                    pause = min(2 * pause, LONGEST_PAUSE)
                    self.find(work)
                else:
                    self.find(work)  # before the claim somebody may have been faster
                    break
            yield

    def _compute(self, group: Group, work: Work) -> None:
        """Computes what is missing."""
        if not work.missing:
            return
        if STAGES[group.stage].alone:
            self.release()
        try:
            with work.writer as self._writer:
                group.compute(work)
        except NumericsError as error:
            raise NumericsError(f"stage {group.stage}, {group.label}: {error}") from error
        finally:
            self._writer = None
