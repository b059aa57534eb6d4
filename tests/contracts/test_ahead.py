"""Weights that are read a block ahead are the same weights, each read once, a block at most."""

import ctypes
import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.ahead import PIECE, AheadCheckpoint
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.stream import BlockStream
from storage.digests import DigestCache
from tasks.engine.dense_model import DenseModel
from tests.patience import wait_for
from tests.pipeline import pico

BLOCKS = 4
KEYS = [[f"{block}.{part}" for part in ("a", "b", "c")] for block in range(BLOCKS)]
OUTER = "embed"
PAGE = mmap.PAGESIZE

Reads = list[tuple[str, bool]]  # key, and whether the thread of whoever asked read it


@pytest.fixture
def folder(on_disk: Path) -> Path:
    """Two files, that split a block between them, each block of 6 MiB."""
    torch.manual_seed(0)
    tensors = {key: torch.randn(1 << 19) for keys in KEYS for key in keys} | {OUTER: torch.ones(3)}
    first = [key for key in tensors if key < "1.b"]
    names = {key: "a.safetensors" if key in first else "b.safetensors" for key in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        of_file = {key: tensor for key, tensor in tensors.items() if names[key] == file}
        save_file(of_file, on_disk / file, metadata={"format": "pt"})
    (on_disk / "config.json").write_text("{}")
    (on_disk / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return on_disk


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Who read what; pinned memory, which no CPU has, is other memory."""
    found: Reads = []
    read, asking = Checkpoint.read, threading.current_thread()

    def noting(self: Checkpoint, key: str) -> Tensor:
        found.append((key, threading.current_thread() is asking))
        return read(self, key)

    monkeypatch.setattr(Checkpoint, "read", noting)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    return found


def settled(checkpoint: AheadCheckpoint) -> AheadCheckpoint:
    """When the thread has nothing left to do."""
    checkpoint._thread.submit(lambda: None).result()
    return checkpoint


ORDERS = {
    "block by block": [key for keys in KEYS for key in keys],
    "blocks again and again": [key for keys in KEYS for key in keys * 3],
    "backwards": [key for keys in reversed(KEYS) for key in keys],
    "from the middle, twice": [key for keys in (*KEYS[2:], *KEYS) for key in reversed(keys)],
    "parts of blocks": [
        "0.a",
        "1.b",
        OUTER,
        "1.a",
        "1.c",
        "2.a",
        "0.a",
        "0.b",
        "0.c",
        "1.a",
        "3.c",
    ],
    "a tensor twice": ["0.a", "0.a", "0.b", "0.c", "0.c", "1.a", "1.a", "1.b", "1.c", "2.a"],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pinned", [False, True])
def test_whatever_is_read_in_whatever_order_is_what_the_files_hold(
    order: str, pinned: bool, folder: Path, reads: Reads
) -> None:
    plain, ahead = Checkpoint(folder), AheadCheckpoint(folder, KEYS, pinned)
    for key in ORDERS[order]:
        assert torch.equal(ahead.read(key), plain.read(key))


def test_a_pass_reads_each_tensor_once_and_all_but_the_first_block_ahead(
    folder: Path, reads: Reads
) -> None:
    ahead = AheadCheckpoint(folder, KEYS, True)
    for key in ORDERS["block by block"]:
        ahead.read(key)
    assert sorted(reads) == [(key, block == 0) for block in range(BLOCKS) for key in KEYS[block]]


def test_one_block_is_held_and_only_when_the_one_before_was_read(
    folder: Path, reads: Reads
) -> None:
    ahead = AheadCheckpoint(folder, KEYS, True)
    for block in range(BLOCKS):
        for key in KEYS[block][:-1]:
            ahead.read(key)
        assert not {key for key, _ in reads} & {key for keys in KEYS[block + 1 :] for key in keys}
        assert set(ahead._here) <= {KEYS[block][-1]}
        ahead.read(KEYS[block][-1])
        assert not ahead._here
        following = set(KEYS[block + 1]) if block + 1 < BLOCKS else set()
        assert set(settled(ahead)._coming.result()) == following
    ahead.read("0.a")
    assert not ahead._here


@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_that_went_is_told_when_it_is_read(pinned: bool, folder: Path, reads: Reads) -> None:
    ahead = AheadCheckpoint(folder, KEYS, pinned)
    (folder / "b.safetensors").unlink()
    for key in KEYS[0]:
        ahead.read(key)
    with pytest.raises(ModelError, match=r"b\.safetensors cannot be read .*get the model again"):
        for key in KEYS[1]:
            ahead.read(key)


def resident(file: Path, first: int, last: int) -> float:
    """The share of a range of a file that the system has in its cache."""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        place = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.byref(place), ctypes.c_size_t(len(mapped)), pages) == 0
        del place
    of_range = pages[first // PAGE : -(-last // PAGE)]
    return sum(page & 1 for page in of_range) / len(of_range)


def forgotten(file: Path) -> None:
    """Has the system drop a file from its cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


on_linux = pytest.mark.skipif(os.uname().sysname != "Linux", reason="of Linux")


@pytest.fixture
def cold(folder: Path) -> tuple[Path, int, int]:
    """The second file, which the system has not in its cache, and where its last block is."""
    file = folder / "b.safetensors"
    size = file.stat().st_size
    forgotten(file)
    if resident(file, 0, size):
        pytest.skip("this file system keeps files in memory")
    return file, size - (6 << 20), size


@on_linux
def test_on_a_cpu_the_system_has_the_next_block_in_its_cache(cold: tuple[Path, int, int]) -> None:
    file, first, last = cold
    ahead = AheadCheckpoint(file.parent, KEYS, False)
    held = [ahead.read(key) for key in KEYS[2][:-1]]  # whose numbers nobody looks at
    if resident(file, first, last) == 1:
        pytest.skip("this system reads as far ahead by itself")
    held.append(ahead.read(KEYS[2][-1]))
    assert settled(ahead)._coming.result() == {}
    wait_for(lambda: resident(file, first, last) == 1)  # it is told, and comes when it comes


@on_linux
def test_the_system_is_told_of_all_bytes_of_the_next_block_and_of_no_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def note(handle: int, first: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED and 0 < size <= PIECE
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        told.setdefault(name, []).append((first, first + size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    ahead = AheadCheckpoint(folder, KEYS, False)
    for key in KEYS[0]:
        ahead.read(key)
    settled(ahead)
    numbers = b"".join(
        (folder / name).read_bytes()[first:last]
        for name, pieces in sorted(told.items())
        for first, last in sorted(pieces)
    )
    assert numbers == b"".join(ahead.read(key).numpy().tobytes() for key in KEYS[1])
    assert len(told) == 2  # the block is in two files


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_a_model_reads_its_own_blocks_ahead_and_for_cuda_pins_them(
    device: str, pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(BlockStream, "__init__", lambda _, *given: made.append(given))
    inputs = pico.make_inputs(tmp_path / "inputs")
    model = DenseModel(inputs.model, DigestCache(tmp_path / "digests.json"), device)
    model.new_stream()
    checkpoint = made[0][0]
    assert isinstance(checkpoint, AheadCheckpoint) and checkpoint._pinned == pinned
    own = [name.split(".") for name in checkpoint.names]
    assert checkpoint._block_of == {
        ".".join(name): int(name[2]) for name in own if name[:2] == ["model", "layers"]
    }


@pytest.mark.parametrize("pinned", [False, True])
def test_a_model_that_is_read_ahead_gives_the_same_bits(
    pinned: bool, tmp_path: Path, reads: Reads
) -> None:
    inputs = pico.make_inputs(tmp_path / "inputs")
    model = DenseModel(inputs.model, DigestCache(tmp_path / "digests.json"))
    tokens = torch.arange(96).reshape(4, 24)
    found = []
    blocks = [[model.layout.stored[n] for n in names] for names in model.layout.block_parameters]
    ahead = AheadCheckpoint(inputs.model, blocks, pinned)
    for checkpoint in (model.checkpoint, ahead):
        stream = BlockStream(checkpoint, model.layout)
        states = stream.embed(tokens, 2)
        for block in (0, 0, 1, 2, 0):  # as who measures a block again and again
            stream.run_block(block, states, 2)
        found.append(states)
    assert torch.equal(*found) and found[0].isfinite().all()
    assert pinned == any(not by_asking for _, by_asking in reads)
