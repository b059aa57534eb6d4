"""What people see while a run goes on: a line per stage, a bar or a line on long ones, a summary.

With ``--json`` all of it goes to stderr, so that stdout holds one JSON value and nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from flows.report.lines import duration, entry, make_console, say, size
from flows.report.tables import kind_part, sweep_tables
from tasks.engine.peak_memory import Peak, PeakMemory
from tasks.engine.units import Outcome

EVERY = 25.0  # seconds between lines while something computes: at most 30, with some to spare
NEXT = ("  eigenpress run --model MODEL --calibration TEXT --kept 0.3",)


def _new_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[inside]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
    )


def _count(outcomes: Sequence[Outcome]) -> str:
    cached = sum(outcome.state == "cached" for outcome in outcomes)
    counts = {"cached": cached, "computed": len(outcomes) - cached}
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number)


class Reporter:
    """Tells people what a run does.

    On a terminal a long stage has a bar; elsewhere, and where stdout belongs to JSON, it says in
    a line from time to time how far it is.

    Args:
        stderr: Whether lines go to stderr.
        quiet: Whether nothing is said at all.
        every: Seconds between two such lines.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False, every: float = EVERY) -> None:
        self.console = make_console(stderr=stderr, quiet=quiet)
        self.every = every
        self._bars = self.console.is_interactive and self.console.file.isatty() and not stderr
        self._progress: Progress | None = None
        self._begin("", 0)

    def _begin(self, name: str, units: int) -> None:
        self._name = name
        self._units = units
        self._outcomes: list[Outcome] = []
        self._of_group = 1  # units of the group in hand
        self._inside = ("", 0.0)  # what it is about, and how many of its units that comes to
        self._elsewhere = Peak()  # of other processes that computed
        self._started = perf_counter()

    def say(self, line: str) -> None:
        """One plain line."""
        say(self.console, line)

    def entry(self, head: str, body: str) -> None:
        """A line that begins with a word for what it is about."""
        entry(self.console, head, body)

    def note(self, line: str) -> None:
        """Something that people should know."""
        self.entry("note", line)

    @contextmanager
    def stage(self, name: str, units: int) -> Iterator[None]:
        """A stage of so many units: how far it is while it goes on, then what it took.

        The last line is for a stage that ended well.
        """
        self._begin(name, units)
        memory = PeakMemory()
        try:
            with self._bar() if self._bars else self._lines():
                yield
        finally:
            peak = memory.stop()
        seconds = perf_counter() - self._started
        whose = ""
        if self._elsewhere.ram:
            peak, whose = self._elsewhere, " a worker"
        gpu = f", GPU {size(peak.accelerator)}" if peak.accelerator else ""
        took = f"peak {size(peak.ram)}{gpu}{whose}"
        self.say(f"{name:<12} {_count(self._outcomes):<28} {seconds:8.1f} s  {took}")

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Something that is no stage and may take long: a line from time to time."""
        self._begin(name, 0)
        with self._lines():
            yield

    @contextmanager
    def _bar(self) -> Iterator[None]:
        self._progress = _new_progress(self.console)
        self._task = self._progress.add_task(self._name, total=self._units, inside="")
        self._progress.start()
        try:
            yield
        finally:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def _lines(self) -> Iterator[None]:
        """A thread that speaks while others compute, however long one unit takes them."""
        ended = Event()

        def speak() -> None:
            while not ended.wait(self.every):
                self.entry(self._name, self.standing())

        thread = Thread(target=speak, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def standing(self) -> str:
        """How far the stage in hand is: "12 of 30, block 12  3/7; 2 min so far, 3 min left"."""
        passed = perf_counter() - self._started
        if not self._units:
            return f"{duration(passed)} so far"
        label, within = self._inside
        done = len(self._outcomes) + within
        cached = sum(outcome.state == "cached" for outcome in self._outcomes)
        computed = done - cached
        left = "time left not known yet"
        if computed > 0:
            rest = duration(passed * max(0.0, self._units - done) / computed)
            left = f"{rest} left"
        told = f"{len(self._outcomes)} of {self._units}"
        return f"{told}{label and f', {label}'}; {duration(passed)} so far, {left}"

    def group(self, units: int) -> None:
        """A group of so many units begins."""
        self._of_group = units
        self._inside = ("", 0.0)

    def inside(self, label: str, done: int, total: int) -> None:
        """Progress within the group in hand; the bar moves on within it, too."""
        share = min(1.0, done / max(1, total))
        self._show(f"{label}  {done}/{total}", self._of_group * share)

    def beside(self, labels: Sequence[str], units: float) -> None:
        """Progress of others within several groups of the stage.

        Args:
            labels: Of those that are in hand, each with how far it is.
            units: That all of that comes to, with what is done and has yet to be told.
        """
        more = f" and {len(labels) - 1} more" if labels[1:] else ""
        self._show(f"{next(iter(labels), '')}{more}", units)

    def _show(self, label: str, within: float) -> None:
        about = label.removeprefix(self._name).strip()  # the line has the name
        self._inside = (about, within)
        if self._progress is not None:
            completed = round(len(self._outcomes) + within, 2)
            self._progress.update(self._task, completed=completed, inside=about)

    def elsewhere(self, peak: Peak) -> None:
        """Another process has computed of the stage in hand, and took so much at most."""
        self._elsewhere |= peak

    def advance(self, outcomes: Sequence[Outcome]) -> None:
        """A group of the stage is done."""
        self._inside = ("", 0.0)
        self._outcomes += outcomes
        if self._progress is not None:
            self._progress.update(self._task, completed=len(self._outcomes), inside="")

    def summary(self, result: Mapping[str, Any]) -> None:
        """What was kept, what it cost, where it is."""
        parameters, size, memory = result["parameters"], result["bytes"], result["memory"]
        share = parameters["compressible_compressed"] / parameters["compressible_dense"]
        parts = {kind: kind_part(result, kind) for kind in ("entries", "columns")}
        kinds = "".join(f", {part} % of that in {kind}" for kind, part in parts.items() if part)
        self.entry(
            "kept",
            f"{share:.3f} of the layers{kinds}: {parameters['compressed']:,} of "
            f"{parameters['dense']:,} parameters, {size['compressed'] / 1e6:,.1f} of "
            f"{size['dense'] / 1e6:,.1f} MB on disk, {memory['compressed'] / 1e6:,.1f} of "
            f"{memory['dense'] / 1e6:,.1f} MB in memory",
        )
        if "predicted" in result:
            others = result.get("passed_over", {}).items()
            instead = "".join(f"; {name} {left:.4g}" for name, left in others)
            told = f"KL {result['predicted']:.4g} nats/token, of what was cut{instead}"
            self.entry("predicted", told)
        models = list(result["metrics"].values())  # dense, before recovery if any, compressed
        for label, compressed in models[-1]["texts"].items():
            texts = [model["texts"][label] for model in models]
            self.entry(
                "perplexity",
                f"{_way(text['perplexity'] for text in texts)}, "
                f"KL {_way(text['kl'] for text in texts[1:])} nats/token on {label} "
                f"({compressed['windows']} windows of {compressed['length']} tokens)",
            )
        for task, compressed in models[-1]["tasks"].items():
            scores = ", ".join(
                f"{metric} {_way(model['tasks'][task][metric] for model in models)}"
                for metric in compressed
                if not metric.endswith("_stderr")
            )
            self.entry(task, scores)
        registered = result["registered"]
        self.entry("model", result["model_dir"])
        self.entry(
            "registered",
            f"{registered['name']} version {registered['version']}; "
            f"the stages took {result['seconds']:.1f} s, the model ran in {result['compute']}",
        )

    def table(self, results: Sequence[Mapping[str, Any]]) -> None:
        """A row per run of a sweep, and the dense model on every text."""
        first = results[0]
        for table in sweep_tables(results, self.console.width):
            self.console.print(table)
            self.say("")
        texts = first["metrics"]["dense"]["texts"]
        for place, (label, dense) in enumerate(texts.items(), start=1):
            which = f"text {place}: {label}" if len(texts) > 1 else label
            self.entry(
                "dense",
                f"perplexity {dense['perplexity']:.4g} on {which} "
                f"({dense['windows']} windows of {dense['length']} tokens)",
            )
        self.entry(
            "dense",
            f"{first['parameters']['dense']:,} parameters, "
            f"{first['bytes']['dense'] / 1e6:,.1f} MB on disk, "
            f"{first['memory']['dense'] / 1e6:,.1f} MB in memory",
        )

    def demonstration(
        self,
        prompt: str,
        words: Mapping[str, str],
        folder: Path,
        results: Sequence[Mapping[str, Any]],
    ) -> None:
        """What the models write, where things are, and what to do next."""
        self.say("")
        self.say(f'After "{prompt.strip()}" the models write:')
        widest = max(map(len, words))
        for name, text in words.items():
            line = f"  {name:<{widest}}  {' '.join(text.split())}"
            say(self.console, line, widest + 4)
        self.say("")
        first, last = (results[place]["registered"] for place in (0, -1))
        self.entry("picture", str(folder / "perplexity.png"))
        self.entry("models", str(Path(results[0]["model_dir"]).parent))
        self.entry(
            "registered",
            f"{first['name']} versions {first['version']} to {last['version']}, in MLflow",
        )
        self.say("")
        self.say("Your own model, a folder or a name on the hub, and text like what it is for:")
        for line in NEXT:
            self.say(line)


def _way(values: Iterable[float]) -> str:
    """Numbers that follow from one another."""
    return " → ".join(f"{value:.4g}" for value in values)
