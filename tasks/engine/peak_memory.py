"""How much memory this process took at most while something went on."""

import resource
import sys
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import psutil

EVERY = 0.05  # seconds between looks
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of what the system counts its maximum in


@dataclass(frozen=True)
class Peak:
    """The most memory that something took.

    Attributes:
        ram: Bytes of the computer's memory.
        accelerator: Bytes that tensors had on CUDA devices, added up; 0 without one in use.
    """

    ram: int = 0
    accelerator: int = 0

    def __or__(self, other: "Peak") -> "Peak":
        """The most of either."""
        most = max(self.accelerator, other.accelerator)
        return Peak(max(self.ram, other.ram), most)


class PeakMemory:
    """The most memory that the process had in a time.

    The system's own maximum is of the whole life of the process: where it rises it is the answer,
    and where it does not, the largest of many looks is. Linux would let us set it back; it stays
    the truth for whoever else asks for it.
    """

    def __init__(self) -> None:
        self._ram = 0
        self._process = psutil.Process()
        self._before = _maximum()
        self._devices = _cuda_devices()
        for device in self._devices:
            _cuda().reset_peak_memory_stats(device)
        self._ended = Event()
        self._watch = Thread(target=self._look, name="memory", daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while True:
            self._ram = max(self._ram, int(self._process.memory_info().rss))
            if self._ended.wait(EVERY):
                return

    def stop(self) -> Peak:
        """Ends the time, and says what was taken in it; may be called again."""
        self._ended.set()
        self._watch.join()
        self._ram = max(self._ram, int(self._process.memory_info().rss))
        if (after := _maximum()) > self._before:
            self._ram = after
        devices = self._devices or _cuda_devices()  # CUDA may have begun since
        return Peak(self._ram, sum(_cuda().max_memory_allocated(device) for device in devices))


def _maximum() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def _cuda_devices() -> range:
    torch = sys.modules.get("torch")  # who has not loaded it uses no device
    used = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return range(_cuda().device_count() if used else 0)


def _cuda() -> Any:
    import torch

    return torch.cuda
