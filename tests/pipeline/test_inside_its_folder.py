"""Files of a model are inside its folder; what goes along loads again, or the run says so."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.companions import companion_files, copy_companions, tokenizer_files
from compress_core.hf.loading import check_loads
from compress_core.hf.text import load_tokenizer
from storage.digests import DigestCache
from tasks.engine.dense_model import DenseModel
from tests.code_cache import code_cache_at
from tests.pipeline import pico

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.make_inputs(tmp_path_factory.mktemp("made")).model


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A model's folder, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "pico"))


def link_out(*names: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        for name in names:
            outside = model.parent / f"outside-{name}"
            if (model / name).exists():
                (model / name).rename(outside)
            else:
                outside.write_text("secret")
            (model / name).symlink_to(outside)

    return change


def index_to(place: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        outside = model.parent / "outside.safetensors"
        (model / "model.safetensors").rename(outside)
        where = place.format(folder=model.parent)
        write_index(model, dict.fromkeys(load_file(outside), where))

    return change


def write_index(model: Path, weight_map: Any) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def templates_elsewhere(model: Path) -> None:
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(elsewhere)


def weights_named_outside(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    pico_edit(model / "config.json", transformers_weights="../outside.safetensors")


def pico_edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


OUTSIDE: dict[str, Callable[[Path], None]] = {
    "index with dots": index_to("../outside.safetensors"),
    "index with a path": index_to("{folder}/outside.safetensors"),
    "index through itself": index_to("../pico/../outside.safetensors"),
    "weights in config": weights_named_outside,
    "weights": link_out("model.safetensors"),
    "config": link_out("config.json"),
    "tokenizer": link_out("tokenizer.json"),
    "tokenizer's settings": link_out("tokenizer_config.json"),
    "template": link_out("chat_template.jinja"),
    "templates": templates_elsewhere,
    "licence": link_out("LICENSE"),
    "vocabulary": link_out("spiece.model"),
    "generation": link_out("generation_config.json"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_file_that_leads_out_of_the_folder_is_refused(
    kind: str, model: Path, tmp_path: Path
) -> None:
    OUTSIDE[kind](model)

    with pytest.raises(ModelError, match=r"is outside its model's folder, at .*outside|elsewhere"):
        DenseModel(model, DigestCache(tmp_path / "digests.json"))


def test_links_of_the_hubs_cache_and_within_the_folder_are_followed(
    model: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "tokenizer.model").symlink_to("tokenizer.json")

    found = DenseModel(snapshot, DigestCache(tmp_path / "digests.json"))
    assert found.stored and found.companions_digest
    (snapshot / "LICENSE").symlink_to("../../../models--c--d/blobs/1")
    (tmp_path / "hub" / "models--c--d" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "models--c--d" / "blobs" / "1").write_text("another's")
    with pytest.raises(ModelError, match="outside its model's folder"):
        companion_files(snapshot)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no weight_map from tensors to files"),
        (None, "no weight_map"),
        ([1], "no weight_map"),
        ({"a": None}, "no weight_map"),
        ({"a": ["b"], "c": 3}, "no weight_map"),
        ({"a": "b.safetensors"}, "lacks 1 of its 1 weight files"),
        ({"a": "."}, "lacks 1 of its 1 weight files"),
    ],
)
def test_damaged_indices_are_refused(weight_map: Any, message: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    write_index(model, weight_map)

    with pytest.raises(ModelError, match=message):
        Checkpoint(model)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "\ufeff{", "{]", '"a"'])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_damaged_json_is_refused_in_a_line(
    name: str, text: str, model: Path, tmp_path: Path
) -> None:
    if name == INDEX:
        (model / "model.safetensors").unlink()
    (model / name).write_text(text)

    with pytest.raises(ModelError, match=r"not readable JSON|not an object") as caught:
        DenseModel(model, DigestCache(tmp_path / "digests.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused(whole: bool, model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    if not whole:
        (model / "config.json").unlink()

    verb = "has" if whole else "is"
    with pytest.raises(
        ModelError, match=rf"{verb} an adapter .*merge_and_unload.*model-format\.md"
    ):
        Checkpoint(model)


def bring_code(model: Path) -> None:
    """A tokenizer with code of its own, which imports some more and reads a file of its own."""
    (model / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "from .mine_helper import NAME\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n"
        "    vocab_files_names = {'tokenizer_file': 'tokenizer.json', 'words_file': 'words.dat'}\n"
    )
    (model / "mine_helper.py").write_text("from .mine_names import NAME\n")
    (model / "mine_names.py").write_text("NAME = 'model.safetensors'\n")
    (model / "words.dat").write_text("words")
    entry = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    pico_edit(model / "tokenizer_config.json", auto_map=entry, tokenizer_class="MineTokenizer")


CODE = {"tokenization_mine.py", "mine_helper.py", "mine_names.py", "words.dat"}


@pytest.fixture
def own_code_cache(tmp_path: Path) -> Iterator[None]:
    with code_cache_at(tmp_path / "modules"):
        yield


def test_a_tokenizers_own_code_and_all_it_reads_go_along(
    model: Path, tmp_path: Path, own_code_cache: None
) -> None:
    bring_code(model)
    (model / "tekken.json").write_text("{}")
    (model / "README.md").write_text("not of the tokenizer")
    (tmp_path / "out").mkdir()
    copy_companions(model, tmp_path / "out")

    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert copied >= CODE | {"tekken.json", "tokenizer.json", "tokenizer_config.json"}
    assert not copied & {"README.md", "model.safetensors", "config.json"}
    assert {file.name for file in tokenizer_files(model)} >= CODE
    (model / "mine_names.py").unlink()
    with pytest.raises(ModelError, match="imports what cannot be read"):
        companion_files(model)


def test_code_that_leads_out_of_the_folder_is_refused(model: Path) -> None:
    bring_code(model)
    link_out("mine_helper.py")(model)

    with pytest.raises(ModelError, match=r"mine_helper\.py is outside its model's folder"):
        companion_files(model)


def test_a_folder_loads_again_or_the_run_says_so(
    model: Path, tmp_path: Path, own_code_cache: None
) -> None:
    bring_code(model)
    tokenizer = load_tokenizer(model, trust_remote_code=True)
    check_loads(model, tokenizer, trust_remote_code=True)

    def refusal(change: Callable[[Path], None]) -> str:
        folder = Path(shutil.copytree(model, tmp_path / f"copy{len(list(tmp_path.iterdir()))}"))
        change(folder)
        with pytest.raises(ModelError) as caught:
            check_loads(folder, tokenizer, trust_remote_code=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no tokenizer can be loaded" in refusal(
        lambda folder: (folder / "mine_helper.py").unlink()
    )
    assert "was not copied" in refusal(
        lambda folder: pico_edit(folder / "tokenizer_config.json", auto_map={})
    )
    norm = "model.norm.weight"
    assert "missing keys model.norm.weight" in refusal(lambda f: rename_weight(f, norm, "extra"))
    shorter = refusal(lambda f: pico.change_weight(f, norm, lambda weight: weight[:-1]))
    assert "does not load" in shorter


def rename_weight(model: Path, old: str, new: str) -> None:
    from safetensors.torch import save_file

    file = model / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[new] = tensors.pop(old)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
