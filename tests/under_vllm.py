"""Run as a script where vLLM is installed: does it find what plain transformers finds?

    python tests/under_vllm.py COMPRESSED EXPORTED [DEVICES]

It needs nothing of eigenpress. COMPRESSED goes through plain transformers, EXPORTED, which
`eigenpress export --to vllm` made of it, through vLLM, both in float32; printed are the largest
difference of log-probabilities of the prompts' tokens, and how many continuations are the same.
"""

import sys
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The capital of France is", "Water boils at", "In 1492, Columbus", "She opened the door")
NEW_TOKENS = 12

Found = tuple[list[list[float]], list[list[int]]]  # per prompt: log-probabilities, new tokens


def by_transformers(folder: str, prompts: list[list[int]]) -> Found:
    """What plain transformers finds, one prompt at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    chances, continued = [], []
    for tokens in prompts:
        batch = torch.tensor([tokens])
        with torch.no_grad():
            table = model(batch).logits[0, :-1].log_softmax(-1)
        chances.append(table.gather(1, batch[0, 1:, None])[:, 0].tolist())
        written = model.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        continued.append(written[0, len(tokens) :].tolist())
    return chances, continued


def by_vllm(folder: str, prompts: list[list[int]], devices: int) -> Found:
    """What vLLM finds, all prompts at once."""
    import vllm  # type: ignore[import-not-found]

    engine = vllm.LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        tensor_parallel_size=devices,
    )
    asked = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=1)
    answers = engine.generate([{"prompt_token_ids": tokens} for tokens in prompts], asked)
    chances = []
    for tokens, answer in zip(prompts, answers, strict=True):
        tables = answer.prompt_logprobs[1:]
        chances.append([at[token].logprob for token, at in zip(tokens[1:], tables, strict=True)])
    return chances, [list(answer.outputs[0].token_ids) for answer in answers]


def main(compressed: str, exported: str, devices: int) -> None:
    """Print both findings' differences."""
    tokenizer = AutoTokenizer.from_pretrained(compressed, trust_remote_code=True)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    want, continued = by_transformers(compressed, prompts)
    have, written = by_vllm(exported, prompts, devices)
    pairs = list(zip(chain(*want), chain(*have), strict=True))
    largest = max(abs(one - other) for one, other in pairs)
    same = sum(one == other for one, other in zip(continued, written, strict=True))
    print(f"{len(pairs)} log-probabilities differ by at most {largest:.1e}")
    print(f"{same} of {len(prompts)} continuations of {NEW_TOKENS} tokens are the same")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
