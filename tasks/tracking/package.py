"""A model folder becomes an MLflow model by a few small files beside its weights.

MLflow writes them, into an empty folder; from there they go into the model's.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from compress_core import compute
from compress_core.standalone import without_own_imports
from tasks.tracking.speaking import TrackingError, be_quiet

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

MODEL_FILE = "MLmodel"
CODE_FILE = "pyfunc_eigenpress.py"
PACKAGE_FILES = (
    *(MODEL_FILE, CODE_FILE, "requirements.txt", "conda.yaml", "python_env.yaml"),
    *("input_example.json", "serving_input_example.json"),
)
EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.0}
# What the code file imports, and what transformers needs for weights, tokenizers and templates.
NEEDED = ("mlflow", "torch", "transformers", "safetensors", "tokenizers", "jinja2", "pandas")
OF_SOME_TOKENIZERS = ("sentencepiece", "tiktoken", "protobuf")
WITHOUT = {"MLFLOW_UV_AUTO_DETECT": "false"}  # would take in the project that somebody stands in


def write_package(folder: Path, name: str) -> None:
    """Makes a HuggingFace folder an MLflow model as well; the same folder gives the same bytes.

    Args:
        folder: The model's; nothing in it is read.
        name: What answers call the model.

    Raises:
        TrackingError: MLflow refuses.
        OSError: The folder cannot be written.
    """
    be_quiet()
    with TemporaryDirectory() as made, _environment(WITHOUT):
        code = Path(made) / CODE_FILE
        code.write_text(code_text(), encoding="utf-8")
        target = Path(made) / "model"
        _save(code, target, name)
        for file in PACKAGE_FILES:
            shutil.copyfile(target / file, folder / file)


def code_text() -> str:
    """The text of the code file: whole, so that nothing of ours need be installed beside it."""
    parts = [Path(compute.__file__)]
    parts += [Path(__file__).with_name(f"pyfunc_{name}.py") for name in ("request", "model")]
    return "\n\n".join(without_own_imports(part) for part in parts)


def requirements() -> list[str]:
    """The exact versions that this process has, as pip reads them.

    A local label (torch's "+cpu") is left out: no package index has those.
    """
    found = []
    for name in (*NEEDED, *OF_SOME_TOKENIZERS):
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            if name in NEEDED:
                raise
    return found


def signature() -> "ModelSignature":
    """What a request may hold (a prompt or messages, and of the rest any), and its answer."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import (
        AnyType,
        Array,
        ColSpec,
        Map,
        ParamSchema,
        ParamSpec,
        Schema,
        TensorSpec,
    )

    from tasks.tracking.pyfunc_request import FIELDS, PARAMETERS

    objects = Array(Map(AnyType()))
    asked: list[ColSpec | TensorSpec] = [
        ColSpec(objects if name == "messages" else AnyType(), name, required=False)
        for name in FIELDS
    ]
    answered: list[ColSpec | TensorSpec] = [
        ColSpec("string", name) for name in ("id", "object", "model")
    ]
    answered += [ColSpec("long", "created"), ColSpec(objects, "choices")]
    answered += [ColSpec(Map("long"), "usage")]
    params = ParamSchema([ParamSpec(name, kind, None) for name, kind in PARAMETERS.items()])
    return ModelSignature(Schema(asked), Schema(answered), params)


def _save(code: Path, target: Path, name: str) -> None:
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    from tasks.tracking.pyfunc_model import SETTINGS

    try:
        pyfunc.save_model(
            path=str(target),
            python_model=str(code),
            signature=signature(),
            input_example=EXAMPLE,
            pip_requirements=requirements(),
            model_config=SETTINGS | {"name": name},
        )
        model = Model.load(str(target))
    except MlflowException as error:
        raise TrackingError(f"MLflow cannot package the model: {error}") from error
    _point_at_folder(model)
    model.save(str(target / MODEL_FILE))


def _point_at_folder(model: "Model") -> None:
    """The weights are where MLmodel is; when and by whom it was made is said by the version's run.

    Two runs that make the same model share its folder, so nothing in it may differ between them.
    """
    flavour = model.flavors["python_function"]
    flavour["artifacts"] = {"model": {"path": ".", "uri": "."}}
    flavour["model_code_path"] = CODE_FILE  # MLflow looks beside MLmodel, whatever stands here
    flavour.pop("cloudpickle_version", None)  # nothing is pickled
    model.model_size_bytes = None  # counted without the weights
    for attribute in ("utc_time_created", "model_uuid"):
        delattr(model, attribute)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
