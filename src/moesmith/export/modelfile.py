"""An Ollama Modelfile for a GGUF file: which file, the chat template, when to stop, how to sample.

Ollama does not read the template in the GGUF file; it wants one in Go's template language. `Turns.of` finds
what a chat template puts before and after each message by rendering some, and only believes it when the
parts, put together again, are what the template makes of other conversations. A template that is more than
that gets no TEMPLATE line, and the file says so. Tools and reasoning are left out: Ollama parses those with
code of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, str]]

_S, _U, _A, _V = (
    "Quartz lintel.",
    "Ochre fennel?",
    "Umber gasket.",
    "Teal spindle?",
)  # words no template holds
_SYSTEM = {"role": "system", "content": _S}
_FIRST = {"role": "user", "content": _U}
_ANSWER = {"role": "assistant", "content": _A}
_SECOND = {"role": "user", "content": _V}


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around messages, when that is all it does."""

    begin: str
    """before a conversation that has a system message"""
    plain: str
    """before one that has none; some templates bring a system message of their own"""
    system: tuple[str, str] | None
    """around the system message; None: it stands before `joint` in the first user turn, or has no place"""
    joint: str | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    """what asks for an answer; some templates put more there than before an answer that was given"""

    @classmethod
    def of(cls, tokenizer: Any) -> Turns | None:
        """The parts of a tokenizer's chat template; None when it is no matter of parts, or there is none."""
        if not tokenizer.chat_template or "strftime_now" in tokenizer.chat_template:
            return None  # the day of the export would be in it for ever
        try:
            head, rest = _render(tokenizer, [_FIRST, _ANSWER, _SECOND]).split(_U)
            between, rest = rest.split(_A)
            after_answer, end = rest.split(_V)
        except Exception:  # templates raise what they like
            return None
        place = _system_place(tokenizer)
        cuts = [  # where the user's turn ends in `between` and `end`, and the assistant's in `after_answer`
            (user_end, answer_end)
            for user_end in range(len(between) + 1)
            for answer_end in range(len(after_answer) + 1)
            if end.startswith(between[:user_end]) and head.endswith(after_answer[answer_end:])
            and _apart(between, user_end) and _apart(end, user_end) and _apart(after_answer, answer_end)
            and _apart(head, len(head) - len(after_answer) + answer_end)
        ]  # fmt: skip
        # most templates end all turns alike; of the rest, those that end none
        cuts.sort(key=lambda cut: not cut[0] or between[: cut[0]] != after_answer[: cut[1]])
        for user_end, answer_end in cuts:
            before_user = after_answer[answer_end:]
            plain = head[: len(head) - len(before_user)]
            system = _around_system(place, plain, before_user)
            if system is not None:
                found = cls(
                    *system, (before_user, between[:user_end]),
                    (between[user_end:], after_answer[:answer_end]), end[user_end:],
                )  # fmt: skip
                if found.agrees(tokenizer):
                    return found
        return None

    def render(self, messages: Messages) -> str:
        """The conversation as text, with what asks for an answer if the last message is the user's."""
        held = messages[0]["content"] if messages[0]["role"] == "system" else None
        text = self.begin if held is not None else self.plain
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                text += f"{self.system[0]}{content}{self.system[1]}" if self.system else ""
            elif message["role"] == "user":
                inside = f"{held}{self.joint}" if held is not None and self.joint is not None else ""
                held = None
                text += f"{self.user[0]}{inside}{content}{self.user[1]}"
            else:
                text += f"{self.assistant[0]}{content}{self.assistant[1]}"
        return text + (self.opening if messages[-1]["role"] == "user" else "")

    def agrees(self, tokenizer: Any) -> bool:
        """Whether the parts make what the template makes, of conversations that they were not read from."""
        talks: list[Messages] = [
            [_FIRST], [_FIRST, _ANSWER, _SECOND], [_FIRST, _ANSWER, _SECOND, _ANSWER, _FIRST],
        ]  # fmt: skip
        if self.system or self.joint is not None:
            talks += [[_SYSTEM, _FIRST], [_SYSTEM, _SECOND, _ANSWER, _FIRST]]
        try:
            return all(_render(tokenizer, talk) == self.render(talk) for talk in talks)
        except Exception:  # templates raise what they like
            return False

    def go(self) -> str:
        """The same in Go's template language, for Ollama."""
        begin = _go(self.begin) if self.begin == self.plain else (
            f"{{{{ if and .Messages (eq (index .Messages 0).Role \"system\") }}}}{_go(self.begin)}"
            f"{{{{ else }}}}{_go(self.plain)}{{{{ end }}}}"
        )  # fmt: skip
        if self.system:
            system = f"{_go(self.system[0])}{{{{ .Content }}}}{_go(self.system[1])}"
        else:
            system = "{{ $system = .Content }}" if self.joint is not None else ""
        inside = (
            f'{{{{ if $system }}}}{{{{ $system }}}}{_go(self.joint)}{{{{ $system = "" }}}}{{{{ end }}}}'
            if self.joint
            else ""
        )
        user = f"{_go(self.user[0])}{inside}{{{{ .Content }}}}{_go(self.user[1])}"
        answer = f"{_go(self.assistant[0])}{{{{ .Content }}}}"
        closing = _go(self.assistant[1])
        lines = [
            '{{ $system := "" }}' + begin + "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f'{{{{- if eq .Role "system" }}}}{system}',
            f'{{{{- else if eq .Role "user" }}}}{user}',
            f'{{{{- else if eq .Role "assistant" }}}}{answer}{{{{ if not $last }}}}{closing}{{{{ end }}}}',
            "{{- end }}",
            f'{{{{- if and $last (ne .Role "assistant") }}}}{_go(self.opening)}{{{{ end }}}}',
            "{{- end }}",
        ]
        return "\n".join(lines)


_Place = (
    tuple[str, str] | None
)  # what a template writes before and after a system message, up to the user's words


def _system_place(tokenizer: Any) -> _Place:
    """None: the template takes no system message, or leaves it out."""
    try:
        before, rest = _render(tokenizer, [_SYSTEM, _FIRST]).split(_S)
        return before, rest.split(_U)[0]
    except Exception:  # templates raise what they like
        return None


def _around_system(
    place: _Place, plain: str, user: str
) -> tuple[str, str, tuple[str, str] | None, str | None] | None:
    """`begin`, `plain`, `system` and `joint` of Turns, or None; `user` stands before a user's words."""
    if place is None:
        return plain, plain, None, None
    before, after = place
    if after.endswith(user) and user:
        begin = plain if before.startswith(plain) else ""
        return begin, plain, (before[len(begin) :], after[: len(after) - len(user)]), None
    return (plain, plain, None, after) if before == plain + user else None


_TAG = re.compile(r"<[^<>\n]+>|\[/?[A-Z_]+\]")


def _apart(text: str, cut: int) -> bool:
    """Whether a cut leaves tags like <|im_end|> and [INST] whole."""
    return not any(tag.start() < cut < tag.end() for tag in _TAG.finditer(text))


def modelfile(name: str, tokenizer: Any, generation_config: Any = None) -> str:
    """The text of a Modelfile for Ollama.

    Args:
        name: the GGUF file beside it.
        tokenizer: the model's; its chat template becomes TEMPLATE where it is plain turns.
        generation_config: a GenerationConfig or its mapping: its sampling becomes PARAMETER lines.
    """
    config = generation_config if isinstance(generation_config, Mapping) else _mapping(generation_config)
    lines = [f"FROM ./{name}"]
    turns = Turns.of(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    if turns is None:
        why = "this model has no chat template" if not getattr(tokenizer, "chat_template", None) else (
            "the chat template is more than turns; llama-server applies it from the GGUF file"
        )  # fmt: skip
        lines.append(f"# no TEMPLATE: {why}")
    else:
        lines.append(
            "# turns of system, user and assistant; the chat template's tools and reasoning are not in it"
        )
        lines.append(f'TEMPLATE """{turns.go()}"""')
    lines += [
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops(tokenizer, config, turns)
    ]
    if config.get("do_sample"):
        sampling = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        lines += [
            f"PARAMETER {to} {config[key]}" for key, to in sampling.items() if config.get(key) is not None
        ]
    if config.get("repetition_penalty") not in (None, 1, 1.0):
        lines.append(f"PARAMETER repeat_penalty {config['repetition_penalty']}")
    return "\n".join(lines) + "\n"


def stops(tokenizer: Any, config: Mapping[str, Any], turns: Turns | None) -> list[str]:
    """Texts of the tokens that end an answer: the generation config's, the tokenizer's, what ends a turn."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    found = [tokenizer.convert_ids_to_tokens(id) for id in ids]
    found.append(getattr(tokenizer, "eos_token", None))
    if turns is not None:
        tag = _TAG.match(turns.assistant[1])
        found.append(tag[0] if tag else None)
    return list(dict.fromkeys(token for token in found if token))


def _render(tokenizer: Any, messages: Messages) -> str:
    """What the template makes of a conversation, without the token that llama.cpp puts first by itself."""
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
    )
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text


def _go(text: str | None) -> str:
    """A literal in Go's template language: quoted, so that no blank of it is trimmed; "" is nothing."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _mapping(config: Any) -> Mapping[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else {}
