"""A file that is written as its tensors come is the one that safetensors writes of them all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder import spool
from compress_core.folder.replace import write_replaced
from compress_core.folder.shards import ShardWriter
from compress_core.folder.spool import Spool
from compress_core.hf.checkpoint import DTYPES


def tensors() -> dict[str, Tensor]:
    """Of every dtype, in no order; one of a larger tensor's columns, one empty, one of no axis."""
    found = {
        f"{name}.{kind}": torch.arange(-3, 4).abs().to(dtype)
        for name in "ba"
        for kind, dtype in DTYPES.items()
    }
    wide = torch.randn(5, 9)
    return found | {"é": wide[:, 2:5], "none": wide[:0], "one": wide[0, 0], "turned": wide.T}


@pytest.mark.parametrize("piece", [1 << 24, 5])
def test_it_is_the_same_file(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PIECE", piece)
    made = tensors()
    writer = Spool(tmp_path / "model.safetensors")
    for key, tensor in made.items():
        writer.add(key, tensor)
    writer.close()
    contiguous = {key: tensor.contiguous() for key, tensor in made.items()}
    save_file(contiguous, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("model", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {ours.name, theirs.name}


def test_tensors_that_take_the_place_of_others_lie_where_those_lay(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    writer = ShardWriter(old, 40)
    for key, tensor in tensors().items():
        writer.add(key, tensor)
    files = writer.close()
    assert len(files) > 3
    (old / "config.json").write_text("{}")
    for file in files:
        (old / file).chmod(0o444)  # as a linked one is
    changed = {"b.F32": torch.full((7,), 0.5), "a.I8": torch.full((7,), 3, dtype=torch.int8)}
    write_replaced(old, new, changed, changed.__getitem__)
    assert {file.name for file in new.iterdir()} == {file.name for file in old.iterdir()}
    for file in files:
        before, after = load_file(old / file), load_file(new / file)
        assert before.keys() == after.keys()
        for key, tensor in after.items():
            assert torch.equal(tensor, changed.get(key, before[key]))
    with pytest.raises(ModelError, match="no tensor c to replace"):
        write_replaced(old, tmp_path / "other", ["c"], changed.__getitem__)
    with pytest.raises(ModelError, match="cannot take its place"):
        write_replaced(old, tmp_path / "other", ["b.F32"], lambda _: torch.zeros(7).double())
    assert not (tmp_path / "other").exists()
