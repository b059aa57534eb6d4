"""What passive waiting costs on a quiet machine, and what spinning costs on a busy one."""

import json
import os
import subprocess
import sys

import pytest

from flows.settings.threads import PASSIVE, WAITING, affinity
from tests.benchmarks.conftest import Bench

ROUNDS = 2
WORK = """
import json, resource, time, torch
from compress_core.decompose import ProjectOutputs
from compress_core.metric import SecondMoment
torch.manual_seed(0)
shapes = [(576, 576), (192, 576), (576, 1536), (1536, 576)]
cases = []
for out, width in shapes:
    x = torch.randn(2 * width, width, dtype=torch.float64)
    cases.append((torch.randn(out, width), SecondMoment(x.T @ x / len(x))))
x = torch.randn(8, 512, 576)
up, down = torch.randn(1536, 576), torch.randn(576, 1536)
def layers():
    for weight, metric in cases:
        ProjectOutputs().prepare(weight, metric, min(weight.shape))
def forwards():
    for _ in range(8):
        torch.nn.functional.linear(torch.nn.functional.linear(x, up).relu(), down)
found = {}
for work in (layers, forwards):
    work()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    found[work.__name__] = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps(found))
"""


def measured(waiting: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Seconds and CPU seconds of each kind of work in a fresh process."""
    ours = {name: value for name, value in os.environ.items() if name not in WAITING}
    ours.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(command, env=ours | waiting, check=True, capture_output=True, text=True)
    found: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "busy"])
def test_passive_waiting_against_spinning(bench: Bench, busy: bool) -> None:
    """Seconds with passive waiting as a multiple of those with the library's own."""
    others = [
        subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(affinity() * busy)
    ]
    try:
        rounds = [(measured(PASSIVE), measured({})) for _ in range(ROUNDS)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    for work in rounds[0][0]:
        passive, spinning = (
            [min(pair[side][work][clock] for pair in rounds) for clock in (0, 1)] for side in (0, 1)
        )
        bench.row(
            benchmark=f"waiting, {work}, {'busy' if busy else 'quiet'}",
            seconds=f"{passive[0] / spinning[0]:.2f}",
            cpu_seconds=f"{passive[1] / spinning[1]:.2f}",
        )
