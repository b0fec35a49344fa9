"""The text encoder against the golden bundle, and what it does with prompts and files that are not as they should."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import relative_error
from fuzzing import ANYTHING, as_json, changed, damaged, one_line
from hypothesis import given
from hypothesis import strategies as st
from random_model import flat_config
from safetensors.torch import load_file, save_file

from echo_rt.config import ModelConfig, TextEncoderConfig
from echo_rt.engine.prompts import PromptEncoder, check_prompt_embeds, load_prompt_embeds, save_prompt_embeds
from echo_rt.errors import OutputError, PromptError, StreamError, WeightsError
from echo_rt.model.text import LONGEST_PROMPT, TextEncoder, _load_tokenizer, clean_prompt
from echo_rt.utils.device import capturing
from echo_rt.weights.folder import ModelFolder
from echo_rt.weights.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    path = tmp_path_factory.mktemp("text") / "tiny"
    write_tiny_model(path, width=32, height=32)
    return ModelFolder.open(path)


def make_encoder(folder: ModelFolder, tokenizer: Path | None = None, **options: object) -> TextEncoder:
    return TextEncoder(
        folder.text_encoder.config(),
        folder.text_encoder.tensors(),
        tokenizer or folder.tokenizer_path(),
        text_len=64,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def encoder(folder: ModelFolder) -> Iterator[TextEncoder]:
    with closing(make_encoder(folder)) as made:
        yield made


class Golden:
    def __init__(self, path: Path) -> None:
        self.config = TextEncoderConfig.from_flat(json.loads((path / "config.json").read_text()))
        self.weights = load_file(path / "weights.safetensors")
        inputs = load_file(path / "inputs.safetensors")
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.expected = load_file(path / "expected.safetensors")["prompt_embeds"]

    def encoder(self, dtype: torch.dtype, stored: torch.dtype | None = None) -> TextEncoder:
        weights = {name: tensor.to(stored or tensor.dtype) for name, tensor in self.weights.items()}
        return TextEncoder(self.config, weights, None, text_len=self.ids.shape[1], dtype=dtype)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "text_encoder")


# ---------------------------------------------------------------- the encoder


@pytest.mark.parametrize(
    ("dtype", "stored", "bound"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),
        # The bundle's values are bfloat16 ones, so narrowing loses nothing; the arithmetic must not either.
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float16, torch.float32, 1e-3),
    ],
)
def test_golden(golden: Golden, dtype: torch.dtype, stored: torch.dtype, bound: float) -> None:
    actual = golden.encoder(dtype, stored).encode_ids(golden.ids, golden.mask)
    assert actual.dtype == torch.float32
    assert relative_error(actual, golden.expected) < bound
    assert not actual[golden.mask == 0].any()


def test_padding_does_not_matter(golden: Golden) -> None:
    """A prompt without padding comes out as the first rows of the padded one."""
    encoder = golden.encoder(torch.float32)
    for row in range(len(golden.ids)):
        length = int(golden.mask[row].sum())
        ids = golden.ids[row : row + 1, :length]
        assert relative_error(encoder.encode_ids(ids, torch.ones_like(ids))[0], golden.expected[row, :length]) < 1e-5


@pytest.mark.parametrize(
    ("stored", "dtype", "kept"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_weights_are_narrowed_never_widened(
    golden: Golden, stored: torch.dtype, dtype: torch.dtype, kept: torch.dtype
) -> None:
    encoder = golden.encoder(dtype, stored)
    sizes = {weight.dtype for name, weight in encoder._model.named_parameters() if "final_layer_norm" not in name}
    assert sizes == {kept}


def test_ids_out_of_range(golden: Golden) -> None:
    encoder = golden.encoder(torch.bfloat16)
    for ids in (torch.tensor([[golden.config.vocab_size]]), torch.tensor([[-1]])):
        with pytest.raises(PromptError, match=r"0\.\.299"):
            encoder.encode_ids(ids, torch.ones_like(ids))
    with pytest.raises(PromptError, match="one shape"):
        encoder.encode_ids(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a  fox\n\tin\u00a0the   snow ", "a fox in the snow"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a &lt;b&gt;", "a <b>"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("nul \x00 and \x1b[31mred", "nul and red"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("雪の中の狐 🦊", "雪の中の狐 🦊"),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t\u00a0", "&nbsp;", "\x00\x07"])
def test_empty_prompt(encoder: TextEncoder, prompt: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        encoder.encode(prompt)


@pytest.mark.parametrize("prompt", [None, 7, b"a fox", ["a fox"]])
def test_prompt_that_is_no_string(encoder: TextEncoder, prompt: object) -> None:
    with pytest.raises(PromptError, match="must be a string"):
        encoder.encode(prompt)  # type: ignore[arg-type]


def test_encode(encoder: TextEncoder) -> None:
    ids = encoder.tokenize("a red fox")
    embeds = encoder.encode("a red fox")
    assert len(ids) == 4 and ids[-1] == 1
    assert embeds.shape == (4, 32) and embeds.dtype == torch.float32 and embeds.isfinite().all()
    assert torch.equal(encoder.encode("  a  red\nfox"), embeds)
    assert relative_error(encoder.encode("a red dog"), embeds) > 0.1
    padded = torch.tensor([[*ids, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert relative_error(encoder.encode_ids(padded, mask)[0, :4], embeds) < 1e-5


def test_long_prompt_is_cut_and_says_so(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="has 10001 tokens, the model takes 64"):
        ids = encoder.tokenize("fox " * 10_000)
    assert len(ids) == 64 and ids[-1] == 1
    with pytest.warns(UserWarning, match="tokens") as caught:
        assert encoder.encode("fox " * 10_000).shape == (64, 32)
    assert caught[0].filename == __file__, "the caller's line"


def test_prompt_of_no_sane_length_is_refused_at_once(encoder: TextEncoder) -> None:
    assert clean_prompt("x" * LONGEST_PROMPT) == "x" * LONGEST_PROMPT
    with pytest.raises(PromptError, match="at most 100000 characters, got 10000000"):
        encoder.encode("x" * 10_000_000)


@pytest.mark.parametrize("prompt", ["", "\x00", "x" * (LONGEST_PROMPT + 1), None, 7])
def test_a_wrong_prompt_is_refused_before_the_encoder_is_read(prompt: object) -> None:
    class NoFolder:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was read")

    config = ModelConfig.from_flat(flat_config()).transformer
    prompts = PromptEncoder(NoFolder(), config, torch.device("cpu"), keep=True)  # type: ignore[arg-type]
    with pytest.raises(PromptError):
        prompts.encode(["a fox", prompt])  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_weights_stay_float32_where_the_model_is(
    folder: ModelFolder, tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        name: tensor.float() + 1e-4 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in folder.text_encoder.tensors().items()
    }
    save_file(stored, tmp_path / "umt5_xxl.safetensors")
    given = ModelFolder.open(folder.path, text_encoder=tmp_path / "umt5_xxl.safetensors")
    prompts = PromptEncoder(given, folder.transformer.config(), torch.device("cpu"), keep=False, dtype=dtype)
    kept = dtype if dtype == torch.float32 else torch.bfloat16
    made = TextEncoder(given.text_encoder.config(), stored, folder.tokenizer_path(), text_len=64, dtype=kept)
    with closing(made) as expected:
        assert torch.equal(prompts.encode(["a red fox"])[0], expected.encode("a red fox"))


def test_prompt_that_just_fits_gives_no_warning(encoder: TextEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.encode("fox " * 63).shape == (64, 32)


def test_closed(folder: ModelFolder) -> None:
    with closing(make_encoder(folder)) as encoder:
        encoder.encode("a fox")
    encoder.close()
    with pytest.raises(StreamError):
        encoder.encode("a fox")
    with pytest.raises(StreamError, match="closed"):
        encoder.encode_ids(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))


def test_memory_is_given_back_only_where_nobody_captures(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be capturing a graph while a prompt is encoded, and emptying torch's cache would spoil it."""
    emptied: list[bool] = []

    def empty_cache() -> None:
        free = capturing.acquire(blocking=False)
        emptied.append(free)
        if free:
            capturing.release()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which takes longer than we wait
    encoder = make_encoder(folder)
    encoder.device = torch.device("cuda")
    closer = threading.Thread(target=encoder.close, daemon=True)
    with capturing:
        closer.start()
        closer.join(0.5)
        assert not emptied
    closer.join(20)
    assert emptied == [True]


def test_import_is_light() -> None:
    """transformers takes seconds to import; only an encoder that is made should pay for it."""
    code = "import sys, echo_rt.model.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_folder_is_missing(folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none-such: expected a readable folder"):
        make_encoder(folder, tmp_path / "none-such")


@pytest.mark.parametrize("content", [None, "", "{", '{"model": {}}'])
def test_tokenizer_is_damaged(folder: ModelFolder, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(WeightsError, match="expected a tokenizer, found one that the library fails with") as caught:
        make_encoder(folder, tmp_path)
    assert "\n" not in str(caught.value)


def copy_tokenizer(folder: ModelFolder, to: Path, change: dict[str, object]) -> None:
    tokenizer = json.loads((folder.tokenizer_path() / "tokenizer.json").read_text())
    (to / "tokenizer.json").write_text(json.dumps(tokenizer | change))
    (to / "tokenizer_config.json").write_text((folder.tokenizer_path() / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic when it is loaded
        {  # and one when it is used
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
    ids=["normalizer", "post_processor"],
)
def test_a_panic_of_the_tokenizers_library_is_one_line(
    folder: ModelFolder, tmp_path: Path, change: dict[str, object]
) -> None:
    """It is a BaseException, which nothing would catch on its way to a traceback."""
    copy_tokenizer(folder, tmp_path, change)
    with pytest.raises(WeightsError, match="expected a tokenizer, found one that the library fails with") as caught:
        make_encoder(folder, tmp_path)
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_whatever_the_tokenizers_files_say(
    folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    to = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(folder, to, {})
    path = to / data.draw(st.sampled_from(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]))
    whole = json.loads(path.read_text())
    if "model" in whole:  # one small enough that there is something else to change
        whole["model"] = {
            "type": "WordLevel",
            "vocab": {"<pad>": 0, "</s>": 1, "a": 2, "<unk>": 3},
            "unk_token": "<unk>",
        }
    path.write_bytes(as_json(data.draw(changed(whole) | ANYTHING)))
    try:
        assert _load_tokenizer(to, 1024)("a fox").input_ids
    except WeightsError as error:
        one_line(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "spiece.model", "added_tokens.json"])
def test_a_pipe_among_the_tokenizers_files_is_not_waited_for(folder: ModelFolder, tmp_path: Path, name: str) -> None:
    copy_tokenizer(folder, tmp_path, {})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / name).symlink_to(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="expected a file of the tokenizer, found a pipe or a device"):
        make_encoder(folder, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "pipe").unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match=f"{name}: expected a file of the tokenizer, found a pipe or a device"):
        make_encoder(folder, tmp_path)


def test_tokenizer_without_end_token(folder: ModelFolder, tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path, {"post_processor": None})
    with pytest.raises(WeightsError, match="appends an end token"):
        make_encoder(folder, tmp_path)


def test_tokenizer_with_more_tokens_than_the_table(folder: ModelFolder, tmp_path: Path) -> None:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": t, **special} for i, t in ((0, "<pad>"), (1, "</s>"))]
    added += [{"id": 800 + i, "content": f"<extra_{i}>", **special} for i in range(300)]
    copy_tokenizer(folder, tmp_path, {"added_tokens": added})
    with pytest.raises(WeightsError, match=r"1100 tokens, the text encoder's table only 1024"):
        make_encoder(folder, tmp_path)


# ---------------------------------------------------------------- embeddings in files


@pytest.mark.parametrize("prompt", ["a fox & a 🦊", None])
def test_embeds_round_trip(tmp_path: Path, prompt: str | None) -> None:
    path = tmp_path / "embeds.safetensors"
    embeds = torch.randn(5, 32).to(torch.bfloat16)
    save_prompt_embeds(path, torch.zeros(1, 32), "the one before")
    save_prompt_embeds(path, embeds, prompt)
    loaded, name = load_prompt_embeds(path)
    assert torch.equal(loaded, embeds) and loaded.dtype == embeds.dtype and name == prompt
    assert [entry.name for entry in tmp_path.iterdir()] == ["embeds.safetensors"]


@given(data=st.data())
def test_whatever_is_in_a_file_of_embeddings(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("embeds") / "embeds.safetensors"
    save_prompt_embeds(path, torch.ones(2, 3), "a fox")
    path.write_bytes(data.draw(damaged(path.read_bytes()) | st.binary(max_size=100)))
    try:
        loaded, prompt = load_prompt_embeds(path)
        assert loaded.ndim == 2 and loaded.is_floating_point() and isinstance(prompt, str | None)
    except PromptError as error:
        one_line(error)


BAD_EMBEDS = [
    (torch.zeros(32), "length"),
    (torch.zeros(1, 5, 32), "length"),
    (torch.zeros(0, 32), "length"),
    (torch.zeros(5, 32, dtype=torch.long), "floating point"),
    (torch.full((5, 32), torch.nan), "NaN"),
    (torch.full((5, 32), torch.inf), "NaN or infinity"),
]


def test_a_word_that_the_model_does_not_know_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    folder = SimpleNamespace(rollout_defaults=lambda: {"words": ["a", "ball"]})
    config = ModelConfig.from_flat(flat_config()).transformer
    prompts = PromptEncoder(folder, config, torch.device("cpu"), keep=False)  # type: ignore[arg-type]
    for prompt in ("a fox, a fox and a ball", "a fox and a lake"):
        prompts._note_unknown(prompt)
    assert [one.getMessage().partition(";")[0] for one in caplog.records] == [
        "the model does not know fox, and",
        "the model does not know lake",
    ]


@pytest.mark.parametrize(("embeds", "words"), BAD_EMBEDS)
def test_bad_embeds(tmp_path: Path, embeds: torch.Tensor, words: str) -> None:
    path = tmp_path / "embeds.safetensors"
    with pytest.raises(PromptError, match=words):
        save_prompt_embeds(path, embeds)
    assert not path.exists()
    save_file({"prompt_embeds": embeds}, path)
    with pytest.raises(PromptError, match=rf"embeds\.safetensors: .*{words}"):
        load_prompt_embeds(path)
    with pytest.raises(PromptError, match=words):
        check_prompt_embeds(embeds, 32, 64)


def test_embeds_that_do_not_fit_the_model() -> None:
    check_prompt_embeds(torch.zeros(64, 32), 32, 64)
    with pytest.raises(PromptError, match="32 wide, the model takes 33"):
        check_prompt_embeds(torch.zeros(5, 32), 33, 64)
    with pytest.raises(PromptError, match="65 tokens, the model takes at most 64"):
        check_prompt_embeds(torch.zeros(65, 32), 32, 64)
    with pytest.raises(PromptError, match="must be a tensor, got list"):
        check_prompt_embeds([[0.0]], 32, 64)  # type: ignore[arg-type]


def test_without_a_folder_there_are_embeddings_alone() -> None:
    config = ModelConfig.from_flat(flat_config()).transformer
    prompts = PromptEncoder(None, config, torch.device("cpu"), keep=False)
    embeds = torch.ones(5, config.text_dim)
    assert torch.equal(prompts.resolve(None, embeds).embeds, embeds)
    with pytest.raises(PromptError, match="expected embeddings: this model has no folder with a text encoder"):
        prompts.resolve("a fox", None)


def test_damaged_embeds_file(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    with pytest.raises(PromptError, match=r"embeds\.safetensors: cannot read"):
        load_prompt_embeds(path)
    save_prompt_embeds(path, torch.zeros(5, 32))
    whole = path.read_bytes()
    for content in (b"", b"not a tensor", whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(
            PromptError, match=r"embeds\.safetensors: cannot read .*: expected (a safetensors file|weights), found"
        ):
            load_prompt_embeds(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PromptError, match="expected a file, found a pipe"):
        load_prompt_embeds(path)
    path.unlink()
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(PromptError, match="expected a tensor 'prompt_embeds', found latents"):
        load_prompt_embeds(path)
    with pytest.raises(PromptError, match="cannot read"):
        load_prompt_embeds(tmp_path)


def test_embeds_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        save_prompt_embeds(tmp_path / "none" / "embeds.safetensors", torch.zeros(5, 32))
