"""A configuration becomes the groups of units that the flow then runs in order.

What method, options and budget make impossible on this model is refused here, before a stage runs.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from compress_core.allocate.base import of_price
from compress_core.errors import BudgetError
from compress_core.forms.names import EIGHT_BITS
from compress_core.hf.lm_eval_find import is_path
from compress_core.learn.base import Learner
from compress_core.learn.room import share_of_numbers
from compress_core.types import Budget
from flows.runs.layer_speed import on_device
from flows.runs.workspace import Workspace
from flows.settings.config import RunConfig, Settings
from flows.settings.fields import BLOCKS
from flows.settings.output import check_output
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Group
from tasks.stages.allocate import allocate_group
from tasks.stages.collect import collect_groups
from tasks.stages.collect_gradients import fisher_group
from tasks.stages.collect_outputs import by_layer, output_groups
from tasks.stages.decompose import decompose_groups
from tasks.stages.evaluate import Asking, task_group, text_group
from tasks.stages.learn import learn_groups
from tasks.stages.materialise import materialise_group
from tasks.stages.predict import predict_groups
from tasks.stages.probe import probe_groups
from tasks.stages.realise import Upstream, realise_groups
from tasks.stages.recover import recover_groups
from tasks.stages.recover_blocks import block_groups
from tasks.stages.sequential import sequential_groups
from tasks.stages.weigh import weigh_groups

NOTE_OF_8_BITS = (
    "{method} is mixed quantisation: it stores factors in 8 bits, and two such numbers count as "
    "one parameter; compare its rows only with those of methods that store 8-bit numbers"
)


Asked = TypeVar("Asked", bound=Settings)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation unit and where its numbers belong."""

    model: str  # "dense", "unrecovered" (what a recovery begins with) or "compressed"
    kind: str  # "text" or "task"
    label: str
    unit: Unit


@dataclass(frozen=True)
class Pipeline:
    """The groups of one run, in order, and the units whose artifacts make up its result."""

    config: RunConfig
    job: Job
    groups: list[Group]
    allocation: Unit | dict[str, Unit]  # or what was learned, by layer
    realised: dict[str, Unit]  # layer -> unit
    folder: Unit
    evaluations: list[Evaluation]


def build_pipeline(workspace: Workspace, config: RunConfig) -> Pipeline:
    """The groups of one run, in order.

    Raises:
        ConfigError, BudgetError: Method, options or budget do not fit the model.
    """
    config = with_absolute_paths(config)
    check_output(config, workspace.model.folder)
    job = make_job(workspace, config)
    method, models = job.method, workspace.models
    note = NOTE_OF_8_BITS.format(method=config.label)
    if method.form == EIGHT_BITS and note not in workspace.notes:
        workspace.notes.add(note)
    calibration, texts = workspace.texts
    collected, weighed, fisher, outputs = [], [], [], []
    wanted = method.needs_calibration or config.recovery is not None
    first = [calibration] if wanted and calibration is not None else []
    tokens = None
    if first:
        (tokens,) = first[0].units
        if method.reads_inputs or "similarity" in method.allocate.reads:
            collected = collect_groups(job, tokens)
        if method.reads_inputs:
            weighed = weigh_groups(job.model, method.weighting, _by_name(collected))
        if "fisher" in method.weighting.needs:
            fisher = [fisher_group(job, models, tokens)]
        outputs = output_groups(job, models, tokens)
    taps = _by_name(collected)
    gradients = {u.settings["gradients of"]: u for group in fisher for u in group.units}
    of_outputs = by_layer(outputs)
    decomposed = decompose_groups(job, taps, _by_name(weighed), gradients, of_outputs)
    layers = _by_name(decomposed)
    chosen, allocation = _choose(workspace, job, tokens, taps, layers, of_outputs)
    upstream = Upstream(taps, layers, allocation, of_outputs)
    if method.sequential:
        assert tokens is not None
        realised = sequential_groups(job, tokens, upstream)
    else:
        realised = realise_groups(job, upstream)
    factors = _by_name([group for group in realised if group.stage == "realise"])
    written = [materialise_group(job, factors)]
    (folder,) = written[0].units
    folders = {"compressed": folder}
    if config.recovery is not None:
        assert tokens is not None
        recovered, new = _recover(workspace, config, job, tokens, folder)
        written += recovered
        folders = {"unrecovered": folder, "compressed": new}
    evaluated, evaluations = evaluation_groups(workspace, config, texts, folders)
    groups = [*first, *texts.values(), *collected, *fisher, *outputs, *weighed]
    groups += [*decomposed, *chosen]
    groups += [*realised, *written, *evaluated]
    return Pipeline(config, job, groups, allocation, factors, folders["compressed"], evaluations)


def _recover(
    workspace: Workspace, config: RunConfig, job: Job, tokens: Unit, folder: Unit
) -> tuple[list[Group], Unit]:
    """What trains the folder on, step after step, and the unit of the last folder."""
    assert config.recover is not None and config.recovery is not None
    groups = []
    for step in config.recover.split("+"):
        if step == BLOCKS:
            made, folder = block_groups(job, config.recovery, tokens, folder)
        else:
            made, folder = recover_groups(job, workspace.models, config.recovery, tokens, folder)
        groups += made
    return groups, folder


def _choose(
    workspace: Workspace,
    job: Job,
    tokens: Unit | None,
    taps: dict[str, Unit],
    layers: dict[str, Unit],
    outputs: dict[str, Unit],
) -> tuple[list[Group], Unit | dict[str, Unit]]:
    """How the budget is divided: by an allocator, or by training, layer by layer."""
    if job.method.learn is not None:
        assert tokens is not None
        return learn_groups(job, workspace.models, tokens, layers)
    probed = probe_groups(job, workspace.models, tokens, layers)
    predicted = predict_groups(job, taps, layers, outputs)
    allocated = allocate_group(job, taps, layers, _by_name(probed), _by_name(predicted))
    return [*probed, *predicted, allocated], allocated.units[0]


def make_job(workspace: Workspace, config: RunConfig) -> Job:
    """What a configuration asks for, checked against the model.

    Raises:
        ConfigError, BudgetError: Method, options or budget do not fit the model.
    """
    model = workspace.model
    method = on_device(workspace.method(config), workspace)
    kept = Budget(config.known_kept, config.of).of_compressible(
        model.layout.layers, model.parameters
    )
    job = Job(
        model,
        method,
        kept,
        samples=config.samples,
        length=workspace.length,
        batch_size=workspace.batch_size,
        products=config.products,
        seed=config.seed,
        learn_seed=config.seed if config.learn_seed is None else config.learn_seed,
    )
    if method.learn is not None:
        return _with_numbers(job, method.learn)
    # In codes every layer takes less, and what allocators divide is a share of that.
    job = replace(job, kept=of_price(kept, model.layout.layers, job.layers))
    method.allocate.check(job.layers, job.kept)
    return job


def _with_numbers(job: Job, learner: Learner) -> Job:
    """The job of a method that learns, which counts numbers whatever they are stored in.

    Raises:
        ConfigError, BudgetError: Budget and text do not fit the model.
    """
    method, layers = job.method, [layer.in_full for layer in job.layers]
    kept = job.kept
    if method.coding is not None:
        entries = method.stores_entries
        kept = share_of_numbers(kept, job.layers, entries=entries, biases=learner.biases)
    try:
        learner.check(layers, kept, job.samples)
    except BudgetError as error:
        if method.coding is None:
            raise
        bits = method.coding.bits
        beside = f" (in {bits} bits kept={job.kept:g} holds {kept:.4f} of the numbers)"
        raise BudgetError(f"{error}{beside}") from None
    return replace(job, kept=kept)


def with_absolute_paths(config: Asked) -> Asked:
    """The same command, so described that it can be repeated from any folder."""

    def local(source: str) -> str:  # a hub id stays what it is, and what cannot be looked at
        with suppress(OSError, RuntimeError):
            path = Path(source).expanduser()
            return str(path.resolve()) if path.exists() else source
        return source

    folders = {
        name: folder.expanduser().resolve()
        for name in ("output", "report")
        if (folder := getattr(config, name, None)) is not None
    }
    return config.model_copy(
        update={
            **folders,
            "model": local(config.model),
            "calibration": config.calibration and local(config.calibration),
            "eval_text": [local(text) for text in config.eval_text],
            "tasks": [local(task) if is_path(task) else task for task in config.tasks],
            "task_path": config.task_path and config.task_path.expanduser().resolve(),
            "home": config.home.expanduser().resolve(),
        }
    )


def _by_name(groups: list[Group]) -> dict[str, Unit]:
    return {unit.name: unit for group in groups for unit in group.units}


def evaluation_groups(
    workspace: Workspace, config: RunConfig, texts: dict[str, Group], folders: dict[str, Unit]
) -> tuple[list[Group], list[Evaluation]]:
    """Every text and task on the dense model and on compressed folders, in order.

    Args:
        workspace: What all runs share.
        config: How tasks are asked.
        texts: Label to the group that cuts a text into windows.
        folders: What people call a compressed model, to the unit that holds its folder.
    """
    groups, evaluations = [], []
    measured: dict[str, Unit] = {}  # of the dense model, which comes first
    for which, compressed in {"dense": None, **folders}.items():
        for label, text in texts.items():
            group = text_group(
                workspace.models,
                text.units[0],
                compressed,
                measured.get(label),
                which=which,
                batch_size=workspace.batch_size,
                label=label,
                expected_tokens=config.eval_windows * workspace.length,
            )
            groups.append(group)
            measured.setdefault(label, group.units[0])
            evaluations.append(Evaluation(which, "text", label, group.units[0]))
        for spec in workspace.tasks:
            group = task_group(
                workspace.models,
                spec,
                compressed,
                which=which,
                batch_size=workspace.batch_size,
                asking=Asking(config.task_limit, config.num_fewshot, config.apply_chat_template),
                tell=workspace.notes.add,
            )
            groups.append(group)
            evaluations.append(Evaluation(which, "task", spec.name, group.units[0]))
    return groups, evaluations
