"""What the dense model of a report and its compressed ones write, side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import local_model
from compress_core.hf.text import load_tokenizer
from compress_core.hf.writing import write_all
from compress_core.secrets import hide_all
from flows.report.shown import Sample, Shown
from flows.settings.output import CONFIG_FILE
from flows.settings.reading import read_yaml
from storage.errors import StorageError
from storage.store import Store
from tasks.engine.free_memory import free_memory

TOKENS = 40  # that each model writes
BEGINNING = 16  # tokens of a window of the evaluation text that make a prompt
MOST_WRITERS = 8  # compressed models; of a larger sweep those of the middle budget
LEFT_OUT = "No model was asked to write: --generate 2 lets them."


def write_samples(
    home: Path,
    shown: Sequence[Shown],
    count: int,
    prompts: Sequence[str],
    say: Callable[[str], None],
) -> list[Sample] | str:
    """What the models write after each prompt, the likeliest token each time, on the CPU.

    Args:
        home: Data directory.
        shown: The runs.
        count: Prompts to take from the first evaluation text, where none is given.
        prompts: What to begin with.
        say: Told what is about to be done.

    Returns:
        A sample per prompt, or why there is none.
    """
    if not prompts and count < 1:
        return LEFT_OUT
    config = shown[0].config
    if config is None:
        return "The records of these runs are not in the data directory, so neither are models."
    dense = local_model(str(config["model"]))
    writers = [run for run in _writers(shown) if _is_there(run)]
    if dense is None or not writers:
        return (
            f"The {'dense model' if dense is None else 'compressed model'} is not there any more."
        )
    needed = 2 * shown[0].result["bytes"]["dense"]
    if needed > free_memory("cpu"):
        return (
            f"The dense model does not fit the memory that is free: it takes {needed / 1e9:.1f} GB."
        )
    trust, compute = bool(config["trust_remote_code"]), shown[0].result["compute"]
    given = list(prompts) or _beginnings(home, shown[0], dense, count, trust)
    if not given:
        return "The evaluation text is not in the store any more; --prompt gives a beginning."
    say(
        f"{len(writers) + 1} models write {TOKENS} tokens after {len(given)} beginnings; "
        "--generate 0 leaves that out"
    )
    texts = {"dense": write_all(dense, given, TOKENS, trust_remote_code=trust, dtype=compute)}
    for run in writers:
        folder = Path(run.result["model_dir"])
        texts[run.label] = write_all(folder, given, TOKENS, dtype=compute)
    return [
        Sample(prompt, {who: found[place] for who, found in texts.items()})
        for place, prompt in enumerate(given)
    ]


def _writers(shown: Sequence[Shown]) -> list[Shown]:
    if len(shown) <= MOST_WRITERS:
        return list(shown)
    budgets = sorted({run.result["kept"] for run in shown})
    middle = budgets[len(budgets) // 2]
    return [run for run in shown if run.result["kept"] == middle][:MOST_WRITERS]


def _is_there(run: Shown) -> bool:
    """Whether its model folder is still that of this run, not of a later one in the same place."""
    file = Path(run.result.get("model_dir", "")) / CONFIG_FILE
    return file.is_file() and bool(hide_all(read_yaml(file)) == run.config)


def _beginnings(home: Path, run: Shown, dense: Path, count: int, trust: bool) -> list[str]:
    """The first tokens of windows of the first evaluation text, spread over it."""
    label = next(iter(run.result["metrics"]["dense"]["texts"]), None)
    for stage in run.result["stages"]:
        if (stage["name"], stage["unit"]) == ("tokenise", f"evaluation on {label}"):
            return _decoded(home, stage["key"], dense, count, trust)
    return []


def _decoded(home: Path, key: str, dense: Path, count: int, trust: bool) -> list[str]:
    try:
        windows: Any = Store(home / "store").open(key, "tokenise").array("tokens")
        tokenizer = load_tokenizer(dense, trust_remote_code=trust)
    except (StorageError, ModelError):
        return []
    chosen = windows[:: max(1, len(windows) // count)][:count, :BEGINNING]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in chosen.tolist()]
