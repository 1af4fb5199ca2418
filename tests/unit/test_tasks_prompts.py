"""What a row asks: templates, chats, OpenAI batch lines, limits."""

from __future__ import annotations

import pytest

from fanfold.errors import RequestError
from fanfold.tasks.prefixes import shared_prefixes
from fanfold.tasks.prompts import BadRow, Prompting, parse_template

BODY = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 7}


def test_a_template_names_its_columns_once_and_keeps_braces():
    prompting = Prompting(template="{a} and {{b}} {a}: {c d}")
    assert prompting.reading("text") == (("a", "c d"),)
    assert prompting.text({"a": "x{c d}", "c d": 3}) == "x{c d} and {b} x{c d}: 3"


@pytest.mark.parametrize("template", ["{", "{a:>5}", "{a!r}", "{}"])
def test_a_template_holds_names_and_nothing_else(template):
    with pytest.raises(RequestError, match="names of columns in braces"):
        parse_template(template)


def test_a_batch_line_is_a_chat_with_its_own_limit():
    prompting = Prompting(system="Be brief.")
    row = {"custom_id": "one", "body": BODY}
    assert prompting.reading("text") == (("custom_id", "body"), ("text",))
    assert prompting.reading("body") == (("body",),)
    assert prompting.is_chat(row)
    assert prompting.limit(row) == 7
    assert prompting.messages(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_a_column_of_messages_is_a_chat_and_a_text_is_what_the_user_says():
    chat = Prompting(chat=True)
    assert chat.messages({"text": "Hi"}) == [{"role": "user", "content": "Hi"}]
    assert chat.messages({"text": [{"role": "user", "content": "Hi"}]}) == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": None}, "NullText"),
        ({"custom_id": "a", "body": {}}, "BadMessages"),
        ({"custom_id": "a", "body": "no"}, "BadRequest"),
        ({"text": [{"role": "robot", "content": "x"}]}, "BadMessages"),
        ({"text": [{"role": "user", "content": [{"type": "image_url"}]}]}, "BadMessages"),
        ({}, "MissingColumn"),
    ],
)
def test_a_row_that_cannot_be_asked_says_why(row, error):
    with pytest.raises(BadRow) as caught:
        Prompting(chat=True).messages(row)
    assert caught.value.error == error


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", None, True])
def test_a_limit_is_a_number_of_tokens(value):
    with pytest.raises(BadRow, match="not a number of tokens"):
        Prompting(limit_column="n").limit({"text": "x", "n": value})


def test_a_limit_of_another_kind_is_read():
    assert [Prompting(limit_column="n").limit({"text": "", "n": value}) for value in (3, 3.0, "3")] == [3, 3, 3]


def test_beginnings_are_shared_in_levels():
    common, deeper = list(range(40)), list(range(100, 150))
    prompts = [[*common, i, i] for i in range(200, 203)] + [common + deeper + [i] for i in (7, 8)] + [[1, 2]]
    prefixes, longest = shared_prefixes(prompts)
    assert [(prefix.length, prefix.parent) for prefix in prefixes] == [(40, None), (90, 0)]
    assert longest == [0, 0, 0, 1, 1, None]


def test_the_last_token_of_a_prompt_is_never_shared():
    prefixes, longest = shared_prefixes([[5] * 50, [5] * 50])
    assert (prefixes[0].length, longest) == (49, [0, 0])
