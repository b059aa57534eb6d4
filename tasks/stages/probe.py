"""Stage ``probe``: the model's KL divergence with one layer at a time at other shares.

Hidden states before the changed layer are reused, so a table costs about half of what whole-model
forwards would. Only allocators that ask for a table pay for one.
"""

from collections.abc import Mapping

from torch import Tensor

from compress_core.allocate.base import Probe, share_at
from compress_core.forms.names import PLAIN
from compress_core.hf.probe import KlProbe
from compress_core.layer.make import stack_weights
from compress_core.types import LayerRef, Share
from tasks.engine.components import describe
from tasks.engine.cost import MODEL, Cost, forward_operations, logits
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor


def probe_groups(
    job: Job, models: Models, calibration: Unit | None, decomposed: Mapping[str, Unit]
) -> list[Group]:
    """One group per block, one unit per layer or stack; none unless the allocator reads it.

    Args:
        job: Gives allocator and decomposer.
        models: Loads the dense model whole.
        calibration: The unit whose artifact holds the token windows.
        decomposed: Stack name to its ``decompose`` unit.
    """
    probe = job.method.allocate.probe(job.kept)
    if not isinstance(probe, Probe):
        return []
    assert calibration is not None
    compute = _Probe(job, models, calibration, decomposed, probe)
    by_block: dict[int, list[Unit]] = {}
    for layer in job.layers:
        unit = _unit(job, probe, layer, calibration, decomposed)
        by_block.setdefault(layer.block, []).append(unit)
    last = max(by_block)
    return [
        Group("probe", f"block {b}", units, compute, compute.close if b == last else None)
        for b, units in sorted(by_block.items())
    ]


def _unit(
    job: Job, probe: Probe, layer: LayerRef, calibration: Unit, decomposed: Mapping[str, Unit]
) -> Unit:
    model, windows = job.model, min(probe.windows, job.samples)
    inputs = {"calibration tokens": calibration, "decomposition": decomposed[layer.name]}
    if probe.base is not None:  # every other layer is cut too
        inputs |= {f"base of {name}": unit for name, unit in decomposed.items()}
    depth = 1 - layer.block / len(model.layout.blocks)
    tokens = windows * job.length * len(probe.shares)
    return Unit(
        "probe",
        layer.name,
        settings={
            **describe(probe),
            "windows": windows,
            "dtype": model.compute_dtype,
            **({} if layer.form == PLAIN else {"form": layer.form}),
        },
        code=[*LOADING, job.method.decompose],
        sources={"model": model.digest},
        inputs=inputs,
        cost=Cost(
            products={MODEL: depth * forward_operations(model, tokens, job.length)},
            logits=logits(model, tokens),
            held=3 * model.parameters,
            whole=True,
            disk=100,
        ),
    )


class _Probe:
    """Fills the table block by block with one model that is held from block to block."""

    def __init__(
        self,
        job: Job,
        models: Models,
        calibration: Unit,
        decomposed: Mapping[str, Unit],
        probe: Probe,
    ) -> None:
        self.job = job
        self.models = models
        self.calibration = calibration
        self.decomposed = decomposed
        self.probe = probe
        self._open: KlProbe | None = None

    def __call__(self, work: Work) -> None:
        table = self._opened(work)
        for done, unit in enumerate(work.missing):
            layer = self.job.stacks[unit.name].as_layer
            table.enter(layer.block)
            base = table.base_kl()
            changes = [
                table.measure(self._weights(work, layer, share_at(layer, wanted))) - base
                for wanted in self.probe.shares
            ]
            with work.draft(unit) as draft:
                draft.attrs |= {"divergence": changes, "base": base}
            work.progress(done + 1, len(work.missing))

    def close(self, *_: object) -> None:
        """Frees the model."""
        if self._open is not None:
            self.models.drop()

    def _forget(self) -> None:
        self._open = None

    def _opened(self, work: Work) -> KlProbe:
        if self._open is None:
            tokens = get_tensor(work.artifact(self.calibration), "tokens")
            self._open = KlProbe(
                self.models.get(work, None),
                self.job.model.layout,
                tokens[: self.probe.windows],
                batch_size=self.job.batch_size,
                device=self.job.model.device,
            )
            self._open.set_base(self._base(work))
            self.models.let_know(self._forget)
        return self._open

    def _base(self, work: Work) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        if self.probe.base is not None:
            for layer in self.job.layers:
                weights |= self._weights(work, layer, share_at(layer, self.probe.base))
        return weights

    def _weights(self, work: Work, layer: LayerRef, share: Share) -> dict[str, Tensor]:
        """The stack's weights at a share, by layer."""
        stack = self.job.stacks[layer.name]
        if share.rank is None:
            return {member.name: dense_weight_of(self.job, member) for member in stack.members}
        decomposer = self.job.method.decompose
        assert decomposer is not None
        record = Stored(work.artifact(self.decomposed[layer.name]))
        return stack_weights(decomposer, stack, record, share)
