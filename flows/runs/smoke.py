"""The generation smoke test as gates: finite logits, something to read, no loops."""

from pathlib import Path
from statistics import fmean

from compress_core.hf.smoke import smoke_test
from flows.settings.checks import choose_device
from flows.settings.gates import GENERATION, Generation
from tasks.promotion.gates import Verdict


def generation_verdicts(
    folder: Path, asked: Generation, compute: str, trust_remote_code: bool
) -> list[Verdict]:
    """What a model's greedy continuations come to.

    Args:
        folder: The model folder.
        asked: Prompts and limits.
        compute: The dtype that it runs in, or "auto" for its own.
        trust_remote_code: Whether the folder's own Python may run.

    Raises:
        ModelError: The model does not load.
    """
    written = smoke_test(
        folder,
        asked.prompts,
        new_tokens=asked.new_tokens,
        device=choose_device("auto"),
        dtype=compute,
        trust_remote_code=trust_remote_code,
    )
    broken = [one for one in written if not one.finite]
    empty = [one for one in written if one.empty]
    repetition = fmean(one.repetition for one in written)
    limit = asked.max_repetition
    looping = max(written, key=lambda one: one.repetition)
    return [
        Verdict(
            f"{GENERATION}/not_finite",
            "max 0",
            float(len(broken)),
            0.0,
            not broken,
            f"logits after {broken[0].prompt!r} are not finite" if broken else "",
        ),
        Verdict(
            f"{GENERATION}/empty",
            "max 0",
            float(len(empty)),
            0.0,
            not empty,
            f"nothing is written after {empty[0].prompt!r}" if empty else "",
        ),
        Verdict(
            f"{GENERATION}/repetition",
            f"max {limit:g}",
            repetition,
            limit,
            repetition <= limit,
            "" if repetition <= limit else f"after {looping.prompt!r}: {_start(looping.text)!r}",
        ),
    ]


def _start(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
