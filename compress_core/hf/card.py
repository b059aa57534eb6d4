"""The model card of a compressed folder: what it is, what it was measured at, how to load it.

It says nothing that changes from run to run (no time, no place, no user), so the same model has the
same card. The base model's own card is not copied: only its licence and languages are taken over.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from compress_core.secrets import hide

LICENCE = ("license", "license_name", "license_link")
ERROR = "_stderr"  # ends the names of standard errors, as lm-eval writes them
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # a folder of the hub's cache


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        base: The dense model: a folder, or an id on the hub.
        folder: Its local folder, whose README.md names its licence.
        method: As people see it, with allocator and options.
        summary: The method in one line.
        paper: arXiv id of the method's paper; "" for none.
        calibration: Text that it was calibrated on, with how much of it; "" for none.
        dataset: Id on the hub of that text, if it is one.
        command: Makes the model again.
        version: Of the code.
        result: The run's result, as ``eigenpress run --json`` prints it.
    """

    base: str
    folder: Path
    method: str
    summary: str
    paper: str
    calibration: str
    dataset: str | None
    command: str
    version: str
    result: Mapping[str, Any]


def model_card(facts: Facts) -> str:
    """The whole file, front matter first, without secrets."""
    licence = _base_metadata(facts.folder)
    metrics = facts.result["metrics"]
    base = hub_id(facts.base)
    data = ModelCardData(
        base_model=base,
        datasets=[facts.dataset] if facts.dataset else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eigenpress", "compressed", "custom_code", _word(facts.method)],
        model_name=f"{_name(facts.base)} {facts.method} kept {facts.result['kept']:g}",
        eval_results=list(_results(metrics["compressed"])) or None,
        **licence,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_name(facts.base)}, {facts.result['kept']:.4g} kept",
        _what(facts),
        _measures(metrics),
        _LOAD,
        f"## Making it again\n\n```sh\n{facts.command}\n```\n\nEigenpress {facts.version}.",
        _licence(facts, licence),
        _citation(facts),
    ]
    return hide("\n\n".join(part for part in parts if part) + "\n")


def hub_id(source: str) -> str | None:
    """The id on the hub that a model or a data set was asked for by; None for a local one."""
    found = CACHED.search(source)
    if found:
        return f"{found[1]}/{found[2]}"
    local = source.startswith((".", "/", "~")) or Path(source).exists()
    return None if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else source


def _name(source: str) -> str:
    return hub_id(source) or Path(source).name


def _word(method: str) -> str:
    return re.split(r"[@:+]", method)[0]


def _base_metadata(folder: Path) -> dict[str, Any]:
    """Licence and languages by the front matter of the base model's own card."""
    card = folder / "README.md"
    try:
        said = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # a card is prose: one that cannot be read says nothing, like one not there
        said = {}
    found: dict[str, Any] = {name: said[name] for name in LICENCE if _is_text(said.get(name))}
    if isinstance(said.get("language"), str | list):
        found["language"] = said["language"]
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _results(metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    for label, numbers in metrics["texts"].items():
        yield _result(label, "perplexity", numbers["perplexity"])
    for label, numbers in metrics["tasks"].items():
        for name, value in numbers.items():
            if not name.endswith(ERROR):
                yield _result(label, name, value)


def _result(label: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=label,
        dataset_name=label,
        metric_type=metric,
        metric_value=float(f"{value:.6g}"),
    )


def _what(facts: Facts) -> str:
    result = facts.result
    parameters, nbytes = result["parameters"], result["bytes"]
    share = parameters["compressible_compressed"] / parameters["compressible_dense"]
    base = hub_id(facts.base)
    of = f"[{base}](https://huggingface.co/{base})" if base else f"`{_name(facts.base)}`"
    paper = f" ([arXiv {facts.paper}](https://arxiv.org/abs/{facts.paper}))" if facts.paper else ""
    rows = [
        ("parameters", f"{parameters['dense']:,}", f"{parameters['compressed']:,}"),
        (
            "of them in layers that are compressed",
            f"{parameters['compressible_dense']:,}",
            f"{parameters['compressible_compressed']:,} ({share:.1%})",
        ),
        ("bytes of weights", f"{nbytes['dense']:,}", f"{nbytes['compressed']:,}"),
    ]
    text = f" It was calibrated on {facts.calibration}." if facts.calibration else ""
    return (
        f"{of}, made smaller by Eigenpress with "
        f"`{facts.method}`: {facts.summary}{paper}.{text}\n\n"
        + _table(("", "base model", "this model"), rows)
    )


def _measures(metrics: Mapping[str, Any]) -> str:
    names = {"dense": "base model", "unrecovered": "before training on", "compressed": "this model"}
    models = [name for name in names if name in metrics]
    rows: list[tuple[str, ...]] = []
    for label, numbers in metrics["compressed"]["texts"].items():
        each = [metrics[model]["texts"][label] for model in models]
        tokens = f"{numbers['tokens']:,} tokens"
        rows.append((label, f"perplexity, {tokens}", *(f"{e['perplexity']:.4g}" for e in each)))
        rows.append((label, "KL to the base, nats per token", *(f"{e['kl']:.3g}" for e in each)))
    for label, numbers in metrics["compressed"]["tasks"].items():
        for name in (name for name in numbers if not name.endswith(ERROR)):
            each = [metrics[model]["tasks"][label] for model in models]
            rows.append((label, name, *(_with_error(e, name) for e in each)))
    if not rows:
        return ""
    heads = ("text or task", "measure", *(names[model] for model in models))
    return "## Measured\n\n" + _table(heads, rows)


def _with_error(numbers: Mapping[str, float], name: str) -> str:
    error = numbers.get(f"{name}{ERROR}")
    return f"{numbers[name]:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


_LOAD = """## Loading it

With nothing but transformers; `trust_remote_code` runs `modeling_eigenpress.py` of this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

With Eigenpress installed no code of the folder runs:

```python
import compress_core.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
```"""


def _licence(facts: Facts, licence: Mapping[str, Any]) -> str:
    files = sorted(file.name for file in facts.folder.glob("LICENSE*") if file.is_file())
    beside = f" Its text is in {', '.join(files)}." if files else ""
    if "license" in licence:
        said = licence.get("license_name", licence["license"])
        return f"## Licence\n\nThe base model's: {said}.{beside}"
    return (
        "## Licence\n\nThe base model's, which its folder does not name: ask where it comes from "
        f"before this model is passed on.{beside}"
    )


def _citation(facts: Facts) -> str:
    if not facts.paper:
        return ""
    return (
        "## Citation\n\nOf the method:\n\n```bibtex\n"
        f"@misc{{{_word(facts.method)},\n"
        f"  eprint = {{{facts.paper}}},\n"
        "  archivePrefix = {arXiv},\n"
        f"  url = {{https://arxiv.org/abs/{facts.paper}}}\n"
        "}\n```"
    )
