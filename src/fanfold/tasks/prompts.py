"""From a row's columns to what the model is asked: a text, or the messages of a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(ValueError):
    """A row that cannot be asked: `error` is its class in quarantine.jsonl."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """`template` over columns, or the value of `column`; with `chat` it is what the user says."""

    column: str = "text"
    template: str | None = None
    chat: bool = False
    system: str | None = None
    requests: bool = False  # OpenAI batch lines: body.messages, body.max_tokens

    @property
    def columns(self) -> tuple[str, ...]:
        """The input's columns that a prompt needs, each once."""
        if self.requests:
            return ("body",)
        if self.template is None:
            return (self.column,)
        return tuple(dict.fromkeys(name for _, name in parse_template(self.template) if name is not None))

    def text(self, row: Mapping[str, Any]) -> str:
        """The prompt as a text. Raises BadRow."""
        if self.template is None:
            return _as_text(self.column, row[self.column])
        return "".join(
            words + ("" if name is None else _as_text(name, row[name])) for words, name in parse_template(self.template)
        )

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a chat: those of the row where it holds some, else one of the user. Raises BadRow."""
        value = row["body"] if self.requests else row[self.columns[0]] if self.template is None else None
        if self.requests:
            value = _object(value).get("messages")
            if value is None:
                raise BadRow("BadRequest", "body has no messages")
        if self.requests or not (self.template is not None or isinstance(value, str)):
            found = checked_messages(value)
        else:
            found = [{"role": "user", "content": self.text(row)}]
        if self.system is not None and found[0]["role"] not in ("system", "developer"):
            found = [{"role": "system", "content": self.system}, *found]
        return found

    def limit(self, row: Mapping[str, Any]) -> int | None:
        """What the row itself says of its longest answer, in tokens. Raises BadRow."""
        if not self.requests:
            return None
        body = _object(row["body"])
        for name in ("max_completion_tokens", "max_tokens"):
            if body.get(name) is not None:
                return checked_limit(body[name], f"body.{name}")
        return None


def checked_limit(value: Any, name: str) -> int:
    """A number of tokens, 1 or more; BadRow for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRow("BadLimit", f"{name} is {value!r:.40}, not a number of tokens from 1 on")
    return value


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with a known role and text; parts of type text are joined. Raises BadRow."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("BadMessages", "the messages are a text that is no JSON") from None
    if not isinstance(value, list) or not value:
        raise BadRow("BadMessages", f"messages are a list of role and content, found {type(value).__name__}")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise BadRow("BadMessages", f"message {number} has the role {role!r:.40}, known are {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise BadRow("BadMessages", f"message {number} holds parts that are no text")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise BadRow("BadMessages", f"message {number} has no text as its content")
        found.append({**message, "content": content})
    return found


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Words and the column that follows them; RequestError for anything but plain names in braces.

    >>> parse_template("Summarise: {text}")
    [('Summarise: ', 'text')]
    """
    found: list[tuple[str, str | None]] = []
    try:
        for words, name, spec, conversion in Formatter().parse(template):
            if name is not None and (not name or spec or conversion):
                raise ValueError(f"{{{name}{'!' if conversion else ''}{conversion or ''}{':' if spec else ''}{spec}}}")
            found.append((words, name))
    except ValueError as error:
        raise RequestError(
            f"--prompt {template[:80]!r}",
            found=f"it cannot be read: {error}",
            allowed="names of columns in braces, {{ and }} for braces themselves",
            do="for example: --prompt 'Summarise: {text}'",
        ) from None
    return found


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow("NullText", f"column {name} is null")
    return json.dumps(value, ensure_ascii=False, default=str)


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise BadRow("BadRequest", f"body is no object but {type(value).__name__}")
    return value
