"""Stage ``evaluate``: perplexity, KL divergence to the dense model, and lm-eval tasks.

What is measured is the folder on disk, loaded as a user would load it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from compress_core.evaluate import perplexity_and_kl
from compress_core.hf.lm_eval_tasks import TaskSpec, run_tasks
from compress_core.hf.loading import load_model
from tasks.convert import get_tensor
from tasks.materialise import FOLDER
from tasks.model import DenseModel
from tasks.units import Cost, Group, Unit, Work

CODE = ("compress_core.evaluate.perplexity_and_kl", "compress_core.hf.loading.load_model")
TASK_CODE = ("compress_core.hf.lm_eval_tasks.run_tasks", "compress_core.hf.loading.load_model")


class Models:
    """The whole models that evaluation needs, loaded when they are and dropped when told to.

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
                folder, self.dense.device, trust_remote_code=self.dense.trust_remote_code
            )
            self._loaded[slot] = (folder, loaded)
        return self._loaded[slot][1]


def text_group(
    models: Models, tokens: Unit, compressed: Unit | None, *, batch_size: int, label: str
) -> Group:
    """Perplexity of one model on one text; for a compressed one, KL to the dense one beside it."""
    dense = models.dense
    name = f"{'compressed' if compressed else 'dense'} on {label}"

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

    return _group(name, dense, tokens, compressed, {}, CODE, compute)


def task_group(
    models: Models,
    spec: TaskSpec,
    compressed: Unit | None,
    *,
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
        with work.draft(work.missing[0]) as draft:
            draft.attrs |= results[spec.name]

    name = f"{'compressed' if compressed else 'dense'} on task {spec.name}"
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
) -> Group:
    inputs = {"evaluation tokens": tokens} if tokens else {}
    if compressed:
        inputs["compressed model"] = compressed
    unit = Unit(
        "evaluate",
        name,
        settings=settings | {"dtype": dense.layout.dtype},
        code=code,
        sources={"dense model": dense.digest},
        inputs=inputs,
        cost=Cost(memory=dense.checkpoint.nbytes * (2 if compressed else 1)),
    )
    return Group("evaluate", name, [unit], compute)
