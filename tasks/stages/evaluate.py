"""Stage ``evaluate``: perplexity, KL divergence to the dense model, and lm-eval tasks.

What is measured is the folder on disk, loaded as a user would load it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from compress_core.errors import ConfigError
from compress_core.evaluate import perplexity_and_kl
from compress_core.hf.lm_eval_tasks import TaskSpec, run_tasks
from compress_core.hf.loading import load_model
from tasks.engine.dense_model import DenseModel
from tasks.engine.units import Cost, Group, Unit, Work
from tasks.stages.arrays import get_tensor
from tasks.stages.materialise import FOLDER

CODE = ("compress_core.evaluate.perplexity_and_kl", "compress_core.hf.loading.load_model")
TASK_CODE = ("compress_core.hf.lm_eval_tasks.run_tasks", "compress_core.hf.loading.load_model")


class Models:
    """The whole models that evaluation needs, loaded when they are needed.

    Args:
        dense: The dense model.
    """

    def __init__(self, dense: DenseModel) -> None:
        self.dense = dense
        self._loaded: dict[str, Any] = {}

    def get(self, work: Work, compressed: Unit | None) -> Any:
        """The dense model, or the one of a ``materialise`` unit; at most one of each is held."""
        slot = "compressed" if compressed else "dense"
        folder = work.artifact(compressed).file(FOLDER) if compressed else self.dense.folder
        held = self._loaded.get(slot)
        if held is None or held[0] != folder:
            self._loaded.pop(slot, None)
            loaded = load_model(
                folder,
                self.dense.device,
                trust_remote_code=self.dense.trust_remote_code,
                dtype=self.dense.compute_dtype,
            )
            self._loaded[slot] = (folder, loaded)
        return self._loaded[slot][1]

    def drop(self, slot: str | None = None) -> None:
        """Frees one model, "dense" or "compressed", or both."""
        for held in [slot] if slot else list(self._loaded):
            self._loaded.pop(held, None)


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

    def compute(work: Work) -> None:
        windows = get_tensor(work.artifact(tokens), "tokens")
        metrics = perplexity_and_kl(
            models.get(work, compressed),
            windows,
            reference=models.get(work, None) if compressed else None,
            batch_size=batch_size,
            device=dense.device,
            progress=work.progress,
        )
        with work.draft(work.missing[0]) as draft:
            draft.attrs |= {
                "perplexity": metrics.perplexity,
                "nll": metrics.nll,
                "kl": metrics.kl if compressed else 0.0,
                "windows": metrics.windows,
                "length": metrics.length,
                "tokens": metrics.tokens,
            }

    passes = 2 if compressed else 1
    operations = 2.0 * dense.parameters * expected_tokens * passes
    return _group(name, dense, tokens, compressed, {}, CODE, compute, operations)


def task_group(
    models: Models,
    spec: TaskSpec,
    compressed: Unit | None,
    *,
    which: str,
    batch_size: int,
    limit: int | None,
) -> Group:
    """One lm-eval task on one model."""
    dense = models.dense

    def compute(work: Work) -> None:
        results = run_tasks(
            models.get(work, compressed),
            dense.tokenizer,
            [spec],
            batch_size=batch_size,
            device=dense.device,
            limit=limit,
        )
        scores = dict(results.pop(spec.name, {}))
        for member, metrics in results.items():  # a tag or a group has scores of its members
            scores |= {f"{member}/{metric}": value for metric, value in metrics.items()}
        if not scores:
            raise ConfigError(f"task {spec.name} gives no number; check its metric_list")
        with work.draft(work.missing[0]) as draft:
            draft.attrs |= scores

    name = f"{which} on task {spec.name}"
    settings = {"task": spec.digest_parts(), "limit": limit, "tokenizer": dense.tokenizer_digest}
    return _group(name, dense, None, compressed, settings, TASK_CODE, compute)


def _group(
    name: str,
    dense: DenseModel,
    tokens: Unit | None,
    compressed: Unit | None,
    settings: dict[str, Any],
    code: Sequence[str],
    compute: Callable[[Work], None],
    operations: float = 0.0,
) -> Group:
    inputs = {"evaluation tokens": tokens} if tokens else {}
    if compressed:
        inputs["compressed model"] = compressed
    unit = Unit(
        "evaluate",
        name,
        settings=settings | {"dtype": dense.compute_dtype},
        code=code,
        sources={"dense model": dense.digest},
        inputs=inputs,
        cost=Cost(operations=operations, memory=dense.checkpoint.nbytes * (2 if compressed else 1)),
    )
    return Group("evaluate", name, [unit], compute)
