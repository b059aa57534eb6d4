"""Stage ``collect``: statistics of every linear's input on the dense model, block by block.

Hidden states between blocks are scratch: only the latest are kept, so that an interrupted run goes
on at its block, and the last ones are removed when the stage is done.
"""

from torch import Tensor

from storage.errors import ArtifactMissingError
from storage.keys import recipe_key
from tasks.convert import get_tensor, put_stats, put_tensor
from tasks.model import DenseModel
from tasks.units import Cost, Group, Unit, Work

CODE = ("compress_core.stats.InputAccumulator", "compress_core.hf.stream.BlockStream")
SCRATCH = "scratch"


def collect_groups(
    model: DenseModel,
    calibration: Unit,
    *,
    products: str,
    batch_size: int,
    samples: int,
    length: int,
) -> list[Group]:
    """One group per block, one unit per tap.

    Args:
        model: The dense model.
        calibration: The unit whose artifact holds the token windows.
        products: Dtype of one batch's products, "float64" or "float32".
        batch_size: Samples per forward; changes rounding at most, so it is not in the key.
        samples: Windows, for the estimate.
        length: Tokens per window, for the estimate.
    """
    layout = model.layout
    outer = model.parameters_digest(layout.outer_parameters)
    groups, earlier = [], ""
    tokens = samples * length
    for block, names in enumerate(layout.block_parameters):
        own = model.parameters_digest(names)
        units = []
        weights = sum(model.numbers(model.checkpoint.key(n, layout.base_prefix)) for n in names)
        for tap, layers in layout.taps(block).items():
            features = layers[0].in_features
            units.append(
                Unit(
                    "collect",
                    tap,
                    settings={"products": products, "dtype": layout.dtype, "input of": tap},
                    code=CODE,
                    sources={
                        "architecture": model.config_digest,
                        "weights outside blocks": outer,
                        "weights of earlier blocks": earlier,
                        "weights of the block": own,
                    },
                    inputs={"calibration tokens": calibration},
                    cost=Cost(
                        operations=2.0 * tokens * features**2
                        + 2.0 * tokens * weights / len(layout.taps(block)),
                        memory=8 * features**2 + 4 * weights,
                        disk=4 * features * (features + 1),
                    ),
                )
            )
        compute = _Collect(model, calibration, block, products, batch_size)
        groups.append(Group("collect", f"block {block}", units, compute))
        earlier = recipe_key({"earlier": earlier, "block": own})
    return groups


class _Collect:
    """Measures one block; leaves the hidden states for the next one."""

    def __init__(
        self, model: DenseModel, calibration: Unit, block: int, products: str, batch_size: int
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.block = block
        self.products = products
        self.batch_size = batch_size

    def __call__(self, work: Work) -> None:
        import torch

        tokens = get_tensor(work.artifact(self.calibration), "tokens")
        recipe = dict(work.recipes[work.missing[0]])
        hidden = self._enter(work, tokens, recipe)
        measured = self.model.stream.run_block(
            self.block,
            hidden,
            self.batch_size,
            taps=[unit.name for unit in work.missing],
            products=getattr(torch, self.products),
            progress=work.progress,
        )
        for unit in work.missing:
            with work.draft(unit) as draft:
                put_stats(draft, measured[unit.name])
        self._leave(work, hidden, recipe)

    def _scratch_key(self, recipe: dict, block: int) -> str:
        """Key of the hidden states that enter ``block``: like a tap's, but for all weights before."""
        sources = dict(recipe["sources"]) | {"block": str(block)}
        sources.pop("weights of the block")
        if block != self.block:
            layout = self.model.layout
            earlier = ""
            for names in layout.block_parameters[:block]:
                earlier = recipe_key(
                    {"earlier": earlier, "block": self.model.parameters_digest(names)}
                )
            sources["weights of earlier blocks"] = earlier
        settings = {"dtype": self.model.layout.dtype}
        return recipe_key({**recipe, "stage": SCRATCH, "settings": settings, "sources": sources})

    def _enter(self, work: Work, tokens: Tensor, recipe: dict) -> Tensor:
        """Hidden states that enter the block: the latest kept ones, carried on from there."""
        stream = self.model.stream
        stream.prepare(tokens, self.batch_size)
        start, hidden = 0, None
        for block in range(self.block, 0, -1):
            hidden = self._kept(work, self._scratch_key(recipe, block))
            if hidden is not None:
                start = block
                break
        if hidden is None:
            hidden = stream.embed(tokens, self.batch_size)
        for block in range(start, self.block):
            stream.run_block(block, hidden, self.batch_size)
        return hidden

    def _kept(self, work: Work, key: str) -> Tensor | None:
        if work.session.store.find(key, SCRATCH) is None:
            return None
        try:
            return get_tensor(work.session.store.open(key, SCRATCH), "hidden").clone()
        except ArtifactMissingError:  # another process finished with it in the meantime
            return None

    def _leave(self, work: Work, hidden: Tensor, recipe: dict) -> None:
        store = work.session.store
        last = self.block == len(self.model.layout.blocks) - 1
        if not last:
            key = self._scratch_key(recipe, self.block + 1)
            if store.find(key, SCRATCH) is None:
                name = f"hidden states into block {self.block + 1}"
                with store.draft(
                    key=key, stage=SCRATCH, unit=name, recipe={"stage": SCRATCH}, inputs={}
                ) as draft:
                    put_tensor(draft, "hidden", hidden)
        if self.block > 0:
            store.remove(self._scratch_key(recipe, self.block))
