"""Run as a script where eigenpress cannot be imported: what does plain transformers find?

Reads {"batch", "families": {name: folder}, "resave": {name: target}, "damaged": folder, "newer":
folder} from the file in argv[1]; writes logits as safetensors and facts as JSON beside it.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _error(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _lora_losses(model: Any, batch: torch.Tensor) -> list[float]:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def main(request_file: Path) -> None:
    """Load every folder named in the request and write the findings beside it."""
    assert sys.modules["compress_core"] is None  # what makes every import of it fail
    request = json.loads(request_file.read_text())
    batch = torch.tensor(request["batch"])
    logits: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"guard": {}, "messages": {}, "class": {}, "quantization_config": {}}
    with torch.no_grad():
        for name, folder in request["families"].items():
            messages = _Messages()
            transformers_logging.add_handler(messages)
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            transformers_logging.remove_handler(messages)
            facts["messages"][name] = messages.lines
            facts["class"][name] = [type(model).__module__, type(model).__name__]
            logits[name] = model(batch).logits
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            logits[f"{name}/base"] = base(batch).last_hidden_state
            if name in request["resave"]:
                model.save_pretrained(request["resave"][name])
                config = json.loads(Path(request["resave"][name], "config.json").read_text())
                facts["quantization_config"][name] = config["quantization_config"]
            if "dense" not in name:
                facts["guard"][name] = _error(
                    lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder)
                )
    for case in ("damaged", "newer"):
        facts[case] = _error(
            lambda case=case: AutoModelForCausalLM.from_pretrained(
                request[case], trust_remote_code=True
            )
        )
    trained = AutoModelForCausalLM.from_pretrained(
        request["families"]["llama"], trust_remote_code=True
    )
    facts["lora"] = _lora_losses(trained, batch)
    save_file(logits, request_file.with_name("logits.safetensors"))
    request_file.with_name("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
