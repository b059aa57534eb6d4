"""What the loop that every training shares promises."""

import torch
from torch import Tensor, nn

from compress_core.learn.loop import batch_of, descend


def test_every_window_is_seen_once_in_an_epoch_whatever_the_seed() -> None:
    for seed in (0, 3, 20260101120000, 1 << 70):
        seen = torch.cat([batch_of(step, 10, 4, seed) for step in range(5)])
        assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_gradients_of_float16_are_not_lost_in_a_mean_over_many_tokens() -> None:
    inputs = torch.linspace(-1, 1, 8)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = nn.Parameter(torch.ones(8))
        outputs = leaf.to(dtype) * inputs.to(dtype)
        loss = outputs.float().sum() / 1e8  # float16 ends at 6e-8
        descend(loss, torch.optim.SGD([leaf]), [leaf], dtype)
        assert leaf.grad is not None
        return leaf.grad

    found, truth = gradient(torch.float16), gradient(torch.float32)
    torch.testing.assert_close(found, truth, rtol=2e-2, atol=0)
