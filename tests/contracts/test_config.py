"""A YAML file says what the flags say, flags win over it, and every mistake is one clear line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress_core.errors import ConfigError
from flows.settings.config import (
    RunConfig,
    Settings,
    SweepConfig,
    build_config,
)
from flows.settings.flags import with_flags
from flows.settings.home import default_home
from flows.settings.reading import file_and_flags, read_yaml, write_yaml

# Flag, its words on the command line, and what the field then holds; none is the default.
COMMON: dict[str, tuple[list[str], Any]] = {
    "model": (["some/model"], "some/model"),
    "of": (["model"], "model"),
    "allocate": (["hull"], "hull"),
    "rank_multiple": (["8"], 8),
    "factors": (["pivot"], "pivot"),
    "metric": (["two_sided"], "two_sided"),
    "bits": (["4"], 4),
    "options": (["alpha=0.3", "epsilon=1e-4"], {"alpha": "0.3", "epsilon": "1e-4"}),
    "recover": (["lora"], "lora"),
    "recover_steps": (["30"], 30),
    "recover_text": (["0.5"], 0.5),
    "recover_held_back": (["0.25"], 0.25),
    "recover_seed": (["5"], 5),
    "learn_seed": (["6"], 6),
    "calibration": (["words.txt"], "words.txt"),
    "calibration_field": (["body"], "body"),
    "samples": (["7"], 7),
    "length": (["99"], 99),
    "seed": (["11"], 11),
    "bos": ([], True),
    "products": (["float32"], "float32"),
    "compute": (["float32"], "float32"),
    "eval_text": (["a.txt,b.txt", "c.txt"], ["a.txt", "b.txt", "c.txt"]),
    "eval_field": (["title"], "title"),
    "skip_bad_rows": (["0.01"], 0.01),
    "eval_windows": (["0"], 0),
    "tasks": (["arc_easy, piqa"], ["arc_easy", "piqa"]),
    "task_path": (["folder"], Path("folder")),
    "task_limit": (["5"], 5),
    "num_fewshot": (["5"], 5),
    "apply_chat_template": ([], True),
    "device": (["cuda:1"], "cuda:1"),
    "batch_size": (["3"], 3),
    "memory": (["12GB"], 12_000_000_000),
    "runner": (["dask"], "dask"),
    "workers": (["3"], 3),
    "cluster": (["tcp://127.0.0.1:8786"], "tcp://127.0.0.1:8786"),
    "home": (["elsewhere"], Path("elsewhere")),
    "store": (["s3://bucket/models"], "s3://bucket/models"),
    "name": (["tiny"], "tiny"),
    "refresh": (["collect,evaluate"], ["collect", "evaluate"]),
    "trust_remote_code": ([], True),
    "link": ([], True),
}
OWN: dict[type[Settings], dict[str, tuple[list[str], Any]]] = {
    RunConfig: {
        "method": (["asvd"], "asvd"),
        "output": (["out"], Path("out")),
    },
    SweepConfig: {
        "methods": (["svd,asvd"], ["svd", "asvd"]),
        "report": (["tables"], Path("tables")),
    },
}
BUDGETS: dict[type[Settings], dict[str, tuple[list[str], Any]]] = {  # one of them at a time
    RunConfig: {
        "kept": (["0.25"], 0.25),
        "target_bytes": (["1.5GB"], 1_500_000_000),
        "target_perplexity": (["12.5"], 12.5),
    },
    SweepConfig: {"kept": (["0.8,0.6", "0.4"], [0.8, 0.6, 0.4])},
}
KINDS: list[type[Any]] = [RunConfig, SweepConfig]
CASES = [(kind, budget) for kind, budgets in BUDGETS.items() for budget in budgets]
LEAST: dict[type[Settings], dict[str, Any]] = {
    RunConfig: {"model": "m", "kept": 0.5},
    SweepConfig: {"model": "m", "kept": [0.5], "methods": ["svd"]},
}


def parse(kind: type[Settings], words: list[str]) -> dict[str, Any]:
    """What a command receives for these words on the command line."""
    import typer

    received: list[dict[str, Any]] = []
    app = typer.Typer(add_completion=False)

    def command(given: dict[str, Any]) -> None:
        received.append(given)

    app.command()(with_flags(kind)(command))
    app(words, standalone_mode=False)
    return received[0]


def as_words(settings: Mapping[str, tuple[list[str], Any]]) -> list[str]:
    words = []
    for name, (values, _) in settings.items():
        flag = "--option" if name == "options" else "--" + name.replace("_", "-")
        words += [word for value in values for word in (flag, value)] or [flag]
    return words


def all_settings(kind: type[Settings], budget: str = "kept") -> dict[str, tuple[list[str], Any]]:
    return COMMON | OWN[kind] | {budget: BUDGETS[kind][budget]}


@pytest.mark.parametrize(("kind", "budget"), CASES)
def test_every_setting_has_a_flag(kind: type[Settings], budget: str) -> None:
    settings = all_settings(kind, budget)
    assert {*settings, *BUDGETS[kind]} == set(kind.model_fields)

    config = build_config(kind, parse(kind, as_words(settings)), None)
    for name, (_, value) in settings.items():
        assert getattr(config, name) == value
        assert value != kind.model_fields[name].default


@pytest.mark.parametrize(("kind", "budget"), CASES)
def test_a_file_says_what_flags_say(kind: type[Settings], budget: str, tmp_path: Path) -> None:
    settings = all_settings(kind, budget)
    values = {name: value for name, (_, value) in settings.items()}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({n: _plain(value) for n, value in values.items()}))

    by_flags = build_config(kind, parse(kind, as_words(settings)), None)
    assert build_config(kind, {}, file) == by_flags


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize(("kind", "budget"), CASES)
def test_what_is_written_reads_back(kind: type[Settings], budget: str, tmp_path: Path) -> None:
    values = {name: value for name, (_, value) in all_settings(kind, budget).items()}
    file = tmp_path / "resolved.yaml"
    for given in (values, LEAST[kind]):
        config = kind(**given)
        write_yaml(config, file)
        assert build_config(kind, {}, file) == config


@pytest.mark.parametrize("kind", KINDS)
def test_flags_win_over_the_file(kind: type[Settings], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    write_yaml(kind(**LEAST[kind], samples=5, bos=True, seed=8, tasks=["piqa"]), file)

    given = parse(kind, ["--samples", "6", "--no-bos", "--tasks", "arc_easy,sciq"])
    config = build_config(kind, given, file)
    assert (config.samples, config.bos, config.tasks) == (6, False, ["arc_easy", "sciq"])
    assert config.seed == 8


def test_options_are_set_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: m\nkept: 0.5\noptions: {alpha: 0.3, epsilon: 0.1}\n")

    config = build_config(RunConfig, {"options": {"alpha": "0.7"}}, file)
    assert config.options == {"alpha": "0.7", "epsilon": 0.1}


def test_a_sweep_is_runs_that_share_the_rest() -> None:
    values = {name: value for name, (_, value) in all_settings(SweepConfig).items()}
    runs = SweepConfig(**values).runs()

    pairs = [(run.method, run.kept) for run in runs]
    assert pairs == [(m, k) for m in ("svd", "asvd") for k in (0.8, 0.6, 0.4)]
    for run in runs:
        assert all(getattr(run, name) == value for name, (_, value) in COMMON.items())


@pytest.mark.parametrize("kept", [0, 1.5, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_outside_its_range_is_refused(kind: type[Settings], kept: float) -> None:
    wanted = [0.5, kept] if kind is SweepConfig else kept

    with pytest.raises(ConfigError, match=rf"^kept must be in \(0, 1\], got {kept:g}: it is the"):
        build_config(kind, LEAST[kind] | {"kept": wanted}, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("1.5GB", 1_500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("300kb", 300_000),
        ("3MiB", 3 * 1024**2),
        ("64KiB", 64 * 1024),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(text: str, size: int, tmp_path: Path) -> None:
    by_flag = build_config(
        RunConfig, parse(RunConfig, ["--model", "m", "--target-bytes", text]), None
    )
    (tmp_path / "run.yaml").write_text(f"model: m\ntarget_bytes: {text}\n")
    by_file = build_config(RunConfig, {}, tmp_path / "run.yaml")
    assert (by_flag.target_bytes, by_file.target_bytes) == (size, size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kept": "half"}, "kept: input should be a valid number.*, got 'half'"),
        ({"kept": None}, "^kept is missing: give one of --kept, --target-bytes and --target-per"),
        ({"target_bytes": "2MB"}, "^--kept and --target-bytes are two budgets: give one of"),
        ({"target_perplexity": 9}, "^--kept and --target-perplexity are two budgets: give"),
        ({"kept": None, "target_bytes": "much"}, "target_bytes: could not parse.*, got 'much'"),
        (
            {"kept": None, "target_bytes": "2 XB"},
            "target_bytes: could not interpret .*, got '2 XB'",
        ),
        (
            {"kept": None, "target_perplexity": 1},
            "^--target-perplexity is a number above 1, got 1$",
        ),
        ({"kept": None, "target_perplexity": float("nan")}, "is a number above 1, got nan$"),
        ({"kept": None, "target_perplexity": float("inf")}, "is a number above 1, got inf$"),
        ({"sample": 3}, "there is no setting called 'sample'. Did you mean 'samples'?"),
        ({"hue": 3}, r"there is no setting called 'hue'$"),
        ({"samples": 0}, "samples: input should be greater than or equal to 1, got 0"),
        ({"samples": 1.5}, "samples: .*, got 1.5"),
        ({"length": 7}, "length: input should be greater than or equal to 8, got 7"),
        ({"batch_size": 0}, "^batch_size: it is auto or a whole number above 0 .*, got 0$"),
        ({"batch_size": "some"}, "^batch_size: it is auto or .*, got 'some'$"),
        ({"batch_size": 1.5}, "^batch_size: .*, got 1.5$"),
        ({"seed": -1}, "seed: .*, got -1"),
        ({"eval_windows": -1}, "eval_windows: .*, got -1"),
        ({"task_limit": 0}, "task_limit: .*, got 0"),
        ({"num_fewshot": -1}, "num_fewshot: .*, got -1"),
        ({"skip_bad_rows": -1}, "skip_bad_rows: .*, got -1"),
        ({"skip_bad_rows": 1.5}, "skip_bad_rows: it is a count or a share below 1, got 1.5"),
        ({"skip_bad_rows": "nan"}, "skip_bad_rows: .*, got 'nan'"),
        ({"skip_bad_rows": "inf"}, "skip_bad_rows: .*, got"),
        ({"of": "all"}, "of: input should be 'compressible' or 'model', got 'all'"),
        ({"products": "float16"}, "products: input should be 'float64' or 'float32', got"),
        ({"refresh": ["colect"]}, "refresh.0: input should be 'tokenise', 'collect', .*'colect'"),
        ({"tasks": "piqa"}, "tasks: input should be a valid list, got 'piqa'"),
        ({"model": 3}, "model: input should be a valid string, got 3"),
        ({"options": {"alpha": [1]}}, "options.alpha"),
        ({"name": "team/model"}, "^name 'team/model' cannot be registered: .* holds '/' or ':'$"),
        ({"name": ""}, "^name '' is empty: leave it out"),
        ({"sample": 1, "seed": -1}, "seed: .*; there is no setting called 'sample'"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(RunConfig, LEAST[RunConfig] | values, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model", "kept"])
def test_a_missing_setting_is_named(kind: type[Settings], name: str) -> None:
    values = {n: value for n, value in LEAST[kind].items() if n != name}

    where = rf"\(--{name} or `{name}:` in --config\)$"
    if (kind, name) == (RunConfig, "kept"):
        where = r"give one of --kept, --target-bytes and --target-perplexity \(or `kept:` in --con"
    with pytest.raises(ConfigError, match=rf"^{name} is missing:? {where}"):
        build_config(kind, values, None)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\nkept: 0.5\nhue: red\n")

    with pytest.raises(ConfigError, match=r"'hue' \(with --config .*mine\.yaml\)$"):
        build_config(RunConfig, {}, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b\n", "is not YAML: .* line 1"),
        ("\t- x: y", "is not YAML"),
        ("- a\n- b\n", "must hold a mapping of settings to values"),
        ("just words", "must hold a mapping of settings to values"),
        ("", "must hold a mapping of settings to values"),
        ("!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    cases = {
        tmp_path / "absent.yaml": "cannot read --config .*absent.yaml: No such file",
        tmp_path: "cannot read --config .*: Is a directory",
        tmp_path / "latin.yaml": "latin.yaml is not YAML",
    }
    for file, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            read_yaml(file)


def test_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EIGENPRESS_HOME", str(tmp_path / "there"))
    assert RunConfig(model="m", kept=0.5).home == tmp_path / "there"
    assert RunConfig(model="m", kept=0.5, home=tmp_path).home == tmp_path
    monkeypatch.setenv("EIGENPRESS_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home() == tmp_path / ".eigenpress"


@pytest.mark.parametrize("words", [["alpha"], ["=3"], [""]])
def test_an_option_without_a_name_and_a_value_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--option takes NAME=VALUE, got"):
        parse(RunConfig, ["--option", *words])


def test_options_of_file_and_flags_are_merged_for_every_command(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("kept: 0.5\noptions: {alpha: 1.0}\n")
    merged = file_and_flags({"kept": 0.6, "options": {"epsilon": "1e-4"}}, file)
    assert merged == {"kept": 0.6, "options": {"alpha": 1.0, "epsilon": "1e-4"}}


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"method": "svd_llm"}, "svd_llm"),
        ({"method": "svd_llm", "recover": "factors"}, "svd_llm+factors"),
        ({"method": "asvd:alpha=0.3", "recover": "lora"}, "asvd:alpha=0.3+lora"),
        (
            {"method": "asvd:alpha=0.3", "allocate": "hull", "recover": "lora"},
            "asvd@hull:alpha=0.3+lora",
        ),
        ({"method": "asvd:alpha=0.3", "factors": "pivot"}, "asvd:alpha=0.3:factors=pivot"),
        (
            {"method": "svd", "factors": "plain", "metric": "two_sided", "recover": "lora"},
            "svd:factors=plain:metric=two_sided+lora",
        ),
        (
            {"method": "svd_llm@fisher", "bits": 4, "recover": "factors"},
            "svd_llm@fisher:bits=4+factors",
        ),
        (
            {"method": "svd@fisher:metric=inputs:metric_damp=1", "metric": "two_sided"},
            "svd@fisher:metric=inputs:metric_damp=1",
        ),
        (
            {"method": "svd:metric_damp=1", "metric": "two_sided"},
            "svd:metric_damp=1:metric=two_sided",
        ),
        ({"method": "svd_llm", "recover": "blocks"}, "svd_llm+blocks"),
        ({"method": "svd_llm", "recover": "blocks+factors"}, "svd_llm+blocks+factors"),
    ],
)
def test_a_label_tells_rows_of_a_table_apart(given: dict[str, Any], label: str) -> None:
    assert RunConfig(model="m", kept=0.5, **given).label == label


def test_the_seed_of_a_recovery_is_the_runs_unless_it_has_its_own() -> None:
    config = RunConfig(model="m", kept=0.5, seed=7, recover="lora")
    assert config.recovery is not None and config.recovery.seed == 7
    own = config.model_copy(update={"recover_seed": 8})
    assert own.recovery is not None and own.recovery.seed == 8
    assert RunConfig(model="m", kept=0.5).recovery is None
