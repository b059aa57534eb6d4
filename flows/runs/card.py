"""What the model card of a run says, from its settings and its result."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress_core.hf.card import Facts, hub_id, model_card
from flows.runs.pipeline import Pipeline
from flows.settings.belonging import BUDGET, EVALUATION, METHOD, REQUIRED, TEXT, TRAINING, belonging
from flows.settings.command import run_words
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
    fields = RunConfig.model_fields
    told = {
        name: _without_places(value)
        for name, value in config.model_dump(mode="json", exclude_none=True).items()
        if belonging(fields[name]).group in DECIDES
    }
    told["model"] = hub_id(config.model) or _name(config.model)
    return " \\\n  ".join(run_words(told))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_without_places(own) for own in value]
    return _without_place(value) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    """A path's last part; everything else as it is."""
    return _name(text) if text.startswith(("/", "~", "./", "../")) else text


def _name(path: str) -> str:
    return Path(path).name or path
