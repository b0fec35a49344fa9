"""The tokenizer of the small models: a byte-level BPE, trained on the words that prompts are made of."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_PAD, _END = "<pad>", "</s>"  # ids 0 and 1, as in umT5
# Whole tokens for what prompts are made of; anything else is spelled in pieces, if need be byte by byte.
_WORDS = """
a an and the of in on at with into over under through from to by as is are one two three many few it its
red orange yellow green blue violet purple pink white black grey golden silver bright dark pale deep vivid soft warm
cold small large huge tiny tall wide long old young wild calm slow fast gentle heavy light empty quiet busy
fox dog cat bird horse wolf bear deer fish whale owl eagle butterfly dragon man woman child girl boy people crowd
forest river lake sea ocean wave waves beach sand desert mountain mountains valley field meadow grass flower flowers
tree trees leaf leaves garden snow rain storm cloud clouds fog mist wind sky sun moon star stars night day morning
evening sunset sunrise winter spring summer autumn fire smoke water ice stone city street road bridge house window
door tower castle train car boat ship plane market neon lantern candle glass mirror paper silk painting
runs running walks walking swims swimming flies flying jumps jumping dives falls falling rises rising turns turning
drifts drifting floats floating dances dancing glows glowing burns burning flows flowing opens closes looks sits
stands moves moving shines passes crosses follows camera shot close view scene cinematic film style realistic detailed
slowly quickly gently suddenly then while across around between above below behind before after again forever
"""


def write_tokenizer(folder: Path, vocab_size: int, text_len: int) -> None:
    """A byte-level BPE, which spells any text, that ends a prompt with ``</s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS.split(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    library_config = {
        # Written by hand: what the library writes can only be read by the version that wrote it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _PAD,
        "eos_token": _END,
        "add_prefix_space": True,  # older versions overrule the other file with this
        "model_max_length": text_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(library_config, indent=2) + "\n", encoding="utf-8")
