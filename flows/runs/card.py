"""What the model card of a run says, from its settings and its result."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress_core.hf.card import Facts, hub_id, model_card
from flows.runs.pipeline import Pipeline
from flows.settings.belonging import BUDGET, EVALUATION, METHOD, REQUIRED, TEXT, TRAINING, belonging
from flows.settings.config import RunConfig
from tasks.engine.dense_model import DenseModel

DECIDES = (REQUIRED, TEXT, BUDGET, METHOD, TRAINING, EVALUATION)  # what came out, and its measures


def card_of(pipeline: Pipeline, model: DenseModel, result: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
        pipeline: The run.
        model: The dense model.
        result: The run's result so far.
    """
    config, method = pipeline.config, pipeline.job.method
    text = config.calibration if method.needs_calibration or config.recover else None
    calibration = ""
    if text is not None:
        job = pipeline.job
        calibration = f"{job.samples} windows of {job.length} tokens of `{_without_place(text)}`"
    return model_card(
        Facts(
            base=config.model,
            folder=model.folder,
            method=config.label,
            summary=method.summary,
            paper=method.paper,
            calibration=calibration,
            dataset=hub_id(text) if text is not None else None,
            command=command_of(config),
            version=version("eigenpress"),
            result=result,
        )
    )


def command_of(config: RunConfig) -> str:
    """The command line that makes the model, without places of this machine, one flag a line."""
    words = [f"eigenpress run --model {shlex.quote(hub_id(config.model) or _name(config.model))}"]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        default = field.get_default(call_default_factory=True)
        needed = name in ("method", "kept")
        if name == "model" or belonging(field).group not in DECIDES:
            continue
        if value is None or (value == default and not needed):
            continue
        flag = "--option" if name == "options" else f"--{name.replace('_', '-')}"
        values = [f"{n}={_plain(v)}" for n, v in value.items()] if name == "options" else value
        for one in values if isinstance(values, list) else [values]:
            words.append(flag if one is True else f"{flag} {shlex.quote(_plain(one))}")
    return " \\\n  ".join(words)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else _without_place(str(value))


def _without_place(text: str) -> str:
    """A path's last part; everything else as it is."""
    return _name(text) if text.startswith(("/", "~", "./", "../")) else text


def _name(path: str) -> str:
    return Path(path).name or path
