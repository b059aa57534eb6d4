"""Dobi-SVD (arXiv 2502.02723): a truncation point per layer, trained through a smooth mask.

From the paper: outputs, not weights, are truncated, A → A V T Vᵀ, T_i = ½ tanh(β(γ − i)) + ½,
with β = 10; the loss is the language model's plus λ |share − target|, λ = 150; the weight becomes
W V_k V_kᵀ with V the principal output directions over all samples, which is SVD-LLM's optimum.

Deviations: V is fixed to those directions from the beginning, where the published code takes a
differentiable SVD of every batch's outputs and needs a guarded backward pass for it; γ starts at
the uniform rank and its learning rate is relative to a layer's width (8 per 4096 here, 5 in the
published settings); the published code's penalty on γ outside its range is a clamp; a layer whose γ
passes the rank that pays is dense; the exact budget is met by one common shift of all γ.

Small models: at β = 10 the mask is so steep that γ feels one component and hardly leaves the
uniform rank. ``beta=1:rate=0.004`` moves it. Perplexity at kept 0.6, 60 windows, seed 3:
stories260K 106.7 at the defaults, 93.8 at β = 1, 87.1 with that rate too; babyllama-1m 5.99, 5.76
and 5.52.

``remap=true`` is the paper's remapping, which is mixed quantisation: its rows are to be compared
only with those of other methods that store 8-bit numbers. All of a layer's shorter factor and as
much of the longer one are stored in 8 bits, the rest in the model's dtype, so that a component of
an (m, n) layer takes max(m, n) numbers of 16 bits in place of m + n, and one for its scale. Every
rank but the last pays, so that ``kept`` near 1 is nearly full rank; two 8-bit numbers count as one
parameter. In a float32 model the files are therefore smaller than the parameters say. Deviations:
the published code has the uneven steps of bitsandbytes' dynamic map and two scales per component;
here steps are even and a component's two scales one.
"""

from compress_core.decompose import ProjectOutputs
from compress_core.forms.names import EIGHT_BITS, PLAIN
from compress_core.learn.dobi import LearnTruncation
from compress_core.method import Method
from compress_core.metric import OutputError


def dobi_svd(
    steps: int = 400,
    batch: int = 4,
    beta: float = 10.0,
    rate: float = 0.002,
    balance: float = 150.0,
    remap: bool = False,
) -> Method:
    """Ranks found by gradient descent on one truncation point per layer.

    Args:
        steps: Of the optimiser.
        batch: Windows in a step.
        beta: Steepness of the truncation, per component; smaller ones see more of the spectrum (1
            with a rate of 0.004 does better on models of about a million parameters).
        rate: Learning rate of γ, as a part of a layer's number of components.
        balance: Weight of the distance from the target share.
        remap: Mixed quantisation: stores factors in 8 bits, so that a component costs max(m, n) + 1
            numbers of 16 bits, not m + n. Such a model cannot be trained on (``--recover``).

    Raises:
        ConfigError: A value is out of range.
    """
    return Method(
        "dobi_svd",
        "a learned truncation point per layer; remap: factors in 8 bits (mixed quantisation)",
        "2502.02723",
        weighting=OutputError(),
        decompose=ProjectOutputs(whole=True),
        learn=LearnTruncation(steps, batch, beta, rate, balance, remap),
        form=EIGHT_BITS if remap else PLAIN,
    )
