"""From a row's columns to what the model is asked: a text, or the messages of a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUEST = ("custom_id", "body")  # what is read of a line of an OpenAI batch file
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(ValueError):
    """A row that cannot be asked: `error` is its class in quarantine.jsonl."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """`template` over columns, or the value of one column; with `chat` it is what the user says.

    A row that holds `custom_id` and `body` is a line of an OpenAI batch file, where neither template nor column says
    otherwise: a chat of body.messages, of at most body.max_tokens new tokens. `limit_column` may say that, too.
    """

    template: str | None = None
    chat: bool = False
    system: str | None = None
    limit_column: str | None = None

    def reading(self, column: str) -> tuple[tuple[str, ...], ...]:
        """The columns to read, as alternatives; `column` is what the user has named."""
        limit = [] if self.limit_column is None else [self.limit_column]
        if self.template is not None:
            return (tuple(dict.fromkeys([*self.names, *limit])),)
        own = tuple(dict.fromkeys([column, *limit]))
        return (REQUEST, own) if column == "text" else (own,)

    @property
    def names(self) -> list[str]:
        """The columns that the template names."""
        return [name for _, name in parse_template(self.template or "") if name is not None]

    def is_chat(self, row: Mapping[str, Any]) -> bool:
        return self.chat or _is_request(row)

    def text(self, row: Mapping[str, Any]) -> str:
        """The prompt as a text. Raises BadRow."""
        if self.template is None:
            return _as_text(*self._own(row))
        parts = []
        for words, name in parse_template(self.template):
            if name is not None and name not in row:
                raise BadRow("MissingColumn", f"no column {name}")
            parts += [words] if name is None else [words, _as_text(name, row[name])]
        return "".join(parts)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a chat: those of the row where it holds some, else one of the user. Raises BadRow."""
        if _is_request(row):
            found = checked_messages(_object(row["body"]).get("messages"))
        elif self.template is None and not isinstance(self._own(row)[1], str | None):
            found = checked_messages(self._own(row)[1])
        else:
            found = [{"role": "user", "content": self.text(row)}]
        if self.system is not None and found[0]["role"] not in ("system", "developer"):
            found = [{"role": "system", "content": self.system}, *found]
        return found

    def limit(self, row: Mapping[str, Any]) -> int | None:
        """What the row itself says of its longest answer, in tokens. Raises BadRow."""
        if _is_request(row):
            body = _object(row["body"])
            for name in ("max_completion_tokens", "max_tokens"):
                if body.get(name) is not None:
                    return _limit(body[name], f"body.{name}")
            return None
        if self.limit_column is None:
            return None
        if self.limit_column not in row:
            raise BadRow("MissingColumn", f"no column {self.limit_column}")
        return _limit(row[self.limit_column], f"column {self.limit_column}")

    def _own(self, row: Mapping[str, Any]) -> tuple[str, Any]:
        """Name and value of the one column that is the prompt: the first that is read."""
        name = next(iter(row), None)
        if name is None or (name == self.limit_column and len(row) == 1):
            raise BadRow("MissingColumn", "the record has not the column that is the prompt")
        return name, row[name]


def _is_request(row: Mapping[str, Any]) -> bool:
    return tuple(row) == REQUEST


def _limit(value: Any, name: str) -> int:
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
        found = "none" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"
        raise BadRow("BadMessages", f"messages are a list of role and content, found {found}")
    messages = []
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
        messages.append({**message, "content": content})
    return messages


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
