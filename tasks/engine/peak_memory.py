"""How much memory this process took at most while something went on."""

import resource
import sys
from threading import Event, Thread
from typing import Any

import psutil

EVERY = 0.05  # seconds between looks
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of what the system counts its maximum in


class PeakMemory:
    """The most memory that the process had in a time.

    The system's own maximum is of the whole life of the process: where it rises it is the answer,
    and where it does not, the largest of many looks is. Linux would let us set it back; it stays
    the truth for whoever else asks for it.

    Attributes:
        ram: Bytes of the computer's memory, once :meth:`stop` was called.
        accelerator: Bytes that tensors had on CUDA devices, added up; 0 without one in use.
    """

    def __init__(self) -> None:
        self.ram = self.accelerator = 0
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
            self.ram = max(self.ram, int(self._process.memory_info().rss))
            if self._ended.wait(EVERY):
                return

    def stop(self) -> "PeakMemory":
        """Ends the time; may be called again."""
        self._ended.set()
        self._watch.join()
        self.ram = max(self.ram, int(self._process.memory_info().rss))
        if (after := _maximum()) > self._before:
            self.ram = after
        devices = self._devices or _cuda_devices()  # CUDA may have begun since
        self.accelerator = sum(_cuda().max_memory_allocated(device) for device in devices)
        return self


def _maximum() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def _cuda_devices() -> range:
    torch = sys.modules.get("torch")  # who has not loaded it uses no device
    used = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return range(_cuda().device_count() if used else 0)


def _cuda() -> Any:
    import torch

    return torch.cuda
