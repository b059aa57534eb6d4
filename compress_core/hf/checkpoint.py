"""Read the safetensors of a HuggingFace model folder by name, lazily; find the folder of a hub id.

Nothing here builds a model: a tensor is read from disk when it is asked for, so a stage holds the
weights it works on and no more. Whatever is wrong with a folder ends in one ModelError line.
"""

import difflib
import json
import math
import struct
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_core.errors import ModelError

QUANT_METHOD = "eigenpress"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*"]
# Some repositories hold the same weights twice, in the maker's own layout.
_HUB_COPIES = ["*/*.safetensors", "consolidated*", "original/*", "onnx/*"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}): get the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object: get it again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, in the order of their names.

    Raises:
        ModelError: There are none, only `.bin` weights, or a shard that the index names is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has only .bin weights, which can run code when read: load the model "
                "once and save it again with model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise ModelError(
            f"{folder} has a config.json but neither {SINGLE_FILE} nor {INDEX_FILE}: "
            "save the model again with model.save_pretrained(FOLDER)"
        )
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX_FILE} has no weight_map: get the model again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its {len(files)} weight files, first {missing[0]}: "
            "the download or copy is incomplete, get the model again"
        )
    return files


class Checkpoint:
    """The tensors of one model folder by name, read when asked for and never all at once.

    Attributes:
        folder: The model folder.
        config: The content of its config.json.
        files: Its safetensors files.
        names: Every tensor's key in those files, sorted.
    """

    def __init__(self, folder: Path, *, compressed: bool = False) -> None:
        """Open a folder and read the headers of its files.

        Args:
            folder: A HuggingFace model folder.
            compressed: Whether it must be one that eigenpress wrote, rather than a dense one.

        Raises:
            ModelError: The folder is missing, is no model, is incomplete, or is of the other kind.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelError(f"no such folder: {self.folder}")
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{self.folder} is a folder that is no model: it has no config.json. Give the "
                "folder that model.save_pretrained wrote"
            )
        self.config = read_json(self.folder / "config.json")
        _check_kind(self.folder, self.config, compressed)
        self.files = weight_files(self.folder)
        self._handles = [_open(file) for file in self.files]
        self._handle_of = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        self.names = sorted(self._handle_of)

    def candidates(self, parameter: str, prefix: str = "") -> list[str]:
        """The keys that `parameter` may be stored under: as it is, without and with the prefix."""
        prefix = f"{prefix.rstrip('.')}." if prefix else ""
        return list(dict.fromkeys((parameter, parameter.removeprefix(prefix), prefix + parameter)))

    def has(self, parameter: str, prefix: str = "") -> bool:
        """Whether a model parameter has a tensor of its own here (a tied one often has none)."""
        return any(name in self._handle_of for name in self.candidates(parameter, prefix))

    def key(self, parameter: str, prefix: str = "") -> str:
        """The key in the files of a parameter named as in `model.named_parameters()`.

        Args:
            parameter: For example `transformer.h.0.attn.c_attn.weight`.
            prefix: The model's `base_model_prefix`; hub checkpoints of GPT-2 are saved without it.

        Raises:
            ModelError: No tensor goes by that name.
        """
        for name in self.candidates(parameter, prefix):
            if name in self._handle_of:
                return name
        nearest = difflib.get_close_matches(parameter, self.names, n=3, cutoff=0.4)
        raise ModelError(
            f"{self.folder} has no tensor {parameter!r}; nearest: {', '.join(nearest) or 'none'}. "
            "If its names are of an older layout, load the model and save it again with "
            "model.save_pretrained"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor stored under `key`, from the header alone."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """The dtype of the tensor stored under `key` in safetensors' words: F32, BF16, F16, ..."""
        return str(self._slice(key).get_dtype())

    def torch_dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor stored under `key` in PyTorch's words.

        Raises:
            ModelError: PyTorch has none that matches.
        """
        if self.dtype(key) not in _DTYPES:
            raise ModelError(f"{self.folder}: {key} is stored as {self.dtype(key)}: not supported")
        return _DTYPES[self.dtype(key)]

    def read(self, key: str) -> Tensor:
        """The tensor stored under `key`, on the CPU, in the stored dtype and shape."""
        self._require(key)
        return cast(Tensor, self._handle_of[key].get_tensor(key))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(math.prod(self.shape(k)) * self.torch_dtype(k).itemsize for k in self.names)

    def _slice(self, key: str) -> Any:
        self._require(key)
        return self._handle_of[key].get_slice(key)

    def _require(self, key: str) -> None:
        if key not in self._handle_of:
            self.key(key)
            raise ModelError(f"{key!r} is a parameter's name, not a key in {self.folder}")


def tensor_headers(file: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of each of its tensors: dtype, shape, data_offsets."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def resolve_model(source: str, cache_dir: Path | None = None, revision: str | None = None) -> Path:
    """The local folder of a model given as a folder or as an id on the HuggingFace hub.

    Only safetensors, JSON and tokenizer files are fetched; with HF_HUB_OFFLINE set nothing is.

    Args:
        source: A directory, or a hub id like `gpt2` or `meta-llama/Llama-2-7b-hf`.
        cache_dir: Where the hub's files are kept; HuggingFace's own place by default.
        revision: A branch, tag or commit on the hub.

    Raises:
        ModelError: There is no such folder and the hub could not provide it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{path} is a file: give the model's folder")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"no such folder: {path}")
    try:
        found = snapshot_download(
            source,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_COPIES,
        )
    except (OSError, ValueError) as error:  # every error of the hub's is one of the two
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{source}: no such folder, and the hub could not provide it: {reason}"
        ) from error
    return Path(found)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}): get the model again") from error


def _check_kind(folder: Path, config: dict[str, Any], compressed: bool) -> None:
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method", "an unnamed method") if settings else None
    if compressed and method != QUANT_METHOD:
        raise ModelError(f"{folder} is not a model that eigenpress compressed: nothing to undo")
    if not compressed and method == QUANT_METHOD:
        raise ModelError(
            f"{folder} is already compressed: start from the dense model, or write a dense one "
            "with `eigenpress export DIR --to dense`"
        )
    if not compressed and method is not None:
        raise ModelError(f"{folder} is quantised with {method}: start from the unquantised model")
