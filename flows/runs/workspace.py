"""What all runs of one command share: store, model, texts and tasks, opened and checked once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from compress_core.batch import windows_at_once
from compress_core.errors import ConfigError
from compress_core.hf.checkpoint import resolve_model
from compress_core.hf.lm_eval_tasks import TaskSpec, find_tasks
from compress_core.hf.states import Room
from compress_core.hf.text import clip_length
from compress_core.method import Method
from compress_core.methods import build_method
from compress_core.versions import library_versions
from flows.runs.notes import Notes, notes_of
from flows.runs.stores import open_store
from flows.settings.checks import check_windows, choose_device, sharing_memory
from flows.settings.config import RunConfig, Settings
from flows.settings.home import DIGESTS, open_home
from storage.digests import DigestCache
from storage.store import Store
from tasks.engine.dense_model import DenseModel
from tasks.engine.free_memory import free_memory
from tasks.engine.session import Listener, Session
from tasks.engine.units import Outcome
from tasks.engine.whole_models import Models
from tasks.engine.work import Group
from tasks.stages.scratch import SCRATCH
from tasks.stages.tokenise import NOTES, TEXT, Text, calibration_group, evaluation_group

LIBRARIES = 800_000_000
"""Bytes that they hold once a run has loaded them."""
STATES_SHARE = 4
"""Hidden states of one model are in memory where they take at most one in so many free bytes, and
on an accelerator where that is so of half as many."""


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
        methods: Built so far, by what the user called them.
        refreshed: Keys that --refresh has computed again already.
        earlier: Key to outcome of what was computed before the flow.
        command: Name of the command, of its own.
    """

    settings: Settings
    store: Store
    digests: DigestCache
    model: DenseModel
    models: Models
    length: int
    tasks: list[TaskSpec]
    notes: Notes = field(default_factory=Notes)
    methods: dict[str, Method] = field(default_factory=dict)
    refreshed: set[str] = field(default_factory=set)
    earlier: dict[str, Outcome] = field(default_factory=dict)
    command: str = field(default_factory=lambda: uuid4().hex)

    def confirm(self, stage: str) -> None:
        """Refuses to keep what a stage computed if files that it may have read were changed.

        Raises:
            StorageError: One was.
        """
        self.digests.check_unchanged(but=None if stage == "tokenise" else TEXT)

    def method(self, config: RunConfig) -> Method:
        """The method of one of the command's runs, built once."""
        if config.method not in self.methods:
            built = build_method(config.method, config.options, config.allocate, *config.made_by)
            self.methods[config.method] = built
        return self.methods[config.method]

    @cached_property
    def batch_size(self) -> int:
        """Windows per forward: what was asked for, else what free memory allows."""
        asked = self.settings.batch_size
        if asked != "auto":
            return asked
        free, device = allowed_memory(self.settings, self.model.device), self.model.device
        return windows_at_once(self.model.layout, self.length, free, device)

    def session(
        self, refresh: Sequence[str] = (), listener: Listener = lambda label, done, total: None
    ) -> Session:
        """A run's session against the store.

        Args:
            refresh: Stages that are computed again even when they are cached.
            listener: Told of progress inside a group.
        """
        return Session(
            self.store,
            refresh=refresh,
            listener=listener,
            info={"device": self.model.device, "versions": library_versions()},
            refreshed=self.refreshed,
            earlier=self.earlier,
            release=self.models.drop,
            confirm=self.confirm,
            command=self.command,
        )

    @cached_property
    def texts(self) -> tuple[Group | None, dict[str, Group]]:
        """The calibration group, if there is calibration text, and label to evaluation group."""
        return text_groups(self)


def allowed_for_one(settings: Settings) -> int | None:
    """Bytes that --memory leaves each process that computes; None without it."""
    return None if settings.memory is None else memory_of_one(settings, 0)


def memory_of_one(settings: Settings, free: int) -> int:
    """Bytes of each process that computes, libraries and all, where so many are free besides."""
    return (settings.memory or free + LIBRARIES) // sharing_memory(settings)


def allowed_memory(settings: Settings, device: str) -> int:
    """Bytes of a device's memory that each process that computes may still take, when the libraries
    are loaded.
    """
    free = free_memory(device)
    if device != choose_device(settings.device):
        return free  # --memory is of the device where the model runs
    return min(free, max(0, memory_of_one(settings, free) - LIBRARIES))


def _room(settings: Settings, device: str) -> Room:
    """Where hidden states go."""
    return Room(
        allowed_memory(settings, "cpu") // STATES_SHARE,
        settings.home.expanduser().absolute(),
        allowed_memory(settings, device) // (2 * STATES_SHARE) if device != "cpu" else 0,
    )


def open_workspace(settings: Settings, planning: bool = False) -> Workspace:
    """Opens store and model and finds the tasks.

    Args:
        settings: The command's.
        planning: Whether nothing will be computed, so that a model without weights will do.

    Raises:
        CompressError, StorageError: Something the user asked for cannot be had.
    """
    home = settings.home.expanduser()
    open_home(home)
    notes = Notes()
    # what only lasts as long as a run, its states and checkpoints, stays on this disk
    store = open_store(home, settings.store, notes.add, {SCRATCH})
    digests = DigestCache(home / DIGESTS)
    device = choose_device(settings.device)
    folder = resolve_model(settings.model)
    local = Path(settings.model).expanduser().is_dir()
    name = None if local else settings.model.rstrip("/").rpartition("/")[2]  # not a cache's folder
    model = DenseModel(
        folder,
        digests,
        device,
        settings.trust_remote_code,
        name,
        settings.compute,
        _room(settings, device),
        weightless=planning,
    )
    length = clip_length(settings.length, model.config)
    for note in notes_of(model, settings.length, length):
        notes.add(note)
    if settings.calibration is not None:
        check_windows(settings.samples, length, free_memory("cpu"))
    tasks = find_tasks(settings.tasks, settings.task_path) if settings.tasks else []
    _check_asking(settings, model, tasks, notes)
    return Workspace(settings, store, digests, model, Models(model), length, tasks, notes)


def _check_asking(
    settings: Settings, model: DenseModel, tasks: Sequence[TaskSpec], notes: Notes
) -> None:
    """Refuses a chat template that is not there, and says where --num-fewshot does nothing."""
    if settings.apply_chat_template and not model.tokenizer.chat_template:
        raise ConfigError(
            f"--apply-chat-template: the tokenizer of {model.folder} has no chat template; leave "
            "it out or give a chat model"
        )
    fixed = [name for task in tasks for name in task.fixed_shots()] if settings.num_fewshot else []
    if fixed:
        notes.append(
            f"--num-fewshot {settings.num_fewshot} leaves out {', '.join(fixed)}: lm-eval keeps "
            "tasks whose own file says num_fewshot: 0"
        )


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
            settings.skip_bad_rows,
            "calibration",
            "--calibration-field",
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
    texts = [
        Text(source, settings.eval_field, skip_bad_rows=settings.skip_bad_rows)
        for source in settings.eval_text
    ]
    if calibration is not None and held_out:
        texts = [replace(text, part="held-out")]
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
    session = Session(
        workspace.store,
        workspace.settings.refresh,
        refreshed=workspace.refreshed,
        confirm=workspace.confirm,
        command=workspace.command,
    )
    wanted = [calibration] if needs_calibration and calibration is not None else []
    for group in [*wanted, *texts.values()]:
        for outcome in session.run(group):
            if outcome.state == "computed":
                workspace.earlier[outcome.key] = outcome
        for unit in group.units:
            for note in session.manifests[unit].info.get(NOTES, ()):
                if note not in workspace.notes:
                    workspace.notes.add(note)
