"""The stages, in the order in which a run goes through them: one row each.

The command line's choices, the plan and the table in docs/how-it-works.md are made of these rows.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of a stage's units.

    Attributes:
        of: What such a unit is about.
        makes: What it makes.
        key: What is in its key besides code and inputs.
    """

    of: str
    makes: str
    key: str


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: What people call it.
        kinds: Its units, by kind.
        alone: Whether it needs the memory for itself: no whole model is held beside it.
        line: The line under which people see it, where stages take turns; else its name.
        cached: Whether its results are kept; a side effect is not.
    """

    name: str
    kinds: tuple[Kind, ...]
    alone: bool = False
    line: str = ""
    cached: bool = True


_ROWS = (
    Stage(
        "train",
        (
            Kind(
                "the demonstration's model", "a small Llama and its texts", "its settings, the text"
            ),
        ),
        alone=True,
    ),
    Stage(
        "tokenise",
        (
            Kind(
                "text",
                "windows of tokens",
                "samples, length, seed; content and format of the text, tokenizer",
            ),
        ),
    ),
    Stage(
        "collect",
        (
            Kind(
                "tap (an input that q, k, v or gate, up share)",
                "Σ x xᵀ and Σ \\|x\\|, float64",
                "tokens, weights up to this block, configuration",
            ),
            Kind("block", "mean cosine of its input and output", "the same"),
            Kind(
                "layer, for `fwsvd` only",
                "squared gradients of the loss, per column",
                "tokens, the whole model",
            ),
            Kind(
                "layer, where errors of its outputs are weighed (`fisher`, `prices`, "
                "`gptq:mixed=true`, `two_sided`)",
                "Σ g gᵀ of the gradients at its outputs",
                "tokens, windows, whose labels, the seed of sampled ones, the whole model",
            ),
        ),
        alone=True,
    ),
    Stage(
        "weigh",
        (Kind("tap", "the metric in which error is measured", "the method's weighting"),),
        alone=True,
    ),
    Stage(
        "decompose",
        (
            Kind(
                "layer (or a stack of layers that share a basis)",
                "components, best first, and the loss of every rank; for `cap` sparse entries "
                "beside them; none for methods that prune or keep the whole weight",
                "the weight; its metric, or the weighting and the Gram it is computed from; for "
                "`two_sided` its gradients and their damping",
            ),
        ),
        alone=True,
    ),
    Stage(
        "probe",
        (
            Kind(
                "layer, for `hull` and `knapsack` only",
                "the model's KL with this layer at other shares",
                "tokens, the whole model, decompositions; for `knapsack` kept",
            ),
        ),
    ),
    Stage(
        "predict",
        (
            Kind(
                "layer (or stack), for `fisher`, `prices` and `gptq:mixed=true` only",
                "the KL that every rank is predicted to leave; for `prices` also, for `gptq` only, "
                "what rounding to codes is expected to cost; for `press` also what shares of "
                "single entries, or of columns, are",
                "its gradients, the Gram of its inputs, weight, decomposition, damping; where it "
                "is about codes, the form of products and the group",
            ),
        ),
    ),
    Stage(
        "teacher",
        (
            Kind(
                "text, for trainings only",
                "the dense model's 256 likeliest tokens at every position",
                "tokens, the whole model",
            ),
        ),
    ),
    Stage(
        "learn",
        (
            Kind(
                "layer, for `soco`, `dobi_svd` and `cap` only, in place of `allocate`",
                "which components and entries stay, their scale, a bias; the curves",
                "tokens, teacher, all decompositions, the whole model, kept, the training's "
                "settings and seed",
            ),
        ),
        alone=True,
    ),
    Stage(
        "allocate",
        (
            Kind(
                "model",
                'a rank per layer, or "dense"; bits, where numbers are in codes',
                "kept, shapes, forms, bits and group; what the allocator reads",
            ),
        ),
    ),
    Stage(
        "measure",
        (
            Kind(
                "tap, sequential methods only",
                "Σ x xᵀ behind compressed layers, and Σ x_dense xᵀ",
                "everything compressed so far",
            ),
        ),
        alone=True,
        line="sequential",
    ),
    Stage(
        "realise",
        (
            Kind(
                "layer",
                "what it stores, in the dtype of its file or in codes",
                "decomposition, rank, bits; for methods that fit or round, the weight, how they do "
                "it and what they read",
            ),
        ),
    ),
    Stage(
        "advance",
        (
            Kind(
                "block, sequential methods only",
                "digest of both models' hidden states behind the block, and its relative error",
                "everything compressed so far",
            ),
        ),
        alone=True,
        line="sequential",
    ),
    Stage(
        "materialise",
        (
            Kind(
                "model",
                "a HuggingFace folder",
                "what all layers store, every other weight, configuration, tokenizer",
            ),
        ),
    ),
    Stage(
        "recover",
        (
            Kind(
                "block, with `--recover blocks` only",
                "what its compressed layers store, and its norms, trained to give the dense "
                "block's output; curves",
                "the folder, tokens, the dense model, all earlier blocks, the training's settings "
                "and seed",
            ),
            Kind(
                "model, with `--recover factors` or `lora` only",
                "what compressed layers store, trained on; curves",
                "the folder, tokens, teacher, the training's settings and seed",
            ),
        ),
        alone=True,
    ),
    Stage(
        "evaluate",
        (
            Kind(
                "model and text or task",
                "perplexity, KL, the loss of every window, lm-eval scores; of the dense model what "
                "left its last block, to hold others against",
                "model, tokens or task files",
            ),
        ),
    ),
    Stage(
        "register",
        (Kind("–", "an MLflow run and a registered version", "a side effect, never cached"),),
        cached=False,
    ),
)
STAGES = {stage.name: stage for stage in _ROWS}
REFRESHABLE = tuple(name for name, stage in STAGES.items() if stage.cached and name != "train")
