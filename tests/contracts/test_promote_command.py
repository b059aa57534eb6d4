"""`promote`, `rollback`, `history` on made-up versions: what they print, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import pico
from tests.pipeline.racing import NAME, register_versions

Call = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def registered(blank_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions, each with a perplexity that is a bit better; nothing is promoted."""
    home = tmp_path_factory.mktemp("registered") / "home"
    shutil.copytree(blank_home, home)
    with pico.environment(pico.clean_environment()):
        register_versions(home)
    return home


@pytest.fixture
def home(registered: Path, tmp_path: Path) -> Path:
    target = tmp_path / "home"
    shutil.copytree(registered, target)
    return target


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    file = tmp_path / "gates.yaml"
    file.write_text("perplexity: {max: 10, worse_than_champion: 0}\n")
    return file


def aliases(home: Path) -> dict[str, int]:
    from tasks.tracking.versions import read_aliases

    with pico.environment(pico.clean_environment()):
        return read_aliases(home, NAME)


def change(home: Path, work: Callable[[Any], None]) -> None:
    """What somebody does to the registry by other means."""
    from tasks.tracking.speaking import speaking

    with pico.environment(pico.clean_environment()), speaking(home, "to change") as client:
        work(client)


def test_up_and_back_with_a_table_and_a_history(home: Path, gates: Path, call: Call) -> None:
    words = ("--home", home, "--gates", gates)
    code, out, err = call("promote", NAME, "--version", 1, *words, "--why", "the first")
    assert (code, err) == (0, "")
    assert "no champion yet" in out and "not comparable" not in out
    assert "champion moved to version 1 (move 1)" in out
    assert max(map(len, out.splitlines())) <= 80
    # these versions do not say what they were measured on
    code, out, err = call("promote", NAME, "--version", 2, *words)
    assert code == 1
    assert err == f"eigenpress: {NAME} version 2: 1 of 2 gates failed; nothing was moved\n"
    text = " ".join(out.split())
    assert "does not say what it was measured on; --measure measures" in text
    assert "FAILED" in text
    assert aliases(home) == {"champion": 1}
    gates.write_text("perplexity: {max: 10}\n")
    code, out, _ = call("promote", NAME, "--version", 3, "--to", "challenger", *words, "--json")
    assert (code, json.loads(out)["moved"]) == (0, True)
    code, out, _ = call("promote", NAME, "--version", "challenger", *words, "--dry-run")
    assert (code, aliases(home)) == (0, {"champion": 1, "challenger": 3})
    assert "champion would move from version 1 to version 3" in out
    call("promote", NAME, "--version", "challenger", *words)
    assert aliases(home) == {"champion": 3, "previous": 1}
    code, out, _ = call("promote", NAME, *words)
    assert (code, "champion is version 3 already" in out) == (0, True)
    code, out, _ = call("rollback", NAME, "--home", home, "--why", "loops")
    assert (code, out) == (0, f"{NAME}: champion moved from version 3 to version 1 (move 4)\n")
    assert aliases(home) == {"champion": 1}
    code, out, err = call("history", NAME, "--home", home)
    assert (code, err) == (0, "")
    assert "move 4       loops" in out and max(map(len, out.splitlines())) <= 80
    moves = json.loads(call("history", NAME, "--home", home, "--json")[1])
    assert [(m["kind"], m["alias"], m["ending"]) for m in moves] == [
        ("promote", "champion", "done"),
        ("promote", "challenger", "done"),
        ("promote", "champion", "done"),
        ("rollback", "champion", "done"),
    ]
    assert moves[0]["why"] == "the first"
    assert [gate["passed"] for gate in moves[0]["gates"]] == [True, True]
    assert all("@" in move["who"] and move["when"].startswith("20") for move in moves)


def test_what_gates_came_to_is_logged_kept_or_not(
    registered: Path, home: Path, gates: Path, call: Call
) -> None:
    from tasks.tracking.versions import find_version

    gates.write_text("perplexity: {max: 9.985}\n")
    for number in (2, 3):
        call("promote", NAME, "--version", number, "--home", home, "--gates", gates)
    with pico.environment(pico.clean_environment()):
        found = [find_version(home, f"{NAME}/{number}") for number in (2, 3)]
    tags = [json.loads(version.tags["gates"]) for version in found]
    assert [(tag["passed"], tag["failed"]) for tag in tags] == [(False, ["perplexity"]), (True, [])]
    for version in found:
        # a copied home logs where the first one did
        folder = registered / "mlartifacts" / version.run_id / "artifacts" / "gates"
        file = max(folder.iterdir())
        assert json.loads(file.read_text())["gates"][0]["limit"] == 9.985


def test_a_promotion_that_was_cut_short_is_put_right_but_not_by_a_dry_run(
    home: Path, gates: Path, call: Call
) -> None:
    gates.write_text("perplexity: {max: 10}\n")
    words = ("promote", NAME, "--home", home, "--gates", gates)
    call(*words, "--version", 1)
    call(*words, "--version", 2)
    moves = json.loads(call("history", NAME, "--home", home, "--json")[1])
    ending = f"eigenpress.moved.000002.{moves[1]['token']}"

    def undo(client: Any) -> None:  # as if it had been killed behind the alias
        client.delete_registered_model_tag(NAME, ending)
        client.delete_registered_model_alias(NAME, "previous")

    change(home, undo)
    code, out, err = call(*words, "--dry-run")
    assert (code, aliases(home)) == (0, {"champion": 2})
    assert "promote 2 was cut short, or goes on" in err
    assert "cut short, or going on" in call("history", NAME, "--home", home)[1]
    code, out, err = call(*words, "--version", 2)
    assert (code, aliases(home)) == (0, {"champion": 2, "previous": 1})
    assert "had moved its alias: the rest is done now" in err
    assert "champion is version 2 already" in out


REFUSED = {
    "a name with a slash": (["promote", "a/b"], "'a/b' is no name of a registered model"),
    "a name with a version": (["rollback", "m@champion"], "the version goes into --version"),
    "no such model": (["promote", "nobody"], f"'nobody'; there are {NAME}"),
    "no such version": (["promote", NAME, "--version", "9"], "has no version 9; it has 3, 2, 1"),
    "no such alias": (["promote", NAME, "--version", "lastest"], "Did you mean 'latest'?"),
    "best of what nobody has": (["promote", NAME, "--version", "best:bytes"], "has a bytes that"),
    "best of nothing": (["promote", NAME, "--version", "best:beauty"], "no metric 'beauty'"),
    "an alias that goes along": (["promote", NAME, "--to", "previous"], "is not moved alone"),
    "an alias like a version": (["promote", NAME, "--to", "v3"], "--to 'v3' is no alias"),
    "no gates": (["promote", NAME, "--gates", "none.yaml"], "cannot read --gates"),
    "unknown metric": (["promote", NAME, "--gates", "odd.yaml"], "no metric 'beauty'"),
    "no dense metric": (["promote", NAME, "--gates", "dense.yaml"], "of the dense model"),
    "nothing to go back to": (["rollback", NAME], "has nothing to roll back to"),
    "no history": (["history", "nobody"], "'nobody'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_moves_nothing(
    case: str, registered: Path, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "odd.yaml").write_text("beauty: {min: 1}\n")
    (tmp_path / "dense.yaml").write_text("perplexity: {worse_than_dense: 2%}\n")
    words, said = REFUSED[case]
    assert said in refuse(*words, "--home", registered)
    assert aliases(registered) == {}


def test_files_that_are_not_as_registered_move_nothing(
    home: Path, gates: Path, refuse: Refuse, call: Call
) -> None:
    from tasks.tracking.files import files_tag

    folder = home / "models" / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def register(client: Any) -> None:
        run = client.search_runs([client.get_experiment_by_name("eigenpress").experiment_id])[0]
        client.create_model_version(NAME, folder.as_uri(), run.info.run_id, tags=files_tag(folder))

    change(home, register)
    words = ["promote", NAME, "--version", 4, "--home", home, "--gates", gates]
    (folder / "config.json").write_text("{ }")
    assert "config.json" in refuse(*words)
    (folder / "config.json").write_text("{}")
    (folder / "extra.py").write_text("")
    assert "extra.py" in refuse(*words)
    shutil.rmtree(folder)
    assert "gone" in refuse(*words)
    assert aliases(home) == {}


def test_a_long_record_is_read_back_whole_or_not_at_all(home: Path) -> None:
    from tasks.promotion.moves import RECORD, read_history
    from tasks.tracking.registered_model import RegisteredModel

    gates = [{"metric": f"tasks/t{n}/acc", "rule": "min 0.5", "passed": True} for n in range(200)]
    move = {"number": 1, "token": "t", "kind": "promote", "alias": "champion", "gates": gates}
    move |= {"before": {"champion": None}, "after": {"champion": 1}, "who": "me", "when": "now"}
    name = f"{RECORD}000001.t"
    with pico.environment(pico.clean_environment()):
        model = RegisteredModel(home, NAME)
        model.set_tag(name, json.dumps(move))
        (one,) = read_history(model.tags())
        assert list(one.move.gates) == gates
        model.delete_tag(f"{name}.parts")  # as if it had been killed before the last part
        assert read_history(model.tags()) == []
