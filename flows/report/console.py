"""What people see while a run goes on: a line per stage, a progress bar on long ones, a summary.

With ``--json`` all of it goes to stderr, so that stdout holds one JSON value and nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tasks.engine.units import Outcome


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console of the terminal's width; of a page's where there is no terminal."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    return console


def _new_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[inside]}"),
        console=console,
        transient=True,
    )


def _count(outcomes: Sequence[Outcome]) -> str:
    cached = sum(outcome.state == "cached" for outcome in outcomes)
    counts = {"cached": cached, "computed": len(outcomes) - cached}
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number)


class Reporter:
    """Tells people what a run does.

    Args:
        stderr: Whether lines go to stderr.
        quiet: Whether nothing is said at all.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        self.console = make_console(stderr=stderr, quiet=quiet)
        self._progress: Progress | None = None
        self._name = ""
        self._outcomes: list[Outcome] = []

    def say(self, line: str) -> None:
        """One plain line."""
        self.console.print(line, markup=False)

    def note(self, line: str) -> None:
        """Something that people should know."""
        self.say(f"note         {line}")

    @contextmanager
    def stage(self, name: str, units: int) -> Iterator[None]:
        """A stage of so many units: a bar while it goes on, one line with state and seconds after.

        The bar goes whatever happens; the line is for a stage that ended well.
        """
        self._outcomes = []
        self._name = name
        started = perf_counter()
        if self.console.is_terminal:
            self._progress = _new_progress(self.console)
            self._task = self._progress.add_task(name, total=units, inside="")
            self._progress.start()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
        self.say(f"{name:<12} {_count(self._outcomes):<28} {perf_counter() - started:8.1f} s")

    def inside(self, label: str, done: int, total: int) -> None:
        """Progress within the group in hand; the bar moves on within the unit, too."""
        if self._progress is not None:
            label = label.removeprefix(self._name).strip()  # which the line begins with
            within = len(self._outcomes) + min(1.0, done / max(1, total))
            self._progress.update(self._task, completed=within, inside=f"{label}  {done}/{total}")

    def advance(self, outcomes: Sequence[Outcome]) -> None:
        """A group of the stage is done."""
        self._outcomes += outcomes
        if self._progress is not None:
            self._progress.update(self._task, completed=len(self._outcomes), inside="")

    def summary(self, result: Mapping[str, Any]) -> None:
        """What was kept, what it cost, where it is."""
        parameters, size, memory = result["parameters"], result["bytes"], result["memory"]
        share = parameters["compressible_compressed"] / parameters["compressible_dense"]
        self.say(
            f"kept         {share:.3f} of the layers: {parameters['compressed']:,} of "
            f"{parameters['dense']:,} parameters, {size['compressed'] / 1e6:,.1f} of "
            f"{size['dense'] / 1e6:,.1f} MB on disk, {memory['compressed'] / 1e6:,.1f} of "
            f"{memory['dense'] / 1e6:,.1f} MB in memory"
        )
        models = list(result["metrics"].values())  # dense, before recovery if any, compressed
        for label, compressed in models[-1]["texts"].items():
            texts = [model["texts"][label] for model in models]
            self.say(
                f"perplexity   {_way(text['perplexity'] for text in texts)}, "
                f"KL {_way(text['kl'] for text in texts[1:])} nats/token on {label} "
                f"({compressed['windows']} windows of {compressed['length']} tokens)"
            )
        for task, compressed in models[-1]["tasks"].items():
            scores = ", ".join(
                f"{metric} {_way(model['tasks'][task][metric] for model in models)}"
                for metric in compressed
                if not metric.endswith("_stderr")
            )
            self.say(f"{task:<12} {scores}")
        registered = result["registered"]
        self.say(f"model        {result['model_dir']}")
        self.say(
            f"registered   {registered['name']} version {registered['version']}; "
            f"the stages took {result['seconds']:.1f} s, the model ran in {result['compute']}"
        )

    def table(self, results: Sequence[Mapping[str, Any]]) -> None:
        """A row per run of a sweep."""
        first = results[0]
        self.console.print(sweep_table(results))
        for label, dense in first["metrics"]["dense"]["texts"].items():
            windows = f"{dense['windows']} windows of {dense['length']} tokens"
            self.say(
                f"dense: perplexity {dense['perplexity']:.4g} on {label} ({windows}), "
                f"{first['parameters']['dense']:,} parameters, "
                f"{first['bytes']['dense'] / 1e6:,.1f} MB on disk, "
                f"{first['memory']['dense'] / 1e6:,.1f} MB in memory"
            )


def _way(values: Iterable[float]) -> str:
    """Numbers that follow from one another."""
    return " → ".join(f"{value:.4g}" for value in values)


def sweep_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Method, kept, perplexity per text, KL, size, seconds and what was reused."""
    labels = list(results[0]["metrics"]["compressed"]["texts"])
    tasks = list(results[0]["metrics"]["compressed"]["tasks"])
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    measures = [f"{measure} {label}" for measure in ("perplexity", "KL") for label in labels]
    sizes = ["million parameters", "MB on disk", "MB in memory"]
    for column in ["kept", *measures, *tasks, *sizes, "s", "reused"]:
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        texts = result["metrics"]["compressed"]["texts"]
        scores = result["metrics"]["compressed"]["tasks"]
        cached = sum(stage["state"] == "cached" for stage in result["stages"])
        table.add_row(
            result["method"],
            f"{result['kept']:g}",
            *(f"{texts[label]['perplexity']:.4g}" for label in labels),
            *(f"{texts[label]['kl']:.3f}" for label in labels),
            *(_main_score(scores[task]) for task in tasks),
            f"{result['parameters']['compressed'] / 1e6:.2f}",
            f"{result['bytes']['compressed'] / 1e6:.1f}",
            f"{result['memory']['compressed'] / 1e6:.1f}",
            f"{result['seconds']:.1f}",
            f"{cached}/{len(result['stages'])}",
        )
    return table


def _main_score(scores: Mapping[str, float]) -> str:
    """Accuracy where the task has one, else its first metric."""
    return f"{scores.get('acc', next(iter(scores.values()))):.3f}"


current_reporter: ContextVar[Reporter | None] = ContextVar("current_reporter", default=None)


def get_reporter() -> Reporter:
    """The reporter of the command in hand; a flow that a worker started reports to stderr."""
    return current_reporter.get() or Reporter(stderr=True)
