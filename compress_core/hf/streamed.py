"""A model that is evaluated block by block: all of its windows through one block, then the next."""

import torch
from torch import Tensor

from compress_core.head import Halves
from compress_core.hf.stream import BlockStream, Progress


class Streamed:
    """What :func:`compress_core.evaluate.perplexity_and_kl` asks of a model.

    Held are one block, what is outside the blocks, and the hidden states of all windows: on the
    device where the stream's room has place for them, else handed to it batch by batch. For the
    same batches they are those of the whole model to the bit: the same modules compute them.

    Args:
        stream: The model; its blocks have run when this is made, if at all.
        windows: int64 token ids (n, length).
        batch_size: Windows per forward.
        progress: Called after each batch of each block, with windows done and windows in all.
        states: What leaves the last block (n, length, width), where that is known: no block runs.

    Raises:
        ModelError: The model cannot be run block by block.
    """

    def __init__(
        self,
        stream: BlockStream,
        windows: Tensor,
        batch_size: int,
        progress: Progress | None = None,
        states: Tensor | None = None,
    ) -> None:
        self.stream = stream
        self.halves = Halves(stream.model)
        entering = stream.embed(windows, batch_size) if states is None else states
        stays = entering.nbytes <= stream.room.on_device
        self.states = entering.to(stream.device) if stays else entering
        if states is None:
            self._run_blocks(batch_size, progress)
        stream.load_head()

    def _run_blocks(self, batch_size: int, progress: Progress | None) -> None:
        blocks, count = len(self.stream.layout.blocks), len(self.states)
        for block in range(blocks):

            def told(done: int, _: int, before: int = block * count) -> None:
                if progress is not None:
                    progress(before + done, blocks * count)

            self.stream.run_block(block, self.states, batch_size, progress=told)

    @torch.inference_mode()
    def hidden(self, first: int, ids: Tensor) -> Tensor:
        """The last hidden states (batch, length, width) of the windows from number ``first`` on."""
        with self.stream.behind(self.states[first : first + len(ids)]):
            return self.halves.hidden(ids)

    def logits(self, rows: Tensor) -> Tensor:
        """As :meth:`compress_core.head.Halves.logits`."""
        return self.halves.logits(rows)

    def pieces(self, rows: int) -> list[slice]:
        """As :meth:`compress_core.head.Halves.pieces`."""
        return self.halves.pieces(rows)
