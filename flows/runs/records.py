"""Records of runs in the data directory: what each made and used, for people, `ls` and `gc`."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from compress_core.errors import ConfigError
from compress_core.forms.names import AUTO, BITS, FORM, FULL, PLAIN
from compress_core.metric_names import INPUTS, METRIC
from compress_core.secrets import hide_all
from flows.settings.home import RUNS
from storage.errors import StorageError
from storage.records import NoRecordError, read_record, write_record
from storage.store import Store
from tasks.tracking.speaking import registry_of

FORMAT = 4
RECENT_DAYS = 14.0
"""What runs of this many days used stays, if nothing else is asked for."""
UNSAID = {FORM: PLAIN, METRIC: INPUTS, BITS: FULL}
"""What format 1 has where nothing was said of these, whatever the method then did."""


def new_name() -> str:
    """A name for a run's record or for a sweep: when, and eight digits that no other has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:8]}"


def save_run_record(
    home: Path, config: BaseModel | None, result: dict[str, Any], sweep: str = ""
) -> Path:
    """Writes what a run made, so that garbage collection knows what recent runs reach.

    Args:
        home: Data directory.
        config: What was asked for, if anything was.
        result: The run's.
        sweep: Name of the sweep that it is part of.

    Raises:
        StorageError: It cannot be written.
    """
    file = home.expanduser() / RUNS / f"{new_name()}.json"
    record = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(),
        "registry": registry_of(home.expanduser()),
        "config": config and hide_all(config.model_dump(mode="json")),
        "result": result,
        **({"sweep": sweep} if sweep else {}),
    }
    write_record(file, record, indent=1)
    return file


def tell_others(file: Path, store: Store, note: Callable[[str], None]) -> None:
    """Tells whoever shares the store what a run used, so that their garbage collection keeps it.

    Args:
        file: The run's record.
        store: The store that it used.
        note: Told where that did not go: the run itself is done.
    """
    record = RunRecord(_fields(file), file.stem)
    try:
        store.note_run(file.stem, record.created.isoformat(), record.keys, record.registry or "")
    except StorageError as error:
        note(
            f"other machines were not told what this run used, so that a `store gc` of theirs may "
            f"free what is not of the last {RECENT_DAYS:g} days: {error}"
        )


class RunRecord:
    """One run as its record tells it.

    Args:
        fields: What is in the file.
        name: The file's, without its ending.

    Attributes:
        name: What people call it by.
        created: When it ended.
        sweep: Name of the sweep that it is part of; "" of a run by itself.
        run_id: Of the run in MLflow; "" where it has none.
        model_dir: Its model folder; "" where it has none.
        keys: Key to whether the run computed it, of all artifacts it used.
        registry: Where its model was registered, as `registry_of` has it; None of records from
            before that was written.
        model: Name of the dense model; "" of a demonstration's training.
        what: Method and budget.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is no record of a run.
    """

    def __init__(self, fields: dict[str, Any], name: str = "") -> None:
        result = fields["result"]
        self.name = name
        self.sweep = str(fields.get("sweep", ""))
        self.run_id = str(result.get("run_id", ""))
        self.model_dir = str(result.get("model_dir", ""))
        self.created = datetime.fromisoformat(fields["created"])
        if self.created.tzinfo is None:
            raise ValueError("its time has no zone")
        self.keys = {
            str(stage["key"]): stage["state"] == "computed"
            for stage in result["stages"]
            if stage["name"] != "register"
        }
        self.registry = fields.get("registry")
        self.model = str(result.get("model", ""))
        self.what = f"{result['method']} kept {result['kept']:g}" if self.model else "training"


def read_run_records(home: Path, on_damage: Callable[[StorageError], None]) -> Iterator[RunRecord]:
    """The records of all runs, oldest first; one that is removed meanwhile is left out.

    Args:
        home: Data directory.
        on_damage: Given the refusal of a record that is damaged, or of a newer version; it may
            raise it.
    """
    for file in sorted((home / RUNS).glob("*.json")):
        try:
            yield RunRecord(_fields(file), file.stem)
        except FileNotFoundError:
            continue
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            on_damage(
                StorageError(
                    f"the record of a run {file} is damaged ({why}), so what that run needs is "
                    "not known; delete it if it needs nothing any more"
                )
            )


def read_run(home: Path, name: str) -> dict[str, Any]:
    """Everything in the record of a run: "created", "config", "result" and perhaps "sweep".

    Raises:
        StorageError: It was removed or is damaged.
    """
    file = home / RUNS / f"{name}.json"
    try:
        fields = _fields(file)
    except (FileNotFoundError, NoRecordError) as error:
        raise StorageError(f"the record of a run {file} cannot be read: {error}") from error
    if fields.get("format", 1) < FORMAT and isinstance(fields.get("config"), dict):
        fields["config"] = _with_its_form(fields["config"], fields.get("format", 1))
    return fields


def _with_its_form(config: dict[str, Any], version: int) -> dict[str, Any]:
    """What who said nothing of factors got: up to format 2 plain ones, of `press` the smaller ones.

    In format 3 the smaller ones, of `soco` plain ones.
    """
    from compress_core.methods import build_method, parse_variant  # for `ls` too dear: torch

    try:
        name = parse_variant(config["method"]).name
        method = build_method(config["method"], config["options"], config["allocate"], bits=FULL)
    except (ConfigError, KeyError):  # what is no method any more says nothing of its form
        return config
    learned = name == "soco"  # whose products were plain in `auto`, too
    said = config.get(FORM)
    silent = (said is None or (learned and said == AUTO)) and f":{FORM}=" not in config["method"]
    plain = learned or (version <= 2 and name != "press")
    return config | {FORM: PLAIN} if silent and plain and method.form == AUTO else config


def _fields(file: Path) -> dict[str, Any]:
    fields = read_record(file, unsealed=True)
    found = fields.get("format", 1)
    if found not in range(1, FORMAT + 1):
        raise NoRecordError(f"it has format {found}, known is {FORMAT}")
    config = fields.get("config")
    if found == 1 and isinstance(config, dict):
        said = {n: None if UNSAID.get(n, "") == v else v for n, v in config.items()}
        fields["config"] = said
    return fields
