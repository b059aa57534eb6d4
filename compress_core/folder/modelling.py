"""The Python file of a compressed folder, with which plain transformers loads it.

It is the text of the parts, the compressed layer and the swap, then two classes named as the stock
ones.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import transformers

from compress_core.errors import ModelError
from compress_core.forms.kinds import KINDS
from compress_core.standalone import without_own_imports

MODELLING_FILE = "modeling_eigenpress.py"

# They need PyTorch and those before them.
_SOURCES = (
    *("sparse.py", "quantise.py", "forms/names.py", "forms/part.py"),
    *("forms/codes.py", "forms/coded.py"),
    *dict.fromkeys(f"forms/{kind.__module__.rpartition('.')[2]}.py" for kind in KINDS),
    *("forms/kinds.py", "forms/linear.py", "folder/swap.py"),
)
# The classes bear the names of the stock ones, and count as such, because transformers chooses by
# name and kind what keys to rename on loading (GPT-NeoX's head), what a pipeline takes, and more.
_FOOTER = '''

import transformers  # noqa: E402
import {base_module}  # noqa: E402


class CompressedModelMixin:
    """What a stock class needs to hold compressed layers."""

    _eigenpress_prefix = ""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        swap_from_config(self, config, self._eigenpress_prefix)
        self.all_tied_weights_keys.update(shared_factors(self))

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        tied = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return tied | shared_factors(self)

    @classmethod
    def from_pretrained(cls, *inputs, output_loading_info=False, **kwargs):
        model, found = super().from_pretrained(*inputs, output_loading_info=True, **kwargs)
        require_parts(model, found["missing_keys"])
        settle_layers(model)
        return (model, found) if output_loading_info else model

    @classmethod
    def is_custom_code(cls):
        return False


class {base_class}(CompressedModelMixin, {base_module}.{base_class}):
    """{base_class} of transformers with compressed layers."""

    _eigenpress_prefix = "{name_prefix}"


class {architecture}(CompressedModelMixin, transformers.{architecture}):
    """{architecture} of transformers with compressed layers."""
'''


def modelling_source(architecture: str, base_class: str, base_prefix: str) -> str:
    """The text of the modelling file: the compressed layer, then the two classes that use it."""
    require_stock_classes(architecture, base_class)
    here = Path(__file__).parents[1]
    layer = "\n\n".join(without_own_imports(here / name) for name in _SOURCES)
    return layer + _FOOTER.format(
        architecture=architecture,
        base_class=base_class,
        base_module=stock_module(base_class, architecture),
        name_prefix=f"{base_prefix}." if base_prefix else "",
    )


def auto_map(architecture: str, base_class: str) -> dict[str, str]:
    """What config.json tells transformers' auto classes about the modelling file."""
    module = MODELLING_FILE.removesuffix(".py")
    return {
        "AutoModel": f"{module}.{base_class}",
        "AutoModelForCausalLM": f"{module}.{architecture}",
    }


def stock_class(mapping: Mapping[str, str], auto_class: str) -> str:
    """The name of transformers' own class behind an entry of `auto_map`.

    Raises:
        ModelError: It is no such class; whatever else stands there must not reach a Python file.
    """
    name = mapping[auto_class].rpartition(".")[2]
    architecture = mapping.get("AutoModelForCausalLM", name).rpartition(".")[2]
    require_stock_classes(architecture, name)
    return name


def require_stock_classes(architecture: str, base_class: str) -> None:
    """Raise ModelError unless transformers itself has both classes."""
    stock_module(architecture, architecture)
    stock_module(base_class, architecture)


def stock_module(name: str, architecture: str) -> str:
    """Where transformers has a class: at its top, or in the file of the architecture.

    Bart's decoder by itself, for one, is a base model that transformers does not show at its top.

    Raises:
        ModelError: transformers has no such class.
    """
    if isinstance(getattr(transformers, name, None), type):
        return "transformers"
    stock = getattr(transformers, architecture, None)
    if isinstance(stock, type) and isinstance(
        getattr(sys.modules[stock.__module__], name, None), type
    ):
        return stock.__module__
    raise ModelError(
        f"transformers {transformers.__version__} has no class {name}: models that bring code "
        "of their own are not supported, and newer ones need a newer transformers"
    )
