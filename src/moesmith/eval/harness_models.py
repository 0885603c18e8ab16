"""Who lm-eval asks: a model in memory, or a server with OpenAI's routes; and every response kept on disk.

Classes of lm-eval do the asking. Here is what they are told, what a server must be able to do, and `Kept`,
which goes on where a killed run stopped. lm-eval is optional and imported inside of functions.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesmith.errors import UserError

STOPS = 4  # what OpenAI's chat route takes; lm-eval drops the others
TIMEOUT = 3600  # seconds for one answer of a server: a model that thinks takes minutes

Progress = Callable[[int, int], None]


# ---------------------------------------------------------------- who is asked


def in_memory(model: Any, tokenizer: Any, *, batch_size: int, room: int | None, chat: bool) -> Any:
    """lm-eval's HFLM around a model that is loaded, adapter included.

    Log-probabilities are of the softmax in float32: in bfloat16 choices tie. With a chat template no token is
    added before the text, as the template says it all. Reasoning that a </think> closes is no part of the
    answer.

    Args:
        room: tokens that the model sees.
    """
    from lm_eval.models.huggingface import HFLM

    closing = "</think>"
    thinks = chat and closing in tokenizer.get_vocab() and "think" in (tokenizer.chat_template or "")
    with quiet():
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=room,
            softmax_dtype="float32",
            add_bos_token=False if chat else None,
            think_end_token=closing if thinks else None,
        )


def on_server(
    url: str, model: str, *, tokenizer: Path | None, room: int | None, concurrency: int, chat: bool, seed: int
) -> Any:
    """lm-eval's client of an OpenAI-compatible server.

    Args:
        url: ends in /v1.
        tokenizer: the folder of the model's; needed to score choices, and /v1/completions is asked then.
        chat: ask /v1/chat/completions, which generates only.

    Raises:
        UserError: the server gives no log-probabilities of a prompt, where a tokenizer says they are wanted.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    shared = {
        "model": model, "num_concurrent": concurrency, "max_retries": 3, "seed": seed, "timeout": TIMEOUT,
    }  # fmt: skip
    with quiet():
        if chat:
            return LocalChatCompletion(
                base_url=f"{url}/chat/completions", tokenizer_backend=None, tokenized_requests=False, **shared
            )
        return LocalCompletionsAPI(
            base_url=f"{url}/completions",
            tokenizer_backend="huggingface" if tokenizer else None,
            tokenizer=str(tokenizer) if tokenizer else None,
            tokenized_requests=tokenizer is not None,
            max_length=(room or 1_000_000) + 1,  # lm-eval keeps one of them for itself
            **shared,
        )


def server_url(given: str) -> str:
    """http://host:port, with or without a path, as http://host:port/v1."""
    url = given.rstrip("/")
    for end in ("/chat/completions", "/completions", "/models"):
        url = url.removesuffix(end)
    url = url if "://" in url else f"http://{url}"
    return url if url.endswith("/v1") else f"{url}/v1"


def server_models(url: str) -> list[str]:
    """Names that a server lists. Raises UserError when it does not answer."""
    return [str(one["id"]) for one in _http(f"{url}/models").get("data", []) if "id" in one]


def check_scores_prompts(url: str, model: str, ids: Sequence[int]) -> None:
    """Raise UserError unless the server gives a log-probability for every token of a prompt.

    Some answer such a request without an error, and with the log-probabilities of the new token alone.

    Args:
        ids: a few token ids to ask with.
    """
    asked = {
        "model": model, "prompt": [list(ids)], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True,
    }  # fmt: skip
    refused = f"the server at {url} gives no log-probabilities of a prompt"
    hint = (
        "ask `moesmith serve` or vLLM, load the model here (leave --server out), or take tasks that generate"
    )
    try:
        answer = _http(f"{url}/completions", asked)
        given = answer["choices"][0]["logprobs"]["token_logprobs"]
    except UserError as error:
        raise UserError(f"{refused}: {error.message}", hint) from None
    except (KeyError, IndexError, TypeError):
        raise UserError(refused, hint) from None
    if len(given) not in (len(ids), len(ids) + 1):
        raise UserError(f"{refused}: {len(given)} for {len(ids)} tokens", hint)
    if len(given) == len(ids):
        raise UserError(f"{refused} and of the token after it, which lm-eval counts on", hint)


def _http(url: str, body: Any = None) -> dict[str, Any]:
    """JSON of a server. Raises UserError."""
    data = None if body is None else json.dumps(body).encode()
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
            found = json.load(reply)
    except urllib.error.HTTPError as error:
        text = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        hint = "its key is read from $OPENAI_API_KEY" if error.code in (401, 403) else None
        raise UserError(f"{url} answers {error.code}: {text}", hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url} does not answer: {error}", "is the server running? --server URL") from None
    if not isinstance(found, dict):
        raise UserError(f"{url} answers no JSON object")
    return found


# ---------------------------------------------------------------- what is kept


class Kept:
    """A model of lm-eval whose responses are kept in a file as they come, and not asked for twice.

    lm-eval's own cache does the same in a database; this one is a line per response, which a kill cannot
    break, and knows how far it is. Sampled answers are not kept: each of several has to be drawn.
    """

    def __init__(self, lm: Any, path: Path, progress: Progress):
        self.lm, self.path, self.progress = lm, path, progress
        self.known = {row["key"]: row["value"] for row in read_lines(path)}
        self.found = len(self.known)
        """responses of an interrupted run"""
        self.cut = 0
        """prompts of which the model does not see the beginning"""
        self.done = self.total = 0
        self._aloud = sys.stderr
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" * torn)
        lm.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(log-probability of the continuation, whether it is the greedy one) of each request."""
        return [tuple(value) for value in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """Log-likelihood of each text."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The text that follows each prompt."""
        return self._ask("generate_until", requests)

    def add_partial(self, kind: str, args: Any, value: Any) -> None:
        """lm-eval calls this as soon as it has a response."""
        if kind == "generate_until" and args[1].get("do_sample"):
            self._count()
            return
        self._keep(_key(kind, args), value)

    def _ask(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        sampled = [kind == "generate_until" and bool(one.args[1].get("do_sample")) for one in requests]
        keys = [_key(kind, one.args) for one in requests]
        new: dict[str, Any] = {}
        for key, one, drawn in zip(keys, requests, sampled, strict=True):
            if not drawn and key not in self.known:
                new.setdefault(key, one)
        again = [one for one, drawn in zip(requests, sampled, strict=True) if drawn]
        left = [*new.values(), *again]
        self.done, self.total = len(requests) - len(left), len(requests)
        self._count_cut(kind, left)
        answers = getattr(self.lm, kind)(left, disable_tqdm=True) if left else []
        for key, value in zip(new, answers, strict=False):
            if key not in self.known:
                self._keep(key, value)
        drawn_answers = iter(answers[len(new) :])
        return [
            (next(drawn_answers) or "") if s else self.known[key]
            for key, s in zip(keys, sampled, strict=True)
        ]

    def _keep(self, key: str, value: Any) -> None:
        value = "" if value is None else value  # a server's answer without content
        number = value[0] if isinstance(value, (tuple, list)) else value
        if isinstance(number, float) and math.isnan(number):
            raise UserError(
                "a log-probability is not a number: the model's logits are not finite",
                "--dtype float32, or another --scheme; `moesmith verify` looks for the reason",
            )
        if key not in self.known:
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()
        self.known[key] = value
        self._count()

    def _count(self) -> None:
        self.done += 1
        with contextlib.redirect_stderr(self._aloud):  # lm-eval's own bars go nowhere
            self.progress(min(self.done, self.total), self.total)

    def _count_cut(self, kind: str, requests: Sequence[Any]) -> None:
        room, encode = getattr(self.lm, "max_length", None), getattr(self.lm, "tok_encode", None)
        if room is None or encode is None or getattr(self.lm, "tokenizer", None) is None:
            return
        for one in requests:
            if kind == "generate_until":
                self.cut += len(encode(str(one.args[0]))) > room - int(one.args[1].get("max_gen_toks", 256))
            elif kind == "loglikelihood":
                self.cut += len(encode(one.args[0] + one.args[1])) > room + 1


def _key(kind: str, args: Any) -> str:
    from lm_eval.api.model import hash_args

    return hash_args(kind, args)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file; one that a kill tore is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """No bars and no log lines of lm-eval and its libraries on stderr; yields what it warned of."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.propagate = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield heard
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.removeHandler(listener)
            logger.propagate = old
