"""One registered model's tags and aliases in MLflow, as promotions read and write them."""

from datetime import UTC, datetime
from pathlib import Path

from compress_core.secrets import hide
from tasks.tracking.client import Version, registered_versions
from tasks.tracking.limits import clip, join, split
from tasks.tracking.speaking import speaking
from tasks.tracking.versions import find_version


class RegisteredModel:
    """Tags and aliases of one registered model (a `tasks.promotion.registry.RegistryModel`).

    Args:
        home: The data directory.
        name: The registered model.
    """

    def __init__(self, home: Path, name: str) -> None:
        self.home = home
        self.name = name

    def tags(self) -> dict[str, str]:
        """All tags, joined again where they had to be split.

        Raises:
            TrackingError: There is no such model, or MLflow cannot be reached.
        """
        with speaking(self.home, f"to show {self.name!r}") as client:
            found = client.get_registered_model(self.name).tags
        # Of a value that is just being written in parts the count, which comes last, is not there.
        return join(found)

    def set_tag(self, name: str, value: str) -> None:
        """Sets a tag; what is too long for one goes into several, their count last."""
        with speaking(self.home, f"to tag {self.name!r}") as client:
            for part, text in reversed(split({name: value}).items()):
                client.set_registered_model_tag(self.name, part, text)

    def delete_tag(self, name: str) -> None:
        """Deletes a tag that is in one piece, if it is there."""
        with speaking(self.home, f"to clear a tag of {self.name!r}") as client:
            client.delete_registered_model_tag(self.name, name)

    def aliases(self) -> dict[str, int]:
        """Alias to version."""
        with speaking(self.home, f"to show {self.name!r}") as client:
            found = client.get_registered_model(self.name).aliases
        return {alias: int(version) for alias, version in found.items()}

    def set_alias(self, alias: str, version: int | None) -> None:
        """Points an alias at a version; None takes it away."""
        with speaking(self.home, f"to move {alias} of {self.name!r}") as client:
            if version is None:
                client.delete_registered_model_alias(self.name, alias)
            else:
                client.set_registered_model_alias(self.name, alias, str(version))


def versions_of(home: Path, name: str) -> list[Version]:
    """The versions of a registered model, in order.

    Raises:
        TrackingError: There is no model of that name, or MLflow cannot be reached.
    """
    find_version(home, name)
    return [version for version in registered_versions(home) if version.name == name]


def tag_version(home: Path, version: Version, name: str, value: str) -> None:
    """Sets a tag of a version, shorter than MLflow's longest.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    with speaking(home, f"to tag {version.name!r}") as client:
        client.set_model_version_tag(version.name, str(version.version), name, clip(value))


def log_gates(home: Path, version: Version, summary: str, report: str) -> None:
    """Records on a version, and among its run's artifacts, what its gates came to.

    Args:
        home: The data directory.
        version: The version.
        summary: JSON for the version's tag ``gates``; the newest one stays.
        report: JSON for a file of the run; each promotion has its own.
    """
    tag_version(home, version, "gates", summary)
    if version.run_id:
        when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        with speaking(home, f"to record the gates of {version.name!r}") as client:
            client.log_text(version.run_id, hide(report), f"gates/{when}.json")
