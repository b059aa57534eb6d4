"""Runs lm-eval tasks on a model held in memory, quietly and with no cache of its answers.

lm-eval's own cache is by request alone, and serves one model the answers of another.
"""

import contextlib
import io
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from compress_core.errors import ConfigError, NumericsError
from compress_core.finite import all_finite
from compress_core.hf.lm_eval_find import TaskSpec as TaskSpec
from compress_core.hf.lm_eval_find import find_tasks as find_tasks
from compress_core.hf.lm_eval_model import known_tokens, make_evaluator
from compress_core.hf.refusing import refusing
from compress_core.hf.text import clip_length

FEWSHOT_SEED = 1234
"""lm-eval's own."""

_GENERATED_TOKENS = 256
"""What lm-eval generates for a task that does not say (`HFLM.max_gen_toks`)."""


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    specs: Sequence[TaskSpec],
    *,
    batch_size: int = 8,
    device: str = "cpu",
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, dict[str, float]]:
    """Evaluates a model on the tasks.

    Whatever lm-eval prints goes to stderr, its progress bars nowhere. Prompts longer than the
    model's context lose their beginning, as lm-eval does it.

    Args:
        model: A transformers causal language model, already on `device`.
        tokenizer: Its tokenizer; a copy is used, lm-eval sets padding tokens.
        specs: From `find_tasks`.
        batch_size: Requests in one forward pass.
        device: Where the model is.
        limit: At most so many examples per task; None for all.
        num_fewshot: Examples put before each question, but in tasks that say 0 themselves, as
            lm-eval has it; None for what the tasks say, or 0.
        apply_chat_template: Whether prompts go through the tokenizer's chat template, examples as
            turns of their own.

    Returns:
        Per task (and group) its numeric metrics by lm-eval's names; `acc_stderr` and the like are
        the standard errors of metrics that are means over examples.

    Raises:
        ConfigError: A task that cannot be loaded or run, or does not fit the model's context.
        ModelError: The tokenizer gives tokens that the model has no embedding for, or lacks one
            that a task begins or ends with.
        NumericsError: Logits or a metric that is not finite.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    if not specs:
        return {}
    context = clip_length(sys.maxsize, model.config)
    stated = None if context == sys.maxsize else context
    evaluator = make_evaluator(
        model, tokenizer, batch_size=batch_size, device=device, max_length=stated
    )
    names = " and ".join(spec.name for spec in specs)
    with contextlib.redirect_stdout(sys.stderr), _finite_logits(model), known_tokens(evaluator):
        tasks = _load(specs)
        for task in tasks:
            _check_room(task, stated)
        with refusing(ConfigError, f"task {names} cannot be run"):
            loaded = TaskManager(include_defaults=False).load(tasks)
            for task in loaded["tasks"].values():
                _set_shots(task, num_fewshot)
            # Not `simple_evaluate`: it also runs git and a survey of the whole environment.
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars that always show
                output = evaluate(
                    evaluator,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    apply_chat_template=apply_chat_template,
                    fewshot_as_multiturn=apply_chat_template,
                )
    samples = output.get("samples", {})
    return {
        task: _numbers(task, metrics, samples.get(task, ()))
        for task, metrics in {**output.get("groups", {}), **output["results"]}.items()
    }


def _set_shots(task: Any, asked: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (asked is not None and own != 0):
        task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _load(specs: Sequence[TaskSpec]) -> list[Any]:
    """lm-eval's task and group objects, their datasets read."""
    built = []
    for spec in specs:
        with refusing(ConfigError, f"task {spec.name} cannot be loaded"):
            loaded = spec.manager.load([spec.name])
        group = loaded.get("groups", {}).get(spec.name)
        built += [group] if group else list(loaded["tasks"].values())
    return built


def _check_room(item: Any, context: int | None) -> None:
    """Refuses a generating task that leaves no room for its prompt; lm-eval only asserts."""
    for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
        if context is None or task.OUTPUT_TYPE != "generate_until":
            continue
        settings = task.config.generation_kwargs or {}
        wanted = settings.get("max_gen_toks", _GENERATED_TOKENS)
        if wanted >= context:
            raise ConfigError(
                f"task {task.task_name} generates {wanted} tokens and the model's context is "
                f"{context}; set generation_kwargs.max_gen_toks lower in the task"
            )


@contextlib.contextmanager
def _finite_logits(model: nn.Module) -> Iterator[None]:
    """Stops at the first logits that are not finite: lm-eval would count them as answers."""

    def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not all_finite(output.logits):
            raise NumericsError(
                "evaluate: the model gives logits that are not finite in an lm-eval request; "
                "its weights are broken or its dtype overflows"
            )

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _numbers(
    task: str, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The numeric metrics of one task, and the standard errors of those that are means."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if "," not in key or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        metric, chain = key.split(",", 1)
        suffix = "" if chain == "none" else f",{chain}"
        if not math.isfinite(value):
            raise NumericsError(f"evaluate: {metric} of task {task} is {value}")
        found[metric + suffix] = float(value)
        scores = [s[metric] for s in samples if s["filter"] == chain and metric in s]
        if _are_averaged(scores, value):
            error = statistics.stdev(scores) / math.sqrt(len(scores))
            found[f"{metric}_stderr{suffix}"] = error
    return found


def _are_averaged(scores: Sequence[Any], value: float) -> bool:
    numeric = all(isinstance(score, int | float) for score in scores)
    return len(scores) > 1 and numeric and math.isclose(statistics.fmean(scores), value)
