"""What a promotion needs of a registry: the tags and aliases of one registered model."""

from typing import Protocol

PREVIOUS, CHAMPION, CHALLENGER = "previous", "champion", "challenger"


class RegistryModel(Protocol):
    """One registered model. Writing replaces whatever is there; nothing compares first."""

    name: str

    def tags(self) -> dict[str, str]:
        """All tags, read at once."""

    def set_tag(self, name: str, value: str) -> None:
        """Sets a tag."""

    def delete_tag(self, name: str) -> None:
        """Deletes a tag, if it is there."""

    def aliases(self) -> dict[str, int]:
        """Alias to version."""

    def set_alias(self, alias: str, version: int | None) -> None:
        """Points an alias at a version; None takes it away."""
