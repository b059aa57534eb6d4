"""Stage ``evaluate``: perplexity, KL divergence to the dense model, and lm-eval tasks.

What is measured is the folder on disk: for tasks loaded as a user would load it, for texts block by
block, in the same modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.evaluate import TextMetrics, perplexity_and_kl
from compress_core.folder.stream import CompressedStream
from compress_core.hf.lm_eval_tasks import TaskSpec, run_tasks
from compress_core.hf.lm_eval_watch import Watch, watching
from compress_core.hf.stream import BlockStream, Progress
from compress_core.hf.streamed import Streamed
from compress_core.types import ModelLayout
from tasks.engine.cost import (
    MODEL,
    Cost,
    forward_operations,
    head_operations,
    hidden_bytes,
    logits,
    streamed_bytes,
    streamed_numbers,
)
from tasks.engine.dense_model import FOLDER, DenseModel
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put_tensor

STATES, WINDOWS = "states", "nll_by_window"
MOST = 1 << 30
"""Bytes of a text's hidden states behind the dense model's last block up to which the store keeps
them, so that its blocks run once, whatever is compared with it."""


def text_group(
    models: Models,
    tokens: Unit,
    compressed: Unit | None,
    measured: Unit | None,
    *,
    which: str,
    batch_size: int,
    label: str,
    expected_tokens: int,
) -> Group:
    """Perplexity of one model on one text; for a compressed one, KL to the dense one beside it.

    Args:
        models: Knows the dense model; a whole one that it holds is let go.
        tokens: The unit whose artifact holds the text's windows.
        compressed: The unit whose folder is measured; None for the dense model.
        measured: The unit of the dense model on this text; None where this is it.
        which: What people call that model.
        batch_size: Windows per forward.
        label: What people call the text.
        expected_tokens: For the plan.
    """
    dense, count = models.dense, 2 if compressed else 1
    states = hidden_bytes(dense, expected_tokens)
    kept = states <= MOST
    passes = 1 if kept else count
    whole = forward_operations(dense, expected_tokens, tokens.settings["length"])
    head = head_operations(dense, expected_tokens)
    unit = Unit(
        "evaluate",
        f"{which} on {label}",
        settings={"dtype": dense.compute_dtype},
        sources={"dense model": dense.digest},
        inputs={
            "evaluation tokens": tokens,
            **_compressed(compressed),
            **({"dense evaluation": measured} if measured and kept else {}),
        },
        cost=Cost(
            products={MODEL: passes * whole + (count - passes) * head},
            logits=count * logits(dense, expected_tokens),
            held=count * streamed_numbers(dense),
            memory=streamed_bytes(
                dense, expected_tokens, count, batch_size * tokens.settings["length"]
            ),
            disk=states if kept and not compressed else 0,
        ),
    )
    return Group("evaluate", unit.name, [unit], _Text(models, tokens, compressed, batch_size, kept))


@dataclass(frozen=True)
class Asking:
    """How tasks are asked, all of which decides their numbers.

    Attributes:
        limit: At most so many documents per task; None for all.
        num_fewshot: Examples before each; None for what the task says.
        apply_chat_template: Whether prompts go through the chat template.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


def task_group(
    models: Models,
    spec: TaskSpec,
    compressed: Unit | None,
    *,
    which: str,
    batch_size: int,
    asking: Asking,
    tell: Callable[[str], None],
) -> Group:
    """One lm-eval task on one model; ``tell`` is told where its score cannot be kept."""
    dense = models.dense
    settings = {"task": spec.digest_parts, "tokenizer": dense.tokenizer_digest, **asdict(asking)}
    unit = Unit(
        "evaluate",
        f"{which} on task {spec.name}",
        settings=settings | {"dtype": dense.compute_dtype},
        code=LOADING,
        sources={"dense model": dense.digest},
        inputs=_compressed(compressed),
        cost=Cost(held=dense.parameters, whole=True),
    )
    compute = _Task(models, spec, compressed, batch_size, asking, tell)
    return Group("evaluate", unit.name, [unit], compute)


def _compressed(unit: Unit | None) -> dict[str, Unit]:
    return {"compressed model": unit} if unit else {}


def text_metrics(
    dense: DenseModel,
    folder: Path | None,
    windows: Tensor,
    batch_size: int,
    *,
    layout: ModelLayout | None = None,
    states: Tensor | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[TextMetrics, Tensor]:
    """Perplexity on windows, and KL to the dense model, both models block by block.

    Args:
        dense: The dense model.
        folder: The compressed one's; None measures the dense one, without KL.
        windows: int64 token ids (n, length).
        batch_size: Windows per forward.
        layout: Of the model that the folder was made of; None looks into the folder.
        states: What leaves the dense model's last block (n, length, width); None runs its blocks.
        progress: Told of batches, in all blocks of both models and at the head.

    Returns:
        The metrics, and those states of the dense model.

    Raises:
        ModelError: The folder is damaged.
        NumericsError: Logits that are not finite; names the window.
    """
    count, blocks = len(windows), len(dense.layout.blocks)
    passes = (states is None) + (folder is not None)
    total = (passes * blocks + 1) * count  # another dense model's folder may have other blocks

    def streamed(stream: BlockStream, before: int, states: Tensor | None = None) -> Streamed:
        share = blocks * count
        return Streamed(
            stream,
            windows,
            batch_size,
            lambda done, of: progress(before + done * share // of, total),
            states,
        )

    reference = streamed(dense.new_stream(), 0, states)
    model = reference
    if folder is not None:
        where = dense.device, dense.compute_dtype, dense.room
        before = (passes - 1) * blocks * count
        model = streamed(CompressedStream(folder, layout, *where), before)
    metrics = perplexity_and_kl(
        model,
        windows,
        reference=reference if folder else None,
        batch_size=batch_size,
        device=dense.device,
        progress=lambda done, _: progress(passes * blocks * count + done, total),
    )
    return metrics, reference.states


class _Text:
    def __init__(
        self, models: Models, tokens: Unit, compressed: Unit | None, batch_size: int, kept: bool
    ) -> None:
        self.models = models
        self.tokens = tokens
        self.compressed = compressed
        self.batch_size = batch_size
        self.kept = kept

    def __call__(self, work: Work) -> None:
        self.models.drop()
        dense, compressed = self.models.dense, self.compressed
        (unit,) = work.missing
        known = unit.inputs.get("dense evaluation")
        metrics, states = text_metrics(
            dense,
            work.artifact(compressed).file(FOLDER) if compressed else None,
            get_tensor(work.artifact(self.tokens), "tokens"),
            self.batch_size,
            layout=dense.layout,
            states=get_tensor(work.artifact(known), STATES) if known else None,
            progress=work.progress,
        )
        with work.draft(unit) as draft:
            if self.kept and compressed is None:
                put_tensor(draft, STATES, states.cpu())
            put_tensor(draft, WINDOWS, torch.tensor(metrics.by_window, dtype=torch.float64))
            draft.attrs |= {
                "perplexity": metrics.perplexity,
                "nll": metrics.nll,
                "kl": metrics.kl if self.compressed else 0.0,
                "windows": metrics.windows,
                "length": metrics.length,
                "tokens": metrics.tokens,
            }


class _Task:
    def __init__(
        self,
        models: Models,
        spec: TaskSpec,
        compressed: Unit | None,
        batch_size: int,
        asking: Asking,
        tell: Callable[[str], None],
    ) -> None:
        self.models = models
        self.spec = spec
        self.compressed = compressed
        self.batch_size = batch_size
        self.asking = asking
        self.tell = tell

    def __call__(self, work: Work) -> None:
        dense, name = self.models.dense, self.spec.name
        model, tokenizer = self.models.get(work, self.compressed), dense.tokenizer
        watch = Watch()
        with watching(watch):
            results = run_tasks(
                model,
                tokenizer,
                [self.spec],
                batch_size=self.batch_size,
                device=dense.device,
                **asdict(self.asking),
            )
        scores = scores_of(name, results)
        (unit,) = work.missing
        unknown = self.spec.unknown(watch)
        if unknown:
            work.unrepeatable(unit)
            self.tell(
                f"scores of task {name} are computed each time, not cached: its code also read "
                f"{', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}"
            )
        with work.draft(unit) as draft:
            draft.attrs |= scores


def scores_of(name: str, results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """A task's own scores and, of a tag or a group, those of its members.

    Raises:
        ConfigError: There are none.
    """
    scores = dict(results.get(name, {}))
    for member, metrics in results.items():
        if member != name:
            scores |= {f"{member}/{metric}": value for metric, value in metrics.items()}
    if not scores:
        raise ConfigError(f"task {name} gives no number; check its metric_list")
    return scores
