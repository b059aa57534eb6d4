"""The files of a model folder beside its weights: what decides tokenisation, and what goes along.

Whatever belongs to a model lies inside its folder; a link that leads elsewhere is not followed.
"""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from compress_core.errors import ModelError
from compress_core.hf.inside import inside, read_json

_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "tekken.json", "tokenization_*.py"),
    *("*.jinja", "chat_template*", "additional_chat_templates/*"),
)
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
_OTHERS = ("generation_config.json", "LICENSE*", "NOTICE*")


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of a model folder that decide tokenisation, sorted, for content digests.

    Raises:
        ModelError: One of them leads out of the folder, or is no readable JSON.
    """
    folder = Path(folder)
    found = _matching(folder, _TOKENIZER) | set(_code(folder))
    settings = folder / "tokenizer_config.json"
    names_class = settings.is_file() and "tokenizer_class" in read_json(inside(folder, settings))
    if not names_class and (folder / "config.json").is_file():
        # transformers then picks the tokenizer's class by the model type in the configuration.
        found.add(folder / "config.json")
    return sorted(inside(folder, file) for file in found)


def companion_files(folder: Path) -> list[Path]:
    """What a compressed folder takes over from the dense one as it is, sorted.

    Raises:
        ModelError: As :func:`tokenizer_files`.
    """
    found = {*tokenizer_files(folder), *_matching(folder, _OTHERS)} - {folder / "config.json"}
    return sorted(inside(folder, file) for file in found)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer with its code, chat templates, generation settings and licence."""
    for file in companion_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _matching(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    return {file for file in found if file.is_file()}


def _code(folder: Path) -> Iterator[Path]:
    """The modules of a tokenizer that brings its own, and what else of the folder these name."""
    for module in _modules(folder):
        yield module
        try:
            tree = ast.parse(module.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise ModelError(f"{module} is not readable Python ({error}): get it again") from error
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        names = {text for text in texts if isinstance(text, str) and _may_be_vocabulary(text)}
        yield from (folder / name for name in names if (folder / name).is_file())


def _modules(folder: Path) -> Iterator[Path]:
    settings = folder / "tokenizer_config.json"
    entries = read_json(inside(folder, settings)).get("auto_map") if settings.is_file() else None
    if isinstance(entries, dict):
        entries = entries.get("AutoTokenizer")
    for reference in entries if isinstance(entries, list | tuple) else [entries]:
        # "repository--module.Class" is another repository's code.
        if not isinstance(reference, str) or "--" in reference:
            continue
        module = folder / f"{reference.partition('.')[0]}.py"
        if module.is_file():
            yield inside(folder, module)
            yield from (inside(folder, file) for file in _imported(module) if file.is_file())


def _imported(module: Path) -> list[Path]:
    try:
        return [Path(file) for file in get_relative_import_files(module)]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{module}, the tokenizer's code, imports what cannot be read ({error}): get the "
            "model again"
        ) from error


def _may_be_vocabulary(text: str) -> bool:
    name = 0 < len(text) < 256 and not set(text) & set("/\\\0\n") and text not in (".", "..")
    return name and not text.endswith(WEIGHTS)
