"""`eigenpress bench`: how fast a compressed model answers beside the dense one, and its memory."""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from compress_core.errors import ConfigError
from flows.commands.look import Home, Json, said
from flows.settings.belonging import MACHINE, TEXT
from flows.settings.home import default_home, use_home
from flows.settings.reading import read_yaml

Tell = Callable[[str], None]
MODEL_WORD = "DIR|NAME"
DENSE, COMPRESSED = "dense", "compressed"


@dataclass(frozen=True)
class Asked:
    """What `bench` was asked for; the fields are its flags."""

    model: str
    home: Path
    against: str | None = None
    batch: str = "1,8"
    prompt_tokens: str = "128"
    new_tokens: int = 32
    repeats: int = 5
    device: str = "auto"
    compute: str = "auto"
    trust_remote_code: bool = False


def bench(
    model: Annotated[str, typer.Argument(help="compressed model", metavar=MODEL_WORD)],
    against: Annotated[str | None, said("dense model; else the one it was made from", "DIR|ID")] = (
        None
    ),
    batch: Annotated[str, said("prompts at once, one or more numbers", "N,N")] = "1,8",
    prompt_tokens: Annotated[str, said("tokens of a prompt, one or more numbers", "N,N")] = "128",
    new_tokens: Annotated[int, said("tokens written behind it", "N")] = 32,
    repeats: Annotated[int, said("turns of which the median counts", "N")] = 5,
    device: Annotated[str, said("auto, cpu, cuda, ...", "NAME", MACHINE)] = "auto",
    compute: Annotated[str, said("dtype to run in, as of run", "NAME", MACHINE)] = "auto",
    trust_remote_code: Annotated[
        bool,
        said("let the model folder's own Python run", None, TEXT, flag="--trust-remote-code"),
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory of a compressed model beside the dense one.

    Of a registered version the metrics go to its run, as speed/...
    """
    where = use_home(home or default_home())
    asked = Asked(
        *(model, where, against, batch, prompt_tokens, new_tokens, repeats, device, compute),
        trust_remote_code,
    )
    result = measure(asked, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show(result)


def measure(asked: Asked, tell: Tell) -> dict[str, Any]:
    """Measures, and adds the metrics to the run of a registered version.

    Raises:
        ConfigError, ModelError: A flag, a folder or the dense model will not do.
        TrackingError: The version is not there, or its run takes no metrics.
    """
    from compress_core.hf import speed
    from flows.runs.referring import folder_or_version
    from flows.settings.checks import choose_device

    folder, version = folder_or_version(asked.model, asked.home)
    folders = {DENSE: _dense_of(folder, asked.against), COMPRESSED: folder}
    loads = [
        speed.Load(batch, prompt, asked.new_tokens)
        for prompt in _numbers("prompt-tokens", asked.prompt_tokens)
        for batch in _numbers("batch", asked.batch)
    ]
    if asked.repeats < 1:
        raise ConfigError(f"--repeats is 1 or more, got {asked.repeats}")
    for load in loads:
        for one in folders.values():
            speed.check_load(one, load)
    device = choose_device(asked.device)
    result = _measure(folders, loads, replace(asked, device=device), tell)
    if version is not None:
        from tasks.tracking.registered_model import tag_version
        from tasks.tracking.versions import log_metrics

        metrics = metrics_of(result)
        log_metrics(asked.home, version, metrics)
        tag_version(asked.home, version, "speed", conditions_of(result))
        result |= {"version": f"{version.name}/{version.version}", "metrics": metrics}
    return result


def _measure(
    folders: Mapping[str, Path], loads: list[Any], asked: Asked, tell: Tell
) -> dict[str, Any]:
    import torch

    from compress_core.compute import COMPUTE, compute_dtype
    from compress_core.hf import speed
    from compress_core.hf.loading import load_model

    if asked.compute not in COMPUTE:
        raise ConfigError(f"--compute is one of {', '.join(COMPUTE)}, got {asked.compute!r}")
    trusted = asked.trust_remote_code
    tell("loading both models")
    plain = {n: load_model(f, trust_remote_code=trusted) for n, f in folders.items()}
    stored = str(next(plain[DENSE].parameters()).dtype).removeprefix("torch.")
    dtype = compute_dtype(asked.compute, stored, asked.device)
    models = {n: m.to(asked.device, dtype=getattr(torch, dtype)) for n, m in plain.items()}
    products = {name: speed.products_per_token(model) for name, model in models.items()}

    def begun(load: Any) -> None:
        tell(f"batch {load.batch}, {load.prompt_tokens} + {load.new_tokens} tokens")

    speeds = speed.in_turns(models, loads, asked.repeats, begun)
    del models, plain
    rows: list[dict[str, Any]] = []
    for number, load in enumerate(loads):
        row: dict[str, Any] = asdict(load)
        for name, folder in folders.items():
            tell(f"memory of the {name} model, batch {load.batch}")
            peak = speed.peak_bytes(folder, load, asked.device, dtype, trusted)
            one = replace(speeds[name][number], peak_bytes=peak)
            row[name] = {**one.metrics(), "spread": one.spread()}
        dense, own = speeds[DENSE][number], speeds[COMPRESSED][number]
        row["speedup"] = {kind: own.faster_than(dense, kind) for kind in speed.KINDS}
        rows.append(row)
    return {
        "folder": str(folders[COMPRESSED]),
        "against": str(folders[DENSE]),
        "device": asked.device,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "repeats": asked.repeats,
        "products_per_token": products,
        "ideal_speedup": products[DENSE] / products[COMPRESSED],
        "loads": rows,
    }


def conditions_of(result: Mapping[str, Any]) -> str:
    """What speed under plain names was measured on, as JSON: only like is compared with like."""
    load = {name: result["loads"][0][name] for name in ("batch", "prompt_tokens", "new_tokens")}
    where = {name: result[name] for name in ("device", "threads", "dtype")}
    return json.dumps({"machine": platform.node(), **where, **load})


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What gates can read: of the first load by plain names, of every one by batch and prompt."""
    found = {"speed/ideal_speedup": float(result["ideal_speedup"])}
    for number, row in enumerate(result["loads"]):
        own = {name: value for name, value in row[COMPRESSED].items() if name != "spread"}
        own |= {f"{kind}_speedup": value for kind, value in row["speedup"].items()}
        own["peak_quotient"] = own["peak_bytes"] / row[DENSE]["peak_bytes"]
        places = [f"speed/batch_{row['batch']}/prompt_{row['prompt_tokens']}/"]
        for place in [*places, "speed/"] if not number else places:
            found |= {place + name: float(value) for name, value in own.items()}
    return found


def show(result: Mapping[str, Any]) -> None:
    """The table and what it is measured on."""
    from flows.report.lines import make_console, say
    from flows.report.tables import Column, fitted_tables

    console = make_console()
    rows = [(row, name) for row in result["loads"] for name in (DENSE, COMPRESSED)]
    keys = [
        Column("batch", [str(row["batch"]) for row, _ in rows]),
        Column("prompt", [str(row["prompt_tokens"]) for row, _ in rows]),
        Column("model", [name for _, name in rows]),
    ]

    def rate(kind: str) -> list[str]:
        return [
            f"{row[n][f'{kind}_tokens_per_second']:.4g} ±{row[n]['spread'][kind]:.0%}"
            for row, n in rows
        ]

    def quotient(kind: str) -> list[str]:
        return [f"{row['speedup'][kind]:.2f}" if n == COMPRESSED else "" for row, n in rows]

    columns = [
        Column("prefill tok/s", rate("prefill")),
        Column("×", quotient("prefill")),
        Column("decode tok/s", rate("decode")),
        Column("×", quotient("decode")),
        Column("first s", [f"{row[n]['first_token_seconds']:.3g}" for row, n in rows]),
        Column("peak MB", [f"{row[n]['peak_bytes'] / 1e6:.0f}" for row, n in rows]),
    ]
    for table in fitted_tables(keys, columns, console.width):
        console.print(table)
    say(console, "")
    say(
        console,
        f"× is the compressed model's speed as a multiple of the dense one's in the same turn, on "
        f"this machine ({result['device']}, {result['threads']} threads, {result['dtype']}, median "
        f"of {result['repeats']}, ± the farthest one). With nothing but weights to multiply it "
        f"would be {result['ideal_speedup']:.2f}.",
    )
    if "version" in result:
        say(console, f"metrics speed/... are on the run of {result['version']}")


def _dense_of(folder: Path, against: str | None) -> Path:
    """The model to compare with: what was said, else what the folder was made from.

    Raises:
        ConfigError: It is not said, and the folder does not say it.
        ModelError: It is not there.
    """
    from compress_core.hf.checkpoint import resolve_model
    from flows.settings.output import CONFIG_FILE

    if against is None:
        settings = folder / CONFIG_FILE
        against = str(read_yaml(settings).get("model") or "") if settings.is_file() else ""
        if not against:
            raise ConfigError(
                f"{folder} does not say which model it was made from: give --against DENSE"
            )
    return resolve_model(against)


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 10**6 for part in parts):
        raise ConfigError(f"--{flag} is one or more numbers above 0, like 1,8; got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))
