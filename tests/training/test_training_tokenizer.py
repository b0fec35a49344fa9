"""The tokenizer that the small models have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echo_rt.weights.folder import DEMO_FOLDER, TOKENIZER_FOLDER


def test_it_is_the_one_of_the_shipped_model(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from training.tokenizer import write_tokenizer

    write_tokenizer(tmp_path, vocab_size=1024, text_len=24)
    shipped = DEMO_FOLDER / TOKENIZER_FOLDER
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made, kept = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, shipped))
        assert made == kept
