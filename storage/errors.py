"""What can go wrong in the store, one kind each, every one catchable as its standard kind too."""


class StorageError(Exception):
    """Root of every error the store raises on purpose."""


class ArtifactMissingError(StorageError, KeyError):
    """No complete artifact under this key."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ArtifactCorruptError(StorageError, ValueError):
    """An artifact whose bytes are not those its manifest promises."""


class StoreVersionError(StorageError):
    """A store written by a newer version of the program."""


class StorePermissionError(StorageError, PermissionError):
    """A data directory that cannot be written."""


class StoreInUseError(StorageError):
    """A store that others work with, asked for what only one may do alone."""


class LeaseHeldError(StorageError):
    """Somebody else is computing what was claimed.

    Attributes:
        what: is claimed.
        who: holds it, for people.
    """

    def __init__(self, what: str, who: str) -> None:
        super().__init__(what, who)
        self.what = what
        self.who = who

    def __str__(self) -> str:
        return f"{self.what} is being computed by {self.who}: wait for it, or stop that process"


class StoreFullError(StorageError, OSError):
    """The disk filled up while an artifact was being written; nothing committed is lost."""


class ObjectsError(StorageError):
    """A bucket that cannot be reached, refuses, or is named wrongly; this disk loses nothing."""
