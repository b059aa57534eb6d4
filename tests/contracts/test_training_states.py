"""States of a training in the store: what comes back is what was kept, whatever a learner keeps."""

import torch

from storage.store import Store
from tasks.stages.checkpoints import STATE, StoredCheckpoints

KEY = "ab" * 32
STATES = {
    "state.mask": torch.tensor([[True, False], [False, True]]),
    "state.weight": torch.randn(3, 4, dtype=torch.bfloat16).T,
    "optimizer.0.step": torch.tensor(7.0),
    "curve.loss": torch.tensor([1.0, torch.nan], dtype=torch.float64),
    "state.drawn": torch.empty(0, 2, dtype=torch.int64),
}


def test_every_tensor_comes_back_with_its_bits_dtype_and_shape(store: Store) -> None:
    StoredCheckpoints(store, KEY).save(3, STATES)
    found = StoredCheckpoints(store, KEY).load()
    assert found is not None and found.keys() == STATES.keys()
    for name, tensor in STATES.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].nan_to_num(-1), tensor.nan_to_num(-1))


def test_the_latest_alone_is_kept_and_none_when_it_is_done(store: Store) -> None:
    states = StoredCheckpoints(store, KEY)
    assert states.load() is None
    for step in (1, 2, 3):
        states.save(step, {"step": torch.tensor(step)})
    assert [manifest.unit for manifest in store.manifests("scratch")] == ["training at step 3"]
    again = StoredCheckpoints(store, KEY)
    assert again.load() == {"step": torch.tensor(3)}
    again.save(4, {"step": torch.tensor(4)})
    assert StoredCheckpoints(store, KEY).load() == {"step": torch.tensor(4)}
    assert StoredCheckpoints(store, "cd" * 32).load() is None
    again.clear()
    assert list(store.manifests("scratch")) == []


def test_a_damaged_state_is_reported_and_not_gone_on_from(
    store: Store, problems: list[str]
) -> None:
    StoredCheckpoints(store, KEY).save(3, STATES)
    (manifest,) = store.manifests("scratch")
    file = store.open(manifest.key, "scratch").file(STATE)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert StoredCheckpoints(store, KEY).load() is None
    assert len(problems) == 1 and "training at step 3" in problems[0]
