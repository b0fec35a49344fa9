"""The prompt script: times, order, mistakes."""

from __future__ import annotations

import pytest
from fuzzing import ANYTHING, as_json, one_line
from hypothesis import example, given
from hypothesis import strategies as st

from echo_rt.cli import generate, soak
from echo_rt.cli.main import _parse
from echo_rt.cli.request import Request, TimedPrompt, parse_script, parse_untimed
from echo_rt.cli.stdio import describe
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
        (["a", "16:9 film of a lake"], [], "if that is meant, write '16: 9 film of a lake', or '0:16:9 film"),
        (["a", "12:30:45 on a clock"], [], "expected SECONDS:TEXT"),
        (["16:9 film"], [], "expected SECONDS:TEXT"),
        (["a", "b"], [], "two prompts begin at 0 s: 'a' and 'b'"),
        (["a", "3:b", "3.0:c"], [], "two prompts begin at 3 s"),
        (["a"], ["f.safetensors"], '; give one another time, such as --prompt-embeds "10:f.safetensors"'),
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


NUMBERS = st.floats().map(str) | st.integers().map(str) | st.sampled_from(["1e999", "٣", "1_0", "0x1", "9" * 400, "⅓"])
WORDS = st.text(max_size=20) | NUMBERS | ANYTHING.map(lambda value: as_json(value).decode())
TIMED = WORDS | st.builds("{}:{}".format, NUMBERS, WORDS)
SETTINGS = st.builds("{}={}".format, st.sampled_from(["local_frames", "denoising_steps", "memory_reads", "x"]), WORDS)
VALUES = WORDS | TIMED | SETTINGS | st.builds("{}x{}".format, NUMBERS, NUMBERS)


def options(command):
    """Some of a command's options, each with any value."""
    names = st.sampled_from(sorted(name for group in command.OPTIONS.values() for one in group for name in one.opts))
    return st.lists(st.tuples(names, VALUES) | names.map(lambda name: (name,)), max_size=4).map(
        lambda pairs: sum(pairs, ())
    )


@given(texts=st.lists(TIMED, max_size=3), given=options(generate))
@example(texts=["a"], given=("--set", "denoising_steps=" + "[" * 3000))
@example(texts=["0", "0\n0"], given=())
@example(texts=["a"], given=("--checkpoint", "\0"))
def test_any_arguments_of_generate(texts, given):
    words = [word for text in texts for word in ("--prompt", text)]
    refused_or(lambda: Request(_parse(["generate", "-o", "no-such-folder/v.mp4", *words, *given])[1]))


@given(given=options(soak))
@example(given=("--attention", "--attention", "--help"))
def test_any_arguments_of_soak(given):
    refused_or(lambda: soak.parse_config(_parse(["soak", "--out", "no-such-folder/x", "--blocks", "9", *given])[1]))


def refused_or(parse):
    try:
        parse()
    except SystemExit as done:  # the page of help was asked for
        assert done.code == 0
    except Exception as error:
        line, code = describe(error)
        one_line(line)
        assert code == 2 and not line.startswith("unexpected"), line
