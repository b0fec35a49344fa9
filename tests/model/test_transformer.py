"""The transformer against the diffusers package's own class, weights carried over by our key map."""

from __future__ import annotations

import pytest
import torch
from closeness import relative_error
from random_model import build_rollout, flat_config, random_weights
from torch import Tensor

from echo_rt.weights.keymaps import transformer_key_map

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("changes", [{}, {"dim": 64, "num_heads": 1, "num_layers": 3, "latent_width": 10}], ids=str)
def test_the_first_block_is_what_diffusers_computes(changes: dict[str, int]) -> None:
    """In the first block the cache holds only the block itself, so attention is that of the plain Wan transformer."""
    flat = flat_config(memory=None, **changes)
    weights = random_weights(flat)
    head_dim = flat["dim"] // flat["num_heads"]
    theirs = diffusers.WanTransformer3DModel(
        patch_size=tuple(flat["patch_size"]),
        num_attention_heads=flat["num_heads"],
        attention_head_dim=head_dim,
        in_channels=flat["in_channels"],
        out_channels=flat["out_channels"],
        text_dim=flat["text_dim"],
        freq_dim=flat["freq_dim"],
        ffn_dim=flat["ffn_dim"],
        num_layers=flat["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    key_map = transformer_key_map()
    theirs.load_state_dict({key_map.to_other(name): tensor for name, tensor in weights.items()}, strict=True)

    rollout = build_rollout(flat, weights, "off")
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(3, flat["text_dim"], generator=generator)
    noise = torch.randn(rollout.state.x.shape, generator=generator)
    flows: list[Tensor] = []
    rollout.start(embeds)

    class Given:
        def fill(self, out: Tensor, block: int, step: int) -> None:
            out.copy_(noise)

    rollout.next_block(Given(), lambda block, step, flow: flows.append(flow))
    padded = torch.zeros(1, flat["text_len"], flat["text_dim"])
    padded[0, : len(embeds)] = embeds
    with torch.no_grad():
        out = theirs(
            hidden_states=noise.transpose(0, 1)[None],
            timestep=torch.tensor([1000.0]),
            encoder_hidden_states=padded,
            return_dict=False,
        )[0]
    assert relative_error(flows[0], out[0].transpose(0, 1)) < 1e-5
