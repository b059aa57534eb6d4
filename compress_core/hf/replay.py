"""What a block need not compute again when one of its layers changes.

One pass notes when each module of the block ran, what it read and what it returned. A module whose
inputs were all there before a layer ran cannot depend on that layer: it returns the same again.
This holds for whatever ran before the layer, for the layers that share its input, and for a branch
beside it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compress_core.head import forward_of
from compress_core.hf.observe import tensors_in
from compress_core.hf.stub import Stub, with_hidden

_Around = tuple[tuple[Any, ...], tuple[Any, ...]] | None


@dataclass
class _Run:
    """The one call of a module in a pass; times count the calls and returns before.

    Attributes:
        start: When it was called.
        ready: When everything it read was there.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        versions: Of the tensors in ``output`` when it returned; a change in place raises them.
    """

    start: int
    ready: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    versions: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kept:
    module: nn.Module
    layers: frozenset[str]  # inside the module
    ready: int
    output: Any


@dataclass(frozen=True)
class _Tail:
    """A module that returns a layer's output as it is: nothing else in it need run.

    Attributes:
        module: The outermost such module.
        layers: Those inside it.
        layer: The layer.
        input: What the layer reads.
        around: What the module returns before and after the layer's output, if it is a tuple.
    """

    module: nn.Module
    layers: frozenset[str]
    layer: nn.Module
    input: Tensor
    around: _Around

    def run(self) -> Any:
        """The module's output with the layer's present weight."""
        new = self.layer(self.input)
        return new if self.around is None else (*self.around[0], new, *self.around[1])


@dataclass(frozen=True)
class BlockMemo:
    """Outputs of one block's modules for one batch, ready to be returned again.

    Attributes:
        starts: Layer name to when it ran first.
        kept: What some layer's change leaves as it is.
        tails: Layer name to the module that ends with it.
    """

    starts: Mapping[str, int]
    kept: Sequence[_Kept]
    tails: Mapping[str, _Tail]

    @contextmanager
    def replay(self, changed: Iterable[str]) -> Iterator[None]:
        """While it is open, modules that the layers ``changed`` cannot affect do not compute."""
        changed = frozenset(changed)
        if not changed <= self.starts.keys():  # one that did not run while we watched
            yield
            return
        first = min(changed, key=self.starts.__getitem__)
        tail = self.tails.get(first)
        with ExitStack() as stack:
            for kept in self.kept:
                if kept.ready <= self.starts[first] and not kept.layers & changed:
                    stack.enter_context(forward_of(kept.module, _returning(kept.output)))
            if tail is not None and tail.layers & changed == {first}:
                stack.enter_context(forward_of(tail.module, lambda *_, **__: tail.run()))
            yield


def record_block(
    block: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, BlockMemo]:
    """Calls a block and notes what its modules do; nothing may track gradients.

    Args:
        block: The block.
        layers: Name to module of the layers in it that may change later.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The block's output, and the memo; it holds only what the change of a layer can reuse.
    """
    watch = _Watch(block)
    output = watch.call(args, kwargs)
    names = {id(module): name for name, module in layers.items()}
    inside = {
        path: frozenset(names[id(part)] for part in module.modules() if id(part) in names)
        for path, module in watch.modules.items()
    }
    once = {path: runs[0] for path, runs in watch.runs.items() if len(runs) == 1}
    steady = {path: run for path, run in once.items() if run.versions == _versions(run.output)}
    paths = {
        name: path for path, module in watch.modules.items() if (name := names.get(id(module)))
    }
    starts = {name: watch.runs[path][0].start for name, path in paths.items() if path in watch.runs}
    tails: dict[str, _Tail] = {}
    wanted: set[str] = set()
    for name, start in starts.items():
        owner = _ends_with(watch, once, paths[name], start)
        if owner is not None:
            path, around = owner
            layer, (read,) = watch.modules[paths[name]], once[paths[name]].args
            tails[name] = _Tail(watch.modules[path], inside[path], layer, read, around)
        # What a change of this layer leaves as it is; of modules within one another the outermost.
        same = {p for p, run in steady.items() if run.ready <= start and name not in inside[p]}
        closed = same | ({owner[0]} if owner else set())  # nothing inside these runs
        wanted |= {p for p in same if not any(p.startswith(f"{above}.") for above in closed)}
    kept = [_Kept(watch.modules[p], inside[p], once[p].ready, once[p].output) for p in wanted]
    return output, BlockMemo(starts, kept, tails)


class _Watch:
    """Hooks on every module of a block for the length of one call."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules = {path: module for path, module in block.named_modules() if path}
        self.runs: dict[str, list[_Run]] = {}
        self._seen: dict[int, tuple[Tensor, int, int]] = {}  # id -> itself, its version, when
        self._now = 0

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ready((args, kwargs))
        handles = []
        try:
            for path, module in self.modules.items():
                before, after = self._hooks(path)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            return self.block(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        open_runs: list[_Run] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now += 1
            run = _Run(self._now, self._ready((args, kwargs)), args, kwargs)
            open_runs.append(run)
            self.runs.setdefault(path, []).append(run)

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            self._now += 1
            run = open_runs.pop()
            run.output, run.versions = output, _versions(output)
            self._ready(output)

        return before, after

    def _ready(self, value: Any) -> int:
        """When all tensors in ``value`` were first seen as they are; now, if others may be."""
        times = [self.first_seen(tensor) for tensor in tensors_in(value)]
        return max(times) if times and _plain(value) else self._now

    def first_seen(self, tensor: Tensor) -> int:
        """When it was first seen with its present content."""
        _, version, when = self._seen.get(id(tensor), (tensor, -1, 0))
        if version != tensor._version:
            when = self._now
            self._seen[id(tensor)] = (tensor, tensor._version, when)  # held, or its id is reused
        return when


def _ends_with(
    watch: _Watch, once: Mapping[str, _Run], path: str, start: int
) -> tuple[str, _Around] | None:
    """The outermost module that hands on the output of the layer at ``path``, and what with it."""
    layer = once.get(path)
    if (
        layer is None
        or layer.kwargs
        or len(layer.args) != 1
        or not isinstance(layer.output, Tensor)
    ):
        return None
    (read,) = layer.args
    if watch.first_seen(read) > start:  # changed since; a later pass could not read the same
        return None
    parts = path.split(".")
    for depth in range(1, len(parts)):
        above = once.get(".".join(parts[:depth]))
        if above is None:
            continue
        found = above.output if type(above.output) is tuple else (above.output,)
        places = [place for place, value in enumerate(found) if value is layer.output]
        if len(places) != 1 or above.versions[id(layer.output)] != layer.versions[id(layer.output)]:
            continue
        around = found[: places[0]], found[places[0] + 1 :]
        if _plain(around) and all(watch.first_seen(other) <= start for other in tensors_in(around)):
            return ".".join(parts[:depth]), around if type(above.output) is tuple else None
    return None


def _versions(value: Any) -> dict[int, int]:
    return {id(tensor): tensor._version for tensor in tensors_in(value)}


def _plain(value: Any) -> bool:
    """Whether :func:`tensors_in` sees every tensor that ``value`` can hold."""
    if isinstance(value, Mapping):
        return all(_plain(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


@dataclass
class BlockState:
    """What is kept of one batch: hidden states around the entered block, and the block's memo."""

    hidden: Tensor
    memo: BlockMemo
    after: Tensor | None = None  # what the next block receives


class Skip(Stub):
    """In place of a block that need not run: hands its input on.

    Attributes:
        notes: Whether it keeps a copy.
        noted: The copy.
    """

    notes = False
    noted: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states as they came."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.notes:
            self.noted = hidden.clone()
        return self.output(hidden)


class Enter(Stub):
    """In place of a block that runs: gives it other hidden states, or notes what it does.

    Attributes:
        hidden: What the block is given, if not what it would receive.
        watched: Its layers by name, if it is to be noted.
        state: What was noted last.
    """

    hidden: Tensor | None = None
    watched: Mapping[str, nn.Module] | None = None
    state: BlockState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        hidden = self.hidden
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        # A copy, because nothing keeps a block from changing its input in place.
        args, kwargs = with_hidden((args, kwargs), hidden.clone())
        if self.watched is None:
            return self.block[0](*args, **kwargs)
        output, memo = record_block(self.block[0], self.watched, args, kwargs)
        self.state = BlockState(hidden, memo)
        return output
