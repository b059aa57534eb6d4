"""The settings that a run and a sweep have in common: type, range, place in help, who reads it.

A new setting is one field here (or in ``config``, of one kind of command alone), and nothing else.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, FiniteFloat

from compress_core.compute import Compute
from compress_core.forms.names import FactorForm
from compress_core.metric_names import MetricName
from flows.settings.belonging import (
    BUDGET,
    EVALUATION,
    MACHINE,
    METHOD,
    OUTPUT,
    TEXT,
    TRAINING,
    Belongs,
)
from flows.settings.home import default_home, default_store
from tasks.engine.stages import REFRESHABLE

Recover = Literal["lora", "factors", "blocks", "blocks+factors"]
BLOCKS = "blocks"  # the step of it that trains block by block
Runner = Literal["here", "processes", "dask", "ray"]
HERE: Runner = "here"  # this process, that is
EXTRAS = {"dask": "prefect_dask", "ray": "prefect_ray"}
"""Runners of libraries that have clusters: what they need, by the extra of that name."""
Option = bool | int | float | str
if TYPE_CHECKING:
    Stage = str
else:  # the table of stages says which there are
    Stage = Literal[REFRESHABLE]


MOST_SEED = 2**63 - 1  # that torch takes
MOST_BYTES = 2**63 - 1  # that a file may have
MOST = 10**9  # of anything that is counted; what memory holds is less and asked elsewhere


class Fields(BaseModel):
    """What people may set."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: Annotated[str, Belongs(TEXT, word="DIR|ID")] = Field(
        description="model folder or hub id"
    )
    of: Annotated[Literal["compressible", "model"], Belongs(BUDGET, "kept")] = Field(
        "compressible", description="what kept is measured on"
    )
    allocate: Annotated[str | None, Belongs(METHOD, word="NAME")] = Field(
        None,
        description="how the budget is divided, see `eigenpress methods`; else as the method's "
        "paper does",
    )
    options: Annotated[dict[str, Option], Belongs(METHOD, word="NAME=VALUE")] = Field(
        default_factory=dict, description="option of the method, or of --allocate"
    )
    rank_multiple: Annotated[int, Belongs(METHOD)] = Field(
        1, ge=1, le=MOST, description="what every rank is a multiple of: 8 or 64 for fast kernels"
    )
    factors: Annotated[FactorForm | None, Belongs(METHOD)] = Field(
        None,
        description="how a product of low rank is stored: two plain factors, the pivot form "
        "(fewer numbers, so more rank), or auto, the smaller of both; else as "
        "`eigenpress methods` says of the method",
    )
    metric: Annotated[MetricName | None, Belongs(METHOD)] = Field(
        None,
        description="what weighs errors: the layers' inputs, or two_sided, by what errors of their "
        "outputs cost, too; else as `eigenpress methods` says",
    )
    bits: Annotated[int | None, Belongs(METHOD)] = Field(
        None,
        ge=2,
        le=16,
        description="of every number that is stored: 16, or 8, 6, 5, 4, 3 or 2 for codes with a "
        "scale per group; kept then counts the room that they take; else as `eigenpress methods` "
        "says",
    )
    recover: Annotated[Recover | None, Belongs(TRAINING)] = Field(
        None,
        description="how to train what is stored on, towards the dense model: the whole at once "
        "(factors, or lora: updates of low rank), block by block, or blocks and then factors",
    )
    recover_steps: Annotated[int, Belongs(TRAINING, "recover")] = Field(
        400, ge=1, le=MOST, description="steps of that training; of blocks, of each"
    )
    recover_text: Annotated[float, Belongs(TRAINING, "recovered text")] = Field(
        0.2, ge=0, le=1, description="weight of the text itself in its loss, beside the dense model"
    )
    recover_held_back: Annotated[float, Belongs(TRAINING, "recover")] = Field(
        0.125, gt=0, le=0.5, description="share of calibration windows it only watches"
    )
    recover_seed: Annotated[int | None, Belongs(TRAINING, "recover")] = Field(
        None, ge=0, le=MOST_SEED, description="its seed; else --seed"
    )
    learn_seed: Annotated[int | None, Belongs(TRAINING, "learning")] = Field(
        None, ge=0, le=MOST_SEED, description="seed of a method's own training; else --seed"
    )
    calibration: Annotated[str | None, Belongs(TEXT, "calibrating", word="FILE|ID")] = Field(
        None, description="text to calibrate on: file or dataset id"
    )
    calibration_field: Annotated[str | None, Belongs(TEXT, "calibration", word="NAME")] = Field(
        None, description="column that holds the text"
    )
    samples: Annotated[int, Belongs(TEXT, "sampling")] = Field(
        256, ge=1, le=MOST, description="calibration windows"
    )
    length: Annotated[int, Belongs(TEXT, "windows")] = Field(
        2048, ge=8, le=MOST, description="tokens per window, clipped to the model's context"
    )
    seed: Annotated[int, Belongs(TEXT)] = Field(
        3, ge=0, le=MOST_SEED, description="seed of every random choice"
    )
    bos: Annotated[bool, Belongs(TEXT, "sampling")] = Field(
        False, description="begin calibration windows with the tokenizer's bos"
    )
    products: Annotated[Literal["float64", "float32"], Belongs(METHOD, "moments")] = Field(
        "float64", description="dtype of one batch's statistics; sums are always float64"
    )
    eval_text: Annotated[list[str], Belongs(EVALUATION, word="FILE|ID")] = Field(
        default_factory=list,
        description="text to evaluate on; else a tenth of --calibration is held back",
    )
    eval_field: Annotated[str | None, Belongs(EVALUATION, "eval_text", word="NAME")] = Field(
        None, description="column that holds evaluation text"
    )
    skip_bad_rows: Annotated[FiniteFloat, Belongs(TEXT, "a text", word="N|SHARE")] = Field(
        0,
        ge=0,
        le=MOST,
        description="bad rows of a text to leave out at most: a count, or a share below 1",
    )
    eval_windows: Annotated[int, Belongs(EVALUATION, "texts")] = Field(
        64, ge=0, le=MOST, description="evaluation windows per text; 0 is all"
    )
    tasks: Annotated[list[str], Belongs(EVALUATION, word="NAME|FILE")] = Field(
        default_factory=list, description="lm-eval task: its name, or the path of its YAML"
    )
    task_path: Annotated[Path | None, Belongs(EVALUATION, "tasks", word="DIR")] = Field(
        None, description="folder of local lm-eval task files"
    )
    task_limit: Annotated[int | None, Belongs(EVALUATION, "tasks")] = Field(
        None, ge=1, le=MOST, description="documents per task"
    )
    num_fewshot: Annotated[int | None, Belongs(EVALUATION, "tasks")] = Field(
        None,
        ge=0,
        le=MOST,
        description="examples before each question of a task; else what it says",
    )
    apply_chat_template: Annotated[bool, Belongs(EVALUATION, "tasks")] = Field(
        False, description="put the prompts of tasks through the chat template"
    )
    compute: Annotated[Compute, Belongs(MACHINE)] = Field(
        "auto",
        description="dtype the model runs in; auto is its own where the device multiplies it "
        "natively, else float32",
    )
    device: Annotated[str, Belongs(MACHINE, word="NAME")] = Field(
        "auto", description="auto, cpu, cuda, cuda:1, ..."
    )
    batch_size: Annotated[Literal["auto"] | int, Belongs(MACHINE, word="auto|N")] = Field(
        "auto", description="windows per forward; auto is what free memory allows"
    )
    memory: Annotated[ByteSize | None, Belongs(MACHINE, word="SIZE")] = Field(
        None,
        ge=1,
        le=MOST_BYTES,
        description="memory of the device that may be taken in all, like 12GB: what does not fit "
        "goes in smaller batches, by way of the disk, or is refused; else what is free",
    )
    runner: Annotated[Runner, Belongs(MACHINE)] = Field(
        HERE,
        description="who computes: this process, or several at once: of this machine, of Dask or "
        "of Ray",
    )
    workers: Annotated[int | None, Belongs(MACHINE, "other processes")] = Field(
        None, ge=1, le=1000, description="how many processes; else one per core, or per GPU"
    )
    cluster: Annotated[str | None, Belongs(MACHINE, "a cluster", word="ADDRESS")] = Field(
        None,
        description="address of Dask's scheduler or Ray's head, where one runs already",
    )
    home: Annotated[Path, Belongs(MACHINE, word="DIR")] = Field(
        default_factory=default_home,
        description="data directory; else EIGENPRESS_HOME or ~/.eigenpress",
    )
    store: Annotated[str | None, Belongs(MACHINE, word="s3://BUCKET/PREFIX")] = Field(
        default_factory=default_store,
        description="bucket that artifacts are shared in, with the data directory's store in front "
        "of it; else EIGENPRESS_STORE, or none",
    )
    name: Annotated[str | None, Belongs(OUTPUT, word="NAME")] = Field(
        None, description="name in the model registry"
    )
    refresh: Annotated[list[Stage], Belongs(MACHINE, word="STAGE")] = Field(
        default_factory=list, description="stage to compute again even when cached"
    )
    link: Annotated[bool, Belongs(OUTPUT)] = Field(
        False,
        description="weight files of the model folder are hard links into the store, read-only, "
        "in place of copies",
    )
    trust_remote_code: Annotated[bool, Belongs(TEXT)] = Field(
        False, description="let the model folder's own Python run"
    )
