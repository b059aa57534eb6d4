"""A dense model as the stages see it: its files, its layout, and the content of every weight."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from compress_core.compute import compute_dtype
from compress_core.folder.memory import expected_bytes
from compress_core.hf.binding import key_mapping, unwrapped
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.companions import companion_files, tokenizer_files
from compress_core.hf.described import Described, bind_described, lacks_weights
from compress_core.hf.layout import inspect_model, load_config
from compress_core.hf.loading import load_model
from compress_core.hf.states import Room
from compress_core.hf.stream import BlockStream
from compress_core.hf.text import load_tokenizer
from compress_core.hf.whole import bind_whole
from compress_core.types import ModelLayout
from storage.digests import DigestCache, file_digest, safetensors_digests
from storage.keys import recipe_key

FOLDER = "model"  # what an artifact that holds a model folder calls it
NOT_THERE = "not there: "  # what begins in place of a digest of what a plan does without

# What a configuration says that no number depends on.
IGNORED_CONFIG = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype")


class DenseModel:
    """A model folder, inspected once and shared by all runs of a process.

    Args:
        folder: HuggingFace model folder with safetensors.
        digests: Remembers file contents between processes.
        device: Where it runs.
        trust_remote_code: Passed to transformers.
        name: What people call it; else the folder's name.
        compute: In which dtype it runs, one of `compress_core.compute.COMPUTE`.
        room: Where hidden states between its blocks are kept.
        weightless: Whether a folder without weights will do, as for a plan: what its configuration
            describes has shapes and no numbers.

    Attributes:
        compute_dtype: The dtype that comes to, which is part of the keys of all that runs it.
        described: Whether there are no weights; digests of theirs then begin with ``NOT_THERE``.

    Raises:
        ModelError: The folder is not a model that can be compressed.
    """

    def __init__(
        self,
        folder: Path,
        digests: DigestCache,
        device: str = "cpu",
        trust_remote_code: bool = False,
        name: str | None = None,
        compute: str = "model",
        room: Room | None = None,
        weightless: bool = False,
    ) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self.device = device
        self.trust_remote_code = trust_remote_code
        self.room = room or Room()
        self.described = weightless and lacks_weights(folder)
        self.checkpoint = Described(folder) if self.described else Checkpoint(folder)
        binding = bind_described if self.described else bind_whole
        self.layout: ModelLayout = inspect_model(self.checkpoint, trust_remote_code, binding)
        self.compute_dtype = compute_dtype(compute, self.layout.dtype, device)
        self._digests = digests
        companion_files(folder)  # one that leads out of the folder is refused before any stage

    @cached_property
    def config(self) -> Any:
        """The model's configuration, as transformers reads it."""
        return load_config(self.checkpoint, self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def stream(self) -> BlockStream:
        """The model, runnable block by block; held until it is taken out of ``__dict__``."""
        return self.new_stream()

    def new_stream(self) -> BlockStream:
        """The same, held by who asks."""
        return BlockStream.reading_ahead(
            self.folder,
            self.layout,
            self.device,
            self.trust_remote_code,
            self.compute_dtype,
            self.room,
        )

    def load(self) -> Any:
        """The whole model, in the dtype that it computes in."""
        return load_model(
            self.folder,
            self.device,
            trust_remote_code=self.trust_remote_code,
            dtype=self.compute_dtype,
            key_mapping=key_mapping(self.layout.wrappers),
        )

    @cached_property
    def keys(self) -> list[str]:
        """The keys in the files of what the model loads, each once, sorted."""
        return sorted(set(self.layout.stored.values()))

    @cached_property
    def stored(self) -> dict[str, str]:
        """Checkpoint key to content digest, for every tensor that the model loads."""
        if self.described:
            return {key: f"{NOT_THERE}{key}" for key in self.keys}
        found: dict[str, str] = {}
        for file in self.checkpoint.files:
            found |= self._digests.of(file, "safetensors", safetensors_digests)
        return {key: found[key] for key in self.keys}

    @cached_property
    def config_digest(self) -> str:
        """Content of the configuration, less what no number depends on."""
        config = {k: v for k, v in self.checkpoint.config.items() if k not in IGNORED_CONFIG}
        return recipe_key(config | {"dtype": self.layout.dtype})  # whatever it is called there

    @cached_property
    def tokenizer_digest(self) -> str:
        """Content of the files that decide tokenisation."""
        if self.described and not self.has_tokenizer:
            return f"{NOT_THERE}tokenizer"
        return recipe_key(
            {file.name: self._file_digest(file) for file in tokenizer_files(self.folder)}
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has any file of one."""
        return any(file.name != "config.json" for file in tokenizer_files(self.folder))

    @cached_property
    def companions_digest(self) -> str:
        """Content of the files that a compressed folder takes over as they are."""
        return recipe_key(
            {
                file.relative_to(self.folder).as_posix(): self._file_digest(file)
                for file in companion_files(self.folder)
            }
        )

    def _file_digest(self, file: Path) -> str:
        return self._digests.of(file, "file", lambda f: {"": file_digest(f)})[""]

    @cached_property
    def digest(self) -> str:
        """Content of the whole model: configuration and every tensor that it loads."""
        return self._of_weights({"config": self.config_digest, "tensors": self.stored})

    @cached_property
    def parameters(self) -> int:
        """Numbers in the files that the model loads, each stored tensor counted once."""
        return sum(math.prod(self.checkpoint.shape(key)) for key in self.keys)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of those in the files."""
        checkpoint = self.checkpoint
        return sum(
            math.prod(checkpoint.shape(key)) * checkpoint.torch_dtype(key).itemsize
            for key in self.keys
        )

    @cached_property
    def memory(self) -> int:
        """Bytes that it holds in memory."""
        return expected_bytes(self.checkpoint)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of one parameter."""
        return self.checkpoint.shape(self.layout.stored[parameter])

    def numbers(self, parameter: str) -> int:
        """Numbers in one parameter."""
        return math.prod(self.shape(parameter))

    def weight_key(self, layer: str) -> str:
        """The checkpoint's key of a layer's weight."""
        return self.layout.stored[f"{layer}.weight"]

    def stem(self, layer: str) -> str:
        """What the keys of all tensors of a layer begin with in a compressed folder."""
        return unwrapped(self.weight_key(layer), self.layout.wrappers).removesuffix("weight")

    def state_digest(self, parameters: Sequence[str], buffers: Sequence[str]) -> str:
        """Content of the named parameters, and of those buffers that the files hold."""
        keys = self.layout.stored
        names = [*parameters, *(name for name in buffers if name in keys)]
        return self._of_weights({name: self.stored[keys[name]] for name in names})

    def _of_weights(self, digests: dict[str, Any]) -> str:
        return f"{NOT_THERE if self.described else ''}{recipe_key(digests)}"
