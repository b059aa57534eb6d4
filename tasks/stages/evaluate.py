"""Stage ``evaluate``: perplexity, KL divergence to the dense model, and lm-eval tasks.

What is measured is the folder on disk, loaded as a user would load it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress_core.errors import ConfigError
from compress_core.evaluate import perplexity_and_kl
from compress_core.hf.lm_eval_tasks import TaskSpec, run_tasks
from compress_core.hf.lm_eval_watch import Watch, watching
from tasks.engine.cost import MODEL, Cost, forward_operations, logits
from tasks.engine.dense_model import DenseModel
from tasks.engine.session import Group, Work
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.stages.arrays import get_tensor


def text_group(
    models: Models,
    tokens: Unit,
    compressed: Unit | None,
    *,
    which: str,
    batch_size: int,
    label: str,
    expected_tokens: int,
) -> Group:
    """Perplexity of one model on one text; for a compressed one, KL to the dense one beside it.

    Args:
        models: Loads the models.
        tokens: The unit whose artifact holds the text's windows.
        compressed: The unit whose folder is measured; None for the dense model.
        which: What people call that model.
        batch_size: Windows per forward.
        label: What people call the text.
        expected_tokens: For the plan.
    """
    dense = models.dense
    name = f"{which} on {label}"
    compute = _Text(models, tokens, compressed, batch_size)
    return _group(name, dense, tokens, compressed, {}, compute, expected_tokens)


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
    name = f"{which} on task {spec.name}"
    settings = {"task": spec.digest_parts, "tokenizer": dense.tokenizer_digest, **asdict(asking)}
    compute = _Task(models, spec, compressed, batch_size, asking, tell)
    return _group(name, dense, None, compressed, settings, compute)


def _group(
    name: str,
    dense: DenseModel,
    tokens: Unit | None,
    compressed: Unit | None,
    settings: dict[str, Any],
    compute: Callable[[Work], None],
    expected_tokens: int = 0,
) -> Group:
    inputs = {"evaluation tokens": tokens} if tokens else {}
    if compressed:
        inputs["compressed model"] = compressed
    passes = 2 if compressed else 1
    length = tokens.settings["length"] if tokens else 0
    unit = Unit(
        "evaluate",
        name,
        settings=settings | {"dtype": dense.compute_dtype},
        code=LOADING,
        sources={"dense model": dense.digest},
        inputs=inputs,
        cost=Cost(
            products={MODEL: passes * forward_operations(dense, expected_tokens, length)},
            logits=passes * logits(dense, expected_tokens),
            held=passes * dense.parameters,
        ),
    )
    return Group("evaluate", name, [unit], compute)


class _Text:
    def __init__(
        self, models: Models, tokens: Unit, compressed: Unit | None, batch_size: int
    ) -> None:
        self.models = models
        self.tokens = tokens
        self.compressed = compressed
        self.batch_size = batch_size

    def __call__(self, work: Work) -> None:
        metrics = perplexity_and_kl(
            self.models.get(work, self.compressed),
            get_tensor(work.artifact(self.tokens), "tokens"),
            reference=self.models.get(work, None) if self.compressed else None,
            batch_size=self.batch_size,
            device=self.models.dense.device,
            progress=work.progress,
        )
        with work.draft(work.missing[0]) as draft:
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
