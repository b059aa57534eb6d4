"""What can be refused is refused here, before a stage runs: settings, model, texts, tasks.

Also the place where a configuration becomes the groups of units that the flow then runs in order.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compress_core.hf.checkpoint import resolve_model
from compress_core.hf.layout import load_config
from compress_core.hf.lm_eval_tasks import TaskSpec, find_tasks
from compress_core.hf.text import clip_length
from compress_core.methods import build_method
from compress_core.types import Budget
from flows.checks import choose_device
from flows.config import RunConfig, Settings
from flows.console import current_reporter
from flows.home import open_home
from flows.output import check_output
from storage.digests import DigestCache
from storage.store import Store
from tasks.allocate import allocate_group
from tasks.collect import collect_groups
from tasks.decompose import decompose_groups
from tasks.evaluate import Models, task_group, text_group
from tasks.fisher import fisher_group
from tasks.job import Job
from tasks.learn import learn_groups
from tasks.materialise import materialise_group
from tasks.model import DenseModel
from tasks.probe import probe_groups
from tasks.realise import Upstream, realise_groups
from tasks.recover import recover_groups
from tasks.sequential import sequential_groups
from tasks.tokenise import Text, calibration_group, evaluation_group
from tasks.units import Group, Outcome, Session, Unit
from tasks.whiten import whiten_groups

EIGHT_BITS = (
    "{method} is mixed quantisation: it stores factors in 8 bits, and two such numbers count as "
    "one parameter; compare its rows only with those of methods that store 8-bit numbers"
)


@dataclass
class Workspace:
    """What all runs of one command share.

    Attributes:
        settings: The command's settings.
        store: Artifacts.
        digests: Remembered file contents.
        model: The dense model.
        models: Whole models held for evaluation.
        length: Tokens per window, clipped to the model's context.
        tasks: lm-eval tasks, found.
        notes: What people should be told.
        refreshed: Keys that --refresh has computed again already.
        earlier: Key to outcome of what was computed before the flow.
    """

    settings: Settings
    store: Store
    digests: DigestCache
    model: DenseModel
    models: Models
    length: int
    tasks: list[TaskSpec]
    notes: list[str] = field(default_factory=list)
    refreshed: set[str] = field(default_factory=set)
    earlier: dict[str, Outcome] = field(default_factory=dict)

    @cached_property
    def texts(self) -> tuple[Group | None, dict[str, Group]]:
        """The calibration group, if there is calibration text, and label to evaluation group."""
        return text_groups(self)


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


def open_workspace(settings: Settings) -> Workspace:
    """Opens store and model and finds the tasks.

    Raises:
        CompressError, StorageError: Something the user asked for cannot be had.
    """
    home = settings.home.expanduser()
    open_home(home)
    notes: list[str] = []

    def tell(problem: str) -> None:
        notes.append(problem)
        if reporter := current_reporter.get():  # before there is one, notes are told together
            reporter.note(problem)

    store = Store(home / "store", on_problem=tell)
    digests = DigestCache(home / "digests.json")
    device = choose_device(settings.device)
    folder = resolve_model(settings.model)
    local = Path(settings.model).expanduser().is_dir()
    name = None if local else settings.model.rstrip("/").rpartition("/")[2]  # not a cache's folder
    model = DenseModel(folder, digests, device, settings.trust_remote_code, name)
    config = load_config(model.checkpoint, settings.trust_remote_code)
    length = clip_length(settings.length, config)
    if length < settings.length:
        notes.append(
            f"windows are {length} tokens long, not {settings.length}: "
            "the model's context ends there"
        )
    tasks = find_tasks(settings.tasks, settings.task_path) if settings.tasks else []
    return Workspace(settings, store, digests, model, Models(model), length, tasks, notes)


def text_groups(workspace: Workspace) -> tuple[Group | None, dict[str, Group]]:
    """The calibration group, if there is calibration text, and label to evaluation group."""
    settings, model = workspace.settings, workspace.model
    held_out = settings.calibration is not None and not settings.eval_text
    calibration = None
    if settings.calibration is not None:
        text = Text(
            settings.calibration,
            settings.calibration_field,
            "calibration" if held_out else "all",
        )
        calibration = calibration_group(
            model,
            text,
            workspace.digests,
            samples=settings.samples,
            length=workspace.length,
            seed=settings.seed,
            bos=settings.bos,
        )
    texts = [Text(source, settings.eval_field) for source in settings.eval_text]
    if held_out and settings.calibration is not None:
        texts = [Text(settings.calibration, settings.calibration_field, "held-out")]
        workspace.notes.append(
            f"no --eval-text: the last tenth of {settings.calibration} is held back for it"
        )
    labels = [text.label for text in texts]
    groups = {
        (text.label if labels.count(text.label) == 1 else text.source): evaluation_group(
            model,
            text,
            workspace.digests,
            length=workspace.length,
            windows=settings.eval_windows or None,
        )
        for text in texts
    }
    return calibration, groups


def read_texts(workspace: Workspace, needs_calibration: bool) -> None:
    """Tokenises what the runs will read, so that a text that will not do is refused at once.

    Raises:
        TextError: A text cannot be read or is too short for one window.
    """
    calibration, texts = workspace.texts
    session = Session(workspace.store, workspace.settings.refresh, refreshed=workspace.refreshed)
    wanted = [calibration] if needs_calibration and calibration is not None else []
    for group in [*wanted, *texts.values()]:
        for outcome in session.run(group):
            if outcome.state == "computed":
                workspace.earlier[outcome.key] = outcome


def build_pipeline(workspace: Workspace, config: RunConfig) -> Pipeline:
    """The groups of one run, in order.

    Raises:
        ConfigError, BudgetError: Method, options or budget do not fit the model.
    """
    config = with_absolute_paths(config)
    check_output(config, workspace.model.folder)
    job = make_job(workspace, config)
    method, models = job.method, workspace.models
    note = EIGHT_BITS.format(method=config.label)
    if method.eight_bits and note not in workspace.notes:
        workspace.notes.append(note)
    calibration, texts = workspace.texts
    collected, whitened, fisher = [], [], []
    wanted = method.needs_calibration or config.recovery is not None
    first = [calibration] if wanted and calibration is not None else []
    tokens = None
    if first:
        (tokens,) = first[0].units
        if method.reads_inputs or "similarity" in method.allocate.reads:
            collected = collect_groups(job, tokens)
        if method.reads_inputs:
            whitened = whiten_groups(job.model, method.whiten, _by_name(collected))
        if "fisher" in method.whiten.needs:
            fisher = [fisher_group(job, models, tokens)]
    taps = _by_name(collected)
    gradients = {u.settings["gradients of"]: u for group in fisher for u in group.units}
    decomposed = []
    if method.prune is None:
        decomposed = decompose_groups(job, taps, _by_name(whitened), gradients)
    layers = _by_name(decomposed)
    chosen, allocation = _choose(workspace, job, tokens, taps, layers)
    upstream = Upstream(taps, layers, allocation)
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
        recovered, new = recover_groups(job, models, config.recovery, tokens, folder)
        written += recovered
        folders = {"unrecovered": folder, "compressed": new}
    evaluated, evaluations = _evaluation_groups(workspace, config, texts, folders)
    groups = [*first, *texts.values(), *collected, *fisher, *whitened, *decomposed, *chosen]
    groups += [*realised, *written, *evaluated]
    return Pipeline(config, job, groups, allocation, factors, folders["compressed"], evaluations)


def _choose(
    workspace: Workspace,
    job: Job,
    tokens: Unit | None,
    taps: dict[str, Unit],
    layers: dict[str, Unit],
) -> tuple[list[Group], Unit | dict[str, Unit]]:
    """How the budget is divided: by an allocator, or by training, layer by layer."""
    if job.method.learn is not None:
        assert tokens is not None
        return learn_groups(job, workspace.models, tokens, layers)
    probed = probe_groups(job, workspace.models, tokens, layers)
    allocated = allocate_group(job, taps, layers, _by_name(probed))
    return [*probed, allocated], allocated.units[0]


def make_job(workspace: Workspace, config: RunConfig) -> Job:
    """What a configuration asks for, checked against the model.

    Raises:
        ConfigError, BudgetError: Method, options or budget do not fit the model.
    """
    model = workspace.model
    method = build_method(config.method, config.options, config.allocate)
    kept = Budget(config.share, config.of).of_compressible(model.layout.layers, model.parameters)
    job = Job(
        model,
        method,
        kept,
        samples=config.samples,
        length=workspace.length,
        batch_size=config.batch_size,
        products=config.products,
        seed=config.seed,
        learn_seed=config.seed if config.learn_seed is None else config.learn_seed,
    )
    if method.learn is not None:
        method.learn.check(job.layers, kept, job.samples)
    else:
        method.allocate.check(job.layers, kept)
    return job


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, so described that it can be repeated from any folder."""

    def local(source: str) -> str:  # a hub id stays what it is
        path = Path(source).expanduser()
        return str(path.resolve()) if path.exists() else source

    return config.model_copy(
        update={
            "model": local(config.model),
            "calibration": config.calibration and local(config.calibration),
            "eval_text": [local(text) for text in config.eval_text],
            "task_path": config.task_path and config.task_path.expanduser().resolve(),
            "home": config.home.expanduser().resolve(),
            "output": config.output and config.output.expanduser().resolve(),
        }
    )


def _by_name(groups: list[Group]) -> dict[str, Unit]:
    return {unit.name: unit for group in groups for unit in group.units}


def _evaluation_groups(
    workspace: Workspace, config: RunConfig, texts: dict[str, Group], folders: dict[str, Unit]
) -> tuple[list[Group], list[Evaluation]]:
    groups, evaluations = [], []
    for which, compressed in {"dense": None, **folders}.items():
        for label, text in texts.items():
            group = text_group(
                workspace.models,
                text.units[0],
                compressed,
                which=which,
                batch_size=config.batch_size,
                label=label,
                expected_tokens=config.eval_windows * workspace.length,
            )
            groups.append(group)
            evaluations.append(Evaluation(which, "text", label, group.units[0]))
        for spec in workspace.tasks:
            group = task_group(
                workspace.models,
                spec,
                compressed,
                which=which,
                batch_size=config.batch_size,
                limit=config.task_limit,
            )
            groups.append(group)
            evaluations.append(Evaluation(which, "task", spec.name, group.units[0]))
    return groups, evaluations
