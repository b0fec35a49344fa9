"""The prompt script: times, order, mistakes."""

from __future__ import annotations

import pytest

from echo_rt.cli.request import TimedPrompt, parse_script, parse_untimed
from echo_rt.errors import PromptError


def test_times_order_and_files():
    script = parse_script(["10:a lake", "a fox", "2.5: the den", "12: 16:9 film"], ["7:3.safetensors"])
    assert script == [
        TimedPrompt(0.0, text="a fox"),
        TimedPrompt(2.5, text="the den"),
        TimedPrompt(7.0, file="3.safetensors"),
        TimedPrompt(10.0, text="a lake"),
        TimedPrompt(12.0, text="16:9 film"),
    ]


@pytest.mark.parametrize(
    ("argument", "seconds", "text"),
    [
        ("0:a clock", 0.0, "a clock"),
        ("0:10:30 on a clock", 0.0, "10:30 on a clock"),
        ("a fox: the film", 0.0, "a fox: the film"),
        ("3 foxes", 0.0, "3 foxes"),
        ("00.0 :x", 0.0, "x"),
        ("two\nlines", 0.0, "two\nlines"),
        ("nan:x", 0.0, "nan:x"),
    ],
)
def test_what_is_a_time(argument, seconds, text):
    assert parse_script([argument], []) == [TimedPrompt(seconds, text=text)]


@pytest.mark.parametrize(
    ("texts", "files", "message"),
    [
        ([], [], "at least one --prompt"),
        ([""], [], "expected a prompt, got nothing"),
        (["   \n"], [], "expected a prompt, got nothing"),
        (["a", "5:"], [], "expected a prompt, got nothing"),
        ([], ["0:"], "expected a file, got nothing"),
        (["-1:a"], [], "at 0 seconds or later, got -1"),
        (["a", "9" * 400 + ":b"], [], "not a number of seconds"),
        (["5:a"], [], "the first begins at 5 s"),
        (["a", "16:9 film of a lake"], [], "can be either; a blank after the colon makes it a text at 16 s.*0:16:9"),
        (["a", "12:30:45 on a clock"], [], "can be either"),
        (["16:9 film"], [], "can be either"),
        (["a", "b"], [], "two prompts begin at 0 s: 'a' and 'b'"),
        (["a", "3:b", "3.0:c"], [], "two prompts begin at 3 s"),
        (["a"], ["f.safetensors"], "two prompts begin at 0 s: 'a' and 'embeddings f.safetensors'"),
    ],
)
def test_mistakes(texts, files, message):
    with pytest.raises(PromptError, match=message):
        parse_script(texts, files)


@pytest.mark.parametrize(
    "argument", ["a fox", "0:a clock", "0:10:30 on a clock", " 3 foxes ", "a fox: the film", "nan:x", "two\nlines"]
)
def test_a_text_without_a_time_is_the_same_text_everywhere(argument):
    assert parse_untimed([argument]) == (parse_script([argument], [])[0].text,)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("10:a lake", "--prompt '10:a lake': .*--switch-every"),
        (".5:a lake", 'is written "0:16:9'),
        ("-1:a", "at 0 seconds or later"),
        (" ", "expected a prompt, got nothing"),
        ("0:", "expected a prompt, got nothing"),
    ],
)
def test_a_time_where_none_is_taken(argument, message):
    with pytest.raises(PromptError, match=message):
        parse_untimed(["a fox", argument])


def test_a_long_prompt_is_named_briefly():
    with pytest.raises(PromptError) as error:
        parse_script(["a " * 10_000, "b"], [])
    assert len(str(error.value)) < 200
