"""Dobi-SVD's training (arXiv 2502.02723): a smooth truncation point for every layer.

Outputs are projected on their principal directions, A → A V T(γ) Vᵀ, T_i = ½ tanh(β(γ − i)) + ½,
and one γ per layer is trained on the whole model by the language-model loss and the distance of the
stored share from the target. What differs from the published code is said in ``methods.dobi_svd``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress_core.allocate.base import check_one_component_each
from compress_core.errors import ConfigError
from compress_core.forms.names import EIGHT_BITS, PLAIN
from compress_core.gradients import token_loss
from compress_core.learn.base import Assignment, Learned, train_whole
from compress_core.learn.loop import (
    TrainState,
    check_samples,
    descend,
    next_batch,
    require_finite,
    require_finite_parameters,
)
from compress_core.learn.spectrum import Spectra, affordable_dense, choose, cut, install
from compress_core.types import LayerRef


@dataclass(frozen=True)
class LearnTruncation:
    """One truncation point per layer.

    Attributes:
        steps: Of the optimiser.
        batch: Windows in a step.
        beta: Steepness of the truncation, per component.
        rate: Learning rate of γ, as a part of a layer's number of components.
        balance: Weight of the distance from the target, in nats for the whole of the layers.
        eight_bits: Whether components are charged as stored in 8 bits. Training itself sees none
            of that: what codes lose is far below what truncation does.
    """

    steps: int = 400
    batch: int = 4
    beta: float = 10.0
    rate: float = 0.002
    balance: float = 150.0
    eight_bits: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(
                f"dobi_svd needs steps and batch of at least 1, got {self.steps} and {self.batch}"
            )
        if not all(0 < value < math.inf for value in (self.beta, self.rate, self.balance)):
            raise ConfigError(
                "dobi_svd needs finite beta, rate and balance above 0; got "
                f"{self.beta:g}, {self.rate:g} and {self.balance:g}"
            )

    @property
    def reads_teacher(self) -> bool:
        """Its loss is the text's own."""
        return False

    @property
    def biases(self) -> bool:
        """It has none."""
        return False

    def check(self, layers: Sequence[LayerRef], kept: float, samples: int) -> None:
        """Refuses a budget below one component of every layer, and too little text.

        Raises:
            BudgetError, ConfigError: It cannot be.
        """
        check_one_component_each(self.charged(layers), kept)
        check_samples(samples)

    def charged(self, layers: Sequence[LayerRef]) -> list[LayerRef]:
        """The layers with the cost of a component as it will be stored."""
        form = EIGHT_BITS if self.eight_bits else PLAIN
        return [replace(layer, form=form) for layer in layers]

    def learn(self, given: Assignment) -> Learned:
        """Trains the truncation points, then rounds them to the exact budget.

        Raises:
            NumericsError: The loss is not finite; names the step and the layer.
        """
        run = _Run(self, given)
        return run.finish(train_whole(given, self.steps, run.step, run.state))


def truncation(rank: Tensor, size: int, beta: float) -> Tensor:
    """The smooth mask (size,): near 1 for the first components, ½ between them and the rest.

    Args:
        rank: γ as a number of components, a scalar; whole numbers keep that many.
        size: Components of the layer.
        beta: Steepness, per component.
    """
    places = torch.arange(size, device=rank.device) + 0.5
    return 0.5 * torch.tanh(beta * (rank - places)) + 0.5


class _Run:
    """One training: its parameters, and what a step does."""

    def __init__(self, settings: LearnTruncation, given: Assignment) -> None:
        model, layout, kept, training = given.model, given.layout, given.kept, given.training
        self.settings, self.model, self.layout = settings, model, layout
        self.kept, self.training = kept, training
        layers = settings.charged(layout.layers)
        found = {layer.name: given.atoms(layer) for layer in layout.layers}
        self.spectra = Spectra.of(layers, [found[x.name].energy for x in layers])
        sizes = torch.tensor(self.spectra.starts).diff()
        # γ in parts of a layer's components, so that one learning rate suits all widths.
        start = [kept * x.dense_cost / x.atom_cost for x in layers]
        device = training.device
        self.sizes = sizes.float().to(device)
        self.costs = torch.tensor(
            [x.atom_cost / self.spectra.dense_cost for x in layers], device=device
        )
        self.most = torch.tensor(
            [x.dense_cost / self.spectra.dense_cost for x in layers], device=device
        )
        self.gamma = nn.Parameter(torch.tensor(start).to(device) / self.sizes)
        self.none = {x.name: torch.zeros(x.out_features, device=device) for x in layers}
        install(model, self.spectra, found, self.truncation, self._no_deviation)
        self.optimizer = torch.optim.AdamW([self.gamma], lr=settings.rate, weight_decay=0.0)
        self.state = TrainState({"gamma": self.gamma}, self.optimizer)

    def truncation(self, index: int) -> Tensor:
        """T of a layer, (components,), in (0, 1)."""
        size = self.spectra.part(index).stop - self.spectra.part(index).start
        return truncation(self._ranks()[index], size, self.settings.beta)

    def _no_deviation(self, index: int) -> Tensor:
        return self.none[self.spectra.layers[index].name]

    def _ranks(self) -> Tensor:
        return self.gamma * self.sizes

    def kept_now(self) -> Tensor:
        """Share of the layers' numbers at the truncation points; beyond what pays it is dense."""
        return torch.minimum(self._ranks() * self.costs, self.most).sum()

    def step(self, step: int) -> tuple[dict[str, float], str]:
        """One step of the optimiser."""
        _, tokens = next_batch(step, self.training)
        with torch.enable_grad():
            loss = token_loss(self.model, tokens)
            require_finite(loss, "dobi_svd", step, self.model, self.layout, tokens)
            now = self.kept_now()
            total = loss + self.settings.balance * (now - self.kept).abs()
            descend(total, self.optimizer, [self.gamma], self.model.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * (1 - 0.9 * step / self.settings.steps)
        self.optimizer.step()
        with torch.no_grad():
            self.gamma.clamp_(min=1 / self.sizes)
        measured = {"loss": float(loss.detach()), "kept": float(now.detach())}
        return measured, f"loss {measured['loss']:.3f} kept {measured['kept']:.3f}"

    @torch.no_grad()
    def finish(self, curves: dict[str, Tensor]) -> Learned:
        """Whole ranks: the same shift of every γ until the budget is met, dense where that pays."""
        require_finite_parameters([self.gamma], "dobi_svd")
        ranks = self._ranks().cpu()
        dense = [float(rank) >= self.spectra.most(index, 0) + 1 for index, rank in enumerate(ranks)]
        depth = torch.cat(
            [
                (rank - torch.arange(self.spectra.part(i).stop - self.spectra.part(i).start))
                / self.sizes[i].cpu()
                for i, rank in enumerate(ranks)
            ]
        )
        wanted = [float(x) if d else 0.0 for x, d in zip(self.gamma, dense, strict=True)]
        stay = affordable_dense(self.spectra, wanted, self.kept, False)
        places = cut(self.spectra, depth, self.kept, stay, False)
        chosen = choose(self.spectra, places, torch.ones_like(depth), None)
        report = {
            "share before the cut": float(self.kept_now()),
            "dense layers": float(sum(place is None for place in places)),
        }
        return Learned(chosen, curves, report)
