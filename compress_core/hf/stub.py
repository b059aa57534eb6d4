"""What stands in for a block while the rest of a model runs."""

from typing import Any

from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with


class Stub(nn.Module):
    """Stands in for a block: notes what it was called with and returns its input.

    Args:
        block: What it stands in for; a model may ask its blocks for more than their output.
        order: Told of every call, by all stubs of a model.
        output_length: Of the tuple that the block returns; 0 for hidden states by themselves.
    """

    def __init__(self, block: nn.Module, order: list["Stub"], output_length: int) -> None:
        super().__init__()
        self.block = (block,)  # in a tuple, or it would be a submodule
        self.order = order
        self.output_length = output_length
        self.call: Call = ((), {})
        self.received: Tensor | None = None
        self.passed: Tensor | None = None
        self.version = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they came."""
        self.order.append(self)
        self.received = args[0] if args else kwargs["hidden_states"]
        self.call = with_hidden((args, kwargs), None)
        self.passed = self.received.view_as(self.received)  # a new object: the chain can be checked
        self.version = self.passed._version
        return self.output(self.passed)

    def output(self, hidden: Tensor) -> Any:
        """Hidden states as the block would return them, with nothing beside them."""
        length = self.output_length
        return (hidden, *[None] * (length - 1)) if length else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block[0], name)

    def hands_on_to(self, other: "Stub") -> bool:
        """Whether what this one returned is what the other one received, untouched."""
        passed = self.passed
        return passed is not None and passed is other.received and passed._version == self.version


def with_hidden(call: Call, hidden: Tensor | None) -> Call:
    """The call with other hidden states in it, or none."""
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
