"""Versions of the libraries whose code takes part in the numbers; recorded, never part of a key."""

from importlib.metadata import version

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "lm_eval")


def library_versions() -> dict[str, str]:
    """Distribution name to installed version."""
    return {name: version(name) for name in LIBRARIES}
