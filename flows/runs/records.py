"""Records of runs in the data directory: what each made and used, for people, `ls` and `gc`."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from compress_core.secrets import hide_all
from flows.settings.home import RUNS
from storage.errors import StorageError
from storage.records import NoRecordError, read_record, write_record
from tasks.tracking.speaking import registry_of

FORMAT = 1


def save_run_record(home: Path, config: BaseModel | None, result: dict[str, Any]) -> Path:
    """Writes what a run made, so that garbage collection knows what recent runs reach.

    Raises:
        StorageError: It cannot be written.
    """
    now = datetime.now(UTC)
    file = home.expanduser() / RUNS / f"{now:%Y%m%dT%H%M%S}-{uuid4().hex[:8]}.json"
    record = {
        "format": FORMAT,
        "created": now.isoformat(),
        "registry": registry_of(home.expanduser()),
        "config": config and hide_all(config.model_dump(mode="json")),
        "result": result,
    }
    write_record(file, record, indent=1)
    return file


class RunRecord:
    """One run as its record tells it.

    Args:
        fields: What is in the file.

    Attributes:
        created: When it ended.
        keys: Key to whether the run computed it, of all artifacts it used.
        registry: Where its model was registered, as `registry_of` has it; None of records from
            before that was written.
        model: Name of the dense model; "" of a demonstration's training.
        what: Method and budget.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is no record of a run.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        result = fields["result"]
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
            fields = read_record(file, unsealed=True)
            if fields.get("format", FORMAT) != FORMAT:
                raise NoRecordError(f"it has format {fields['format']}, known is {FORMAT}")
            yield RunRecord(fields)
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
