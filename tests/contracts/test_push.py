"""`eigenpress push` against a stand-in of the hub: byte for byte, and clear where it cannot be."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from compress_core.errors import ConfigError, ModelError
from compress_core.hf.hub import plan_upload
from flows.commands.push import push_model
from tests.hub import TOKEN, Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and this process logged in to it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a published model."""
    folder = tmp_path / "m"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "additional_chat_templates" / "a.jinja").write_text("{{ x }}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# m\n")
    (folder / "eigenpress.yaml").write_text("home: /home/me\n")
    (folder / "MLmodel").write_text("x")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"1")
    return folder


def test_what_arrives_is_the_folder_and_nothing_of_this_machine(hub: Hub, folder: Path) -> None:
    for _ in range(2):
        result = push_model(str(folder), "me/m", True, False, hub.url, folder.parent / "home")
    sent = ("README.md", "additional_chat_templates/a.jinja", "config.json", "model.safetensors")
    assert hub.files["me/m"] == {name: (folder / name).read_bytes() for name in sent}
    assert hub.private == {"me/m"}
    assert tuple(result["files"]) == sent
    assert result["stays"] == ["eigenpress.yaml", "MLmodel"]
    assert result["url"] == f"{hub.url}/me/m/commit/{'1' * 40}"


def test_weights_of_an_older_upload_go_and_other_files_stay(hub: Hub, folder: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    hub.files["me/m"] = {**old, "notes.txt": b"mine"}
    push_model(str(folder), "me/m", False, False, hub.url, folder.parent / "home")
    assert hub.files["me/m"].keys() & old.keys() == set()
    assert hub.files["me/m"]["notes.txt"] == b"mine"
    assert hub.private == set()


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = push_model(str(folder), "me/m", False, True, hub.url, folder.parent / "home")
    assert result["url"] is None
    assert hub.files == {}


def test_a_wrong_token_is_said_and_never_shown(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "hf_" + "b" * 30
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(ConfigError, match="does not accept the token: `hf auth login`") as raised:
        push_model(str(folder), "me/m", False, False, hub.url, folder.parent / "home")
    assert wrong not in str(raised.value)
    assert hub.refusals
    assert hub.files == {}


def test_without_token_or_network_it_says_so(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=r"cannot upload to me/m on .*: .*is there a network\?"):
        push_model(str(folder), "me/m", False, False, f"http://127.0.0.1:{port}", home)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ConfigError, match="no token for the hub: `hf auth login`, or set HF_TOKEN"):
        push_model(str(folder), "me/m", False, False, hub.url, home)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push_model(str(folder), "me/m", False, False, hub.url, home)
    assert hub.files == {}


def test_what_unpickling_reads_is_not_shared(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"1")
    with pytest.raises(ModelError, match=r"holds pytorch_model.bin, which is read by unpickling"):
        plan_upload(folder, ())
    (folder / "pytorch_model.bin").unlink()
    (tmp_path / "secret").write_text("1")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"vocab\.txt"):
        plan_upload(folder, ())


@pytest.mark.parametrize("to", ["m", "a/b/c", "me/..", "https://hub/me/m", "", "me/m m"])
def test_a_repository_is_an_owner_and_a_name(folder: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="--to is OWNER/REPO"):
        push_model(str(folder), to, False, True, None, folder.parent / "home")


def test_the_card_and_settings_do_not_decide_whether_a_version_is_whole(folder: Path) -> None:
    from tasks.tracking.files import compare_files, files_tag

    recorded = files_tag(folder)["files"]
    assert "README.md" not in json.loads(recorded)
    (folder / "README.md").write_text("another measure")
    compare_files(folder, recorded, "m version 1")
