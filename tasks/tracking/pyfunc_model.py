"""A compressed model as MLflow serves it: completion and chat requests to OpenAI's answers.

The text of this file, behind that of what it imports from us, is written into every model folder.
There MLflow loads it, where nothing of ours is installed: it needs what requirements.txt names.
"""

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlflow
import pandas
import torch
import transformers
from mlflow.pyfunc import PythonModel

from compress_core.compute import compute_dtype
from tasks.tracking.pyfunc_request import (
    Request,
    is_given,
    is_list,
    read_number,
    read_texts,
    read_turn,
    wrong,
)

# What `model_config` of mlflow.pyfunc.load_model may set otherwise. "auto" is a GPU where there is
# one, and the dtype that `compute_dtype` names; `max_tokens` is for requests that do not say.
SETTINGS: dict[str, Any] = {"name": "", "device": "auto", "dtype": "auto", "max_tokens": 128}

COLDEST = 0.01  # dividing by less takes small numbers out of range


class ServedModel(PythonModel):
    """The model of the folder that this file lies in."""

    def load_context(self, context: Any) -> None:
        """Loads model and tokenizer, from the folder alone."""
        self.settings = SETTINGS | dict(context.model_config or {})
        # Not "." at its end: transformers names a module after the folder.
        folder = os.path.abspath(context.artifacts["model"])
        device = str(self.settings["device"])
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        # The code that runs is this folder's own, which whoever loads it runs already.
        local: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        with _quiet():
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **local)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=_dtype(folder, str(self.settings["dtype"]), device), **local
            )
        self.model = loaded.to(device).eval()
        self.device = device
        config = self.model.config.get_text_config()
        self.context_length = getattr(config, "max_position_embeddings", None)
        self.ends = self._ends()
        # A request says what is drawn; what the folder has of it would only be warned about.
        for name in ("temperature", "top_p", "top_k", "max_length"):
            setattr(self.model.generation_config, name, None)
        self.model.generation_config.do_sample = False
        self.lock = threading.Lock()

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """The answer to a request; to several, a row each, the list of answers.

        What `params` says is for all requests that do not say it themselves.

        Raises:
            MlflowException: A request is wrong (status 400), before anything is generated.
        """
        if isinstance(model_input, pandas.DataFrame):
            rows = model_input.to_dict(orient="records")
        else:
            rows = [model_input] if isinstance(model_input, dict) else list(model_input)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise wrong("a request has either a prompt or messages")
        requests = [self._read(_fields(params or {}) | _fields(row)) for row in rows]
        answers = [self._answer(request) for request in requests]
        return answers[0] if len(answers) == 1 else answers

    def _ends(self) -> list[int]:
        stated = self.model.generation_config.eos_token_id
        ends = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*ends, *([] if own is None else [own])]))

    def _read(self, row: dict[str, Any]) -> Request:
        if ("prompt" in row) == ("messages" in row):
            raise wrong("a request has either a prompt or messages")
        if read_number(row, "n", 1, least=1, whole=True) != 1 or row.get("stream"):
            raise wrong("one answer at a time (n = 1) and no stream is what this model gives")
        chat = "messages" in row
        prompts = [self._chat(row["messages"])] if chat else self._prompts(row["prompt"])
        temperature = read_number(row, "temperature", 0.0, least=0.0, most=100.0)
        if 0 < temperature < COLDEST:
            raise wrong(f"temperature is 0, or {COLDEST} and more, got {temperature:g}")
        top_p = read_number(row, "top_p", 1.0, least=0.0, most=1.0)
        if top_p == 0:
            raise wrong("top_p is above 0 and at most 1, got 0")
        seed = read_number(row, "seed", -1, least=0, most=2**63 - 1, whole=True)
        return Request(
            prompts=prompts,
            chat=chat,
            max_tokens=self._room(row, max(ids.shape[1] for ids in prompts)),
            temperature=temperature,
            top_p=top_p,
            stop=read_texts(row.get("stop", ()), "stop"),
            seed=None if seed < 0 else int(seed),
            model=str(row.get("model") or self.settings["name"]),
        )

    def _prompts(self, prompt: Any) -> list[torch.Tensor]:
        texts = read_texts(prompt, "prompt")
        if not texts:
            raise wrong("prompt is an empty list")
        return [self._tokens(text) for text in texts]

    def _chat(self, messages: Any) -> torch.Tensor:
        if not is_list(messages) or len(messages) == 0:
            raise wrong("messages is a list of one message or more")
        turns = [read_turn(one) for one in messages]
        if not self.tokenizer.chat_template:
            raise wrong("this model has no chat template: send a prompt in place of messages")
        try:
            text = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template raises what it likes
            raise wrong(f"the chat template refuses these messages: {error}") from error
        return self._tokens(text, add_special_tokens=False)

    def _tokens(self, text: str, **options: Any) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt", **options).input_ids
        if ids.shape[1] == 0:
            raise wrong(f"the prompt {text!r} has no tokens")
        return ids.to(self.device)

    def _room(self, row: dict[str, Any], used: int) -> int:
        """How many tokens are written, within the model's context."""
        names = ("max_tokens", "max_new_tokens", "max_completion_tokens")
        said = [name for name in names if name in row]
        if len(said) > 1:
            raise wrong(f"{said[0]} and {said[1]} say the same: send one of them")
        room = math.inf if self.context_length is None else self.context_length - used
        if room < 1:
            raise wrong(
                f"the prompt has {used} tokens, as many as the model's context of "
                f"{self.context_length} or more: send a shorter one"
            )
        if not said:
            return int(min(self.settings["max_tokens"], room))
        wanted = int(read_number(row, said[0], 1, least=1, whole=True))
        if wanted > room:
            raise wrong(
                f"{said[0]} is {wanted}, and beside the prompt's {used} tokens the model's context "
                f"of {self.context_length} has room for {room}"
            )
        return wanted

    def _answer(self, request: Request) -> dict[str, Any]:
        written = [self._write(ids, request) for ids in request.prompts]
        choices = [
            {"index": index, **_said(text, request.chat), "finish_reason": reason, "logprobs": None}
            for index, (text, reason, _) in enumerate(written)
        ]
        asked = sum(ids.shape[1] for ids in request.prompts)
        count = sum(tokens for _, _, tokens in written)
        return {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": count,
                "total_tokens": asked + count,
            },
        }

    def _write(self, ids: torch.Tensor, request: Request) -> tuple[str, str, int]:
        """Text, why it ends, and number of tokens."""
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "top_k": 0, "top_p": request.top_p}
            sampling["temperature"] = request.temperature
        stops = _Stops(self, ids, request.stop)
        # One at a time: requests arrive in threads, which share the random numbers and the memory.
        with self.lock, torch.inference_mode(), _seeded(request.seed):
            out: Any = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                eos_token_id=self.ends or None,
                pad_token_id=self.ends[0] if self.ends else 0,
                stopping_criteria=transformers.StoppingCriteriaList([stops]),
                **sampling,
            )
        tokens = out[:, ids.shape[1] :]
        text = self.text(ids, out)
        cut = min((place for stop in request.stop if (place := text.find(stop)) >= 0), default=None)
        ended = cut is not None or int(tokens[0, -1]) in self.ends
        return text[:cut], "stop" if ended else "length", tokens.shape[1]

    def text(self, before: torch.Tensor, whole: torch.Tensor) -> str:
        """What `whole` says after `before`: alone, tokens of some models lose a space."""
        start, end = (
            self.tokenizer.decode(
                ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for ids in (before, whole)
        )
        if end.startswith(start):
            return str(end[len(start) :])
        new = whole[0, before.shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


class _Stops(transformers.StoppingCriteria):
    """Ends an answer as soon as one of the texts is in it."""

    def __init__(self, model: ServedModel, before: torch.Tensor, texts: Sequence[str]) -> None:
        self.model, self.before, self.texts = model, before, texts

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        found = bool(self.texts) and self._found(input_ids)
        return torch.full((input_ids.shape[0],), found, device=input_ids.device, dtype=torch.bool)

    def _found(self, ids: torch.Tensor) -> bool:
        text = self.model.text(self.before, ids)
        return any(stop in text for stop in self.texts)


def _dtype(folder: str, choice: str, device: str) -> str:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return compute_dtype(choice, str(stored), device)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items() if is_given(value)}


def _said(text: str, chat: bool) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if chat else {"text": text}


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Loads without bars, and without advice to remove what the folder's own code reads."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


mlflow.models.set_model(ServedModel())
