"""What docs/models.md says of families is what is found; `make families` tries all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.code_cache import code_cache_at
from tests.every_family import page
from tests.every_family.small import model_types
from tests.every_family.trial import try_family

VERSION, ROWS = page.read()
SAMPLE = [  # accepted: what was refused once; refused and not built: one for each reason
    "falcon",  # a subclass of nn.Linear
    "bamba",  # blocks that return a tuple of two
    "git",  # a tower for images with as many blocks
    "whisper",  # a base model that transformers does not show at its top
    "doge",  # experts that only the configuration counts
    "mixtral",
    "gemma4_text",
    "rwkv",
    "xlm",
    "xlnet",
    "prophetnet",  # a head that does not run apart
    "emu3",
    "musicgen",
]

pytestmark = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"docs/models.md is of transformers {VERSION}"
)


@pytest.fixture(autouse=True)
def own_code_cache(tmp_path: Path) -> Iterator[None]:
    with code_cache_at(tmp_path / "modules"):
        yield


def test_every_model_type_has_a_row_and_none_is_at_fault() -> None:
    assert list(ROWS) == model_types()
    assert {outcome.state for outcome in ROWS.values()} == {"accepted", "refused", "not built"}
    assert all(bool(outcome.why) == (outcome.state != "accepted") for outcome in ROWS.values())


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_family_is_what_the_page_says(model_type: str, tmp_path: Path) -> None:
    assert try_family(model_type, tmp_path) == ROWS[model_type]
