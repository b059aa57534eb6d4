"""What a model's own code raises where we run it, as one line that names model and place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError

from compress_core.errors import CompressError, ModelError


@contextmanager
def model_code(failing: str) -> Iterator[None]:
    """While it is open, a model's own forward runs.

    A model may raise anything; that it does is a property of the model, not a fault of ours. Lack
    of memory is neither, and passes.

    Args:
        failing: What cannot be done then, as the beginning of a sentence.

    Raises:
        ModelError: The model raised, from what it raised.
    """
    try:
        yield
    except (CompressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{failing}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what was said; a strict configuration's own line is its cause."""
    said = error.__cause__ if isinstance(error, StrictDataclassError) else error
    return (str(said).strip() or type(said).__name__).splitlines()[0]
