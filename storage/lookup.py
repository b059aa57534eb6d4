"""What people ask of a store: which artifact a few digits mean, and what one was made from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from string import hexdigits

from storage.errors import ArtifactMissingError
from storage.manifest import Manifest

SHORTEST_PREFIX = 4
DIGITS = frozenset(hexdigits.lower())


@dataclass(frozen=True)
class MissingArtifact:
    """An input that the store no longer has.

    Attributes:
        key: its key.
        digest: digest of the content that was used.
        role: what it was to the artifact made from it.
    """

    key: str
    digest: str
    role: str


class Lookup(ABC):
    """The questions, of whatever can list keys and show manifests."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What people call the place."""

    @abstractmethod
    def peek(self, key: str, stage: str | None = None) -> Manifest | None:
        """Look an artifact up; changes and reports nothing."""

    @abstractmethod
    def _beginning(self, prefix: str) -> list[tuple[str, str]]:
        """Stage and key of all whose keys start so, sorted."""

    @abstractmethod
    def _known(self, key: str, stage: str | None = None) -> Manifest:
        """Return a manifest; raises as `open`."""

    def resolve(self, prefix: str) -> Manifest:
        """Return the one artifact whose key starts with `prefix` (4 digits or more).

        Raises:
            ArtifactMissingError: none, or several; the message lists them.
        """
        prefix = prefix.strip().lower()
        if not DIGITS.issuperset(prefix):
            raise ArtifactMissingError(f"{prefix!r} is no key: keys are made of 0-9 and a-f")
        if len(prefix) < SHORTEST_PREFIX:
            raise ArtifactMissingError(
                f"key {prefix!r} is too short: give {SHORTEST_PREFIX} digits or more"
            )
        found = self._beginning(prefix)
        if not found:
            raise ArtifactMissingError(
                f"no key starts with {prefix!r} in {self.where}; `eigenpress store ls` lists them"
            )
        if len(found) > 1:
            listed = ", ".join(f"{stage} {key[: len(prefix) + 8]}" for stage, key in found[:8])
            raise ArtifactMissingError(f"{len(found)} keys start with {prefix!r}: {listed}")
        stage, key = found[0]
        return self._known(key, stage)

    def lineage(self, key: str) -> list[Manifest | MissingArtifact]:
        """Return an artifact and all it was made from, nearest first, each once.

        Raises:
            ArtifactMissingError: there is no artifact under `key` itself.
        """
        found: list[Manifest | MissingArtifact] = [self._known(key)]
        seen = {key}
        for node in found:  # grows while it is walked: breadth first
            if isinstance(node, MissingArtifact):
                continue
            for role, source in node.inputs.items():
                above = source["key"]
                if above is None or above in seen:
                    continue
                seen.add(above)
                known = self.peek(above)
                found.append(known or MissingArtifact(above, str(source["digest"]), role))
        return found
