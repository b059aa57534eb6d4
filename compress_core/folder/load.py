"""Let transformers load a compressed folder as the stock class, without code from the folder.

Importing `compress_core.hf` registers this with transformers under the name in config.json; from
then on `from_pretrained` puts CompressedLinear layers into the model before it reads the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress_core.folder.modelling import MODELLING_FILE, modelling_source, stock_class
from compress_core.folder.swap import (
    FORMAT_VERSION,
    check_version,
    plain_entries,
    require_parts,
    settle_layers,
    shared_factors,
    swap_layers,
)
from compress_core.forms.kinds import is_fixed
from compress_core.forms.linear import is_compressed
from compress_core.hf.binding import bind
from compress_core.hf.checkpoint import QUANT_METHOD, tensor_headers


class EigenpressConfig(QuantizationConfigMixin):
    """The compressed layers of a checkpoint, as its config.json lists them.

    Attributes:
        modules: Layer name -> entry, in which every kind of part finds its own.
        format_version: Version of the checkpoint format.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        """Hold the list of layers.

        Raises:
            ValueError: The format is newer than this code, or has settings this code does not know.
        """
        check_version(format_version)
        if unknown:
            raise ValueError(f"unknown entries in quantization_config: {', '.join(unknown)}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = plain_entries(modules)


class EigenpressQuantizer(HfQuantizer):
    """Puts compressed layers where the checkpoint has them; compressing happens elsewhere."""

    requires_calibration = True  # only compressed checkpoints are loaded, none is compressed here
    quantization_config: EigenpressConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        settings = self.quantization_config
        swap_layers(model, settings.modules, _name_prefix(model), settings.format_version)
        if checkpoint_files:
            require_parts(model, _missing_keys(model, checkpoint_files))
        if shared := shared_factors(model):
            model.all_tied_weights_keys.update(shared)
            # transformers' own ties nothing where the embeddings are not tied.
            model.get_expanded_tied_weights_keys = partial(_tied_weights_keys, model)  # type: ignore[method-assign]
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        settle_layers(model)
        # The stock class saves no modelling file, yet the config it saves points to one.
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[method-assign]
        return model

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # A string is what save_pretrained leaves in the config that it comes from.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for key in shared_factors(model):
            model.all_tied_weights_keys.pop(key, None)
        for name, module in list(model.named_modules()):
            if is_compressed(module):
                model.set_submodule(name, _dense_layer(module, wanted or module.weight.dtype))
        for name in ("save_pretrained", "get_expanded_tied_weights_keys"):
            model.__dict__.pop(name, None)
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the Trainer may train adapters on top: yes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may train what is stored: yes, unless some of it is codes."""
        return not any(map(is_fixed, self.quantization_config.modules.values()))

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile works: yes."""
        return True


def register() -> None:
    """Make transformers know the format; a second call, or a second import, changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(EigenpressConfig)
        register_quantizer(QUANT_METHOD)(EigenpressQuantizer)


def _name_prefix(model: PreTrainedModel) -> str:
    """What the listed names carry in front of this model's own: only a base model's differ."""
    prefix = model.base_model_prefix
    return "" if not prefix or hasattr(model, prefix) else f"{prefix}."


def _missing_keys(model: PreTrainedModel, files: Sequence[str]) -> Iterator[str]:
    stored = {key for file in files for key in tensor_headers(Path(file))}
    yield from bind(model, stored).missing


def _tied_weights_keys(self: PreTrainedModel, all_submodels: bool = False) -> dict[str, str]:
    tied = type(self).get_expanded_tied_weights_keys(self, all_submodels=all_submodels)
    return tied | shared_factors(self)


def _save_pretrained(
    self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:
    names = getattr(self.config, "auto_map", None) or {}
    if kwargs.get("is_main_process", True) and "AutoModelForCausalLM" in names:
        architecture, base = (
            stock_class(names, "AutoModelForCausalLM"),
            stock_class(names, "AutoModel"),
        )
        source = modelling_source(
            architecture, base, getattr(transformers, architecture).base_model_prefix
        )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODELLING_FILE).write_text(source, encoding="utf-8")
    type(self).save_pretrained(self, save_directory, *args, **kwargs)


def _dense_layer(module: Any, dtype: torch.dtype) -> nn.Module:
    weight = module.dense_weight().detach().to(dtype)
    with torch.device("meta"):
        if module.transposed:
            dense: nn.Module = Conv1D(module.out_features, module.in_features)
        else:
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
    dense.weight = nn.Parameter(weight.T.contiguous() if module.transposed else weight)
    dense.bias = module.bias
    return dense.train(module.training)
