"""Threads share one heap, so that what one leaves free another can use."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import ctypes, sys, threading
from flows.settings.heap import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
gate = threading.Barrier(4)
def work():
    libc.malloc(ctypes.c_size_t(1000))
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def heaps(tmp_path: Path, how: str, **environment: str) -> int:
    """Heaps of a process whose four threads have each asked for memory."""
    words = [sys.executable, "-c", COUNT, how, str(tmp_path / "heaps.xml")]
    kept = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run(words, check=True, cwd=ROOT, env=kept | environment)
    return (tmp_path / "heaps.xml").read_text().count("<heap nr=")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc, which has several heaps"
)
def test_threads_share_one_heap_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    assert heaps(tmp_path, "as it comes") > 1
    assert heaps(tmp_path, "shared") == 1
    assert heaps(tmp_path, "shared", MALLOC_ARENA_MAX="3") > 1


HOLD = """
import sys, torch
from flows.settings.heap import give_back, share_one_heap
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
share_one_heap()
for _ in range(3):  # what is freed raises the size from which memory is asked of the system
    torch.zeros(24 << 20, dtype=torch.uint8)
before = resident()
held = [torch.zeros(2 << 20, dtype=torch.uint8) for _ in range(100)]
last = torch.zeros(1 << 10, dtype=torch.uint8)  # above all of it
del held
freed = resident()
give_back()
print(before, freed, resident())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, which keeps what is freed"
)
def test_what_is_free_goes_back_to_the_system() -> None:
    words = [sys.executable, "-c", HOLD]
    said = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    before, freed, after = map(int, said.split())
    assert freed - before > 150 << 20, "the heap keeps it"
    assert after - before < 20 << 20
