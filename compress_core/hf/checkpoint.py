"""Read the safetensors of a HuggingFace model folder by name, lazily; find the folder of a hub id.

Nothing here builds a model: a tensor is read from disk when it is asked for, so a stage holds the
weights it works on and no more. Whatever is wrong with a folder ends in one ModelError line.
"""

import difflib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.inside import inside, read_json

QUANT_METHOD = "eigenpress"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
MERGE = (
    "merge it with PEFT's model.merge_and_unload() and save that with save_pretrained, as "
    "docs/model-format.md shows"
)

DTYPES = {  # safetensors' names
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
_HUB_FILES += ["README.md"]  # whose front matter names the licence
# Some repositories hold the same weights twice, in the maker's own layout.
_HUB_COPIES = ["*/*.safetensors", "consolidated*", "original/*", "onnx/*"]


def weight_files(folder: Path, config: Mapping[str, Any] | None = None) -> list[Path]:
    """The safetensors files that make up the model in `folder`, in the order transformers reads.

    A file that config.json names as `transformers_weights` comes before the single file, and that
    before an index.

    Args:
        folder: The model folder.
        config: The content of its config.json, if that may name the file.

    Raises:
        ModelError: There are none, only `.bin` weights, a shard that the index names is missing, or
            one is outside the folder.
    """
    named = (config or {}).get("transformers_weights")
    if named is not None and not isinstance(named, str):
        raise ModelError(f"{folder}/config.json: transformers_weights is {named!r}, not a file")
    for name in (named,) if named else (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            file = inside(folder, folder / name)
            return _shards(folder, file) if name.endswith(".index.json") else [file]
    if named:
        raise ModelError(f"{folder} lacks {named}, which its config.json names: get it again")
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} has only .bin weights, which can run code when read: load the model "
            "once and save it again with model.save_pretrained(FOLDER)"
        )
    raise ModelError(
        f"{folder} has a config.json but neither {SINGLE_FILE} nor {INDEX_FILE}: "
        "save the model again with model.save_pretrained(FOLDER)"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} has no weight_map from tensors to files: get the model again")
    files = [inside(folder, folder / name) for name in sorted(set(names))]
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
        if (self.folder / ADAPTER_CONFIG).is_file():
            whole = (self.folder / "config.json").is_file()
            raise ModelError(
                f"{self.folder} {'has' if whole else 'is'} an adapter ({ADAPTER_CONFIG}), which "
                f"transformers puts on its model as it loads: {MERGE}"
                + (", or move the adapter's files away" if whole else "")
            )
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{self.folder} is a folder that is no model: it has no config.json. Give the "
                "folder that model.save_pretrained wrote"
            )
        self.config = read_json(inside(self.folder, self.folder / "config.json"))
        _check_kind(self.folder, self.config, compressed)
        self.files = self._find_files()
        self._handles = [_open(file) for file in self.files]
        self._handle_of = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        pairs = zip(self.files, self._handles, strict=True)
        self._file_of = {name: file for file, handle in pairs for name in handle.keys()}  # noqa: SIM118
        self.names = sorted(self._handle_of)

    def _find_files(self) -> list[Path]:
        return weight_files(self.folder, self.config)

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
        if self.dtype(key) not in DTYPES:
            raise ModelError(f"{self.folder}: {key} is stored as {self.dtype(key)}: not supported")
        return DTYPES[self.dtype(key)]

    def read(self, key: str) -> Tensor:
        """The tensor stored under `key`, on the CPU, in the stored dtype and shape.

        It has its own mapping of the file, so what was read of it leaves the memory with it.
        """
        self._require(key)
        with _open(self._file_of[key]) as file:
            return cast(Tensor, file.get_tensor(key))

    @property
    def first_dtype(self) -> torch.dtype:
        """What transformers computes in where config.json states no dtype."""
        for key in self._handles[0].keys():  # noqa: SIM118  in the order of the first file
            dtype = DTYPES.get(self.dtype(key))
            if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
        return torch.float32

    def _slice(self, key: str) -> Any:
        self._require(key)
        return self._handle_of[key].get_slice(key)

    def _require(self, key: str) -> None:
        if key not in self._handle_of:
            nearest = difflib.get_close_matches(key, self.names, n=3, cutoff=0.4)
            raise ModelError(
                f"{self.folder} has no tensor {key!r}; nearest: {', '.join(nearest) or 'none'}"
            )


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


def local_model(source: str) -> Path | None:
    """As :func:`resolve_model`, of what is on this machine already; None where that is nothing."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):  # not fetched yet, or no id at all
        return None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}): get the model again") from error


def _check_kind(folder: Path, config: dict[str, Any], compressed: bool) -> None:
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ModelError(f"{folder}/config.json: quantization_config is no object: get it again")
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
