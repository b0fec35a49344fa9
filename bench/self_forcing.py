"""Self-Forcing's own pipeline beside ours, on a CPU: ``PYTHONPATH=CHECKOUT python bench/self_forcing.py``.

CHECKOUT is github.com/guandeh17/Self-Forcing, whose requirements are installed; torch's attention takes flash-attn's
place. Both make 21 latent frames, which is as far as it goes, and decode none: by some layers of Wan's widths, with the
same random weights, noise and window, on one thread, in turns. Times are the processor's, which other programs do not
lengthen. Exit code 0 if the latents agree, 1 if not, 2 without the checkout.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import _checkout  # noqa: F401
import torch
from baselines import fill
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_rt.bench.settings import RELEASED
from echo_rt.bench.tables import environment, summary_line
from echo_rt.engine.build import Networks, build_rollout
from echo_rt.engine.executor import make_executor
from echo_rt.ops.backends import choose_backend
from echo_rt.options import MemoryMode, RuntimeOptions, latent_size
from echo_rt.utils.device import model_context
from echo_rt.verify.bundles import BOUNDS, relative_error
from echo_rt.weights.shapes import transformer_shapes
from echo_rt.weights.tensors import FingerprintedTensors, ModelTensors
from echo_rt.weights.tiny_model import RandomTensors

CPU, FRAMES = torch.device("cpu"), 21
SIZE, LAYERS, TURNS = (160, 96), 2, 2
TEXT = 20  # tokens of the text: as many beside a block's 180 as 512 beside the 4680 of the released size


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Take flash-attn's place, on ``[B, n, H, d]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def modules() -> list[Any]:
    """Its modules; raises ``ImportError``."""
    with patch("torch.cuda.current_device", return_value=0):  # for which they ask when they are imported
        names = ("pipeline.causal_inference", "utils.wan_wrapper", "wan.modules.causal_model", "wan.modules.model")
        return [importlib.import_module(name) for name in names]


def theirs(checkout: list[Any], networks: Networks, noise: Tensor, prompt: Tensor) -> Callable[[], Tensor]:
    """Its pipeline with our tensors, ``noise [blocks, steps, B, C, h, w]``: a function that makes ``[F, C, h, w]``."""
    pipeline, wrapper, causal, wan = checkout
    sizes, window, sampler = networks.config.transformer, networks.config.window, networks.config.sampler
    causal.attention = wan.flash_attention = _attention
    own = {name: getattr(sizes, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_len")}
    window_of = {"local_attn_size": window.cached_frames, "sink_size": window.sink_frames}
    with patch.object(causal.CausalWanModel, "from_pretrained", lambda _, **more: causal.CausalWanModel(**own, **more)):
        generator = wrapper.WanDiffusionWrapper(timestep_shift=sampler.timestep_shift, is_causal=True, **window_of)
    fill(generator.model.requires_grad_(requires_grad=False), networks.tensors.transformer)
    settings = SimpleNamespace(num_frame_per_block=window.frames_per_block, independent_first_frame=False)
    settings.denoising_step_list, settings.warp_denoising_step = list(sampler.denoising_steps), True
    settings.context_noise = sampler.context_timestep
    vae = SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents)
    text_encoder = lambda text_prompts: {"prompt_embeds": prompt[None]}  # noqa: E731
    video = pipeline.CausalInferencePipeline(settings, CPU, generator, text_encoder, vae)
    video.num_transformer_blocks, video.frame_seq_length = sizes.num_layers, networks.config.tokens_per_frame
    add_noise = video.scheduler.add_noise

    def make() -> Tensor:
        drawn = iter(noise[:, 1:].flatten(0, 1))
        video.scheduler.add_noise = lambda clean, _, timestep: add_noise(clean, next(drawn), timestep)
        with redirect_stdout(sys.stderr):
            latents: Tensor = video.inference(noise[:, 0].flatten(0, 1)[None], [""], return_latents=True)[1][0]
        return latents

    return make


def main() -> int:
    try:
        checkout = modules()
    except ImportError as error:
        print(f"self_forcing.py: expected a checkout of Self-Forcing on PYTHONPATH: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    transformer = replace(RELEASED.config.transformer, num_layers=LAYERS, text_len=TEXT)
    height, width = latent_size(*SIZE, RELEASED.vae, transformer)
    config = replace(RELEASED.config, transformer=transformer, latent_height=height, latent_width=width, memory=None)
    random = ModelTensors(FingerprintedTensors(RandomTensors(transformer_shapes(transformer), CPU), "random weights"))
    networks = Networks(config, random, RuntimeOptions(device="cpu", dtype="float32"), choose_backend("torch", CPU))
    noise = torch.randn(FRAMES // 3, len(config.sampler.denoising_steps), 3, *config.latent_shape)
    prompt = torch.randn(TEXT // 2, transformer.text_dim)
    with model_context(CPU, torch.float32):
        rollout = build_rollout(config, networks, MemoryMode.OFF, make_executor(CPU, None))

        def ours() -> Tensor:
            rollout.start(prompt)
            return torch.cat([rollout.next_block(each).clone() for each in noise])

        both = (theirs(checkout, networks, noise, prompt), ours)
        print(f"{summary_line(environment('cpu'))}; {LAYERS} of Wan's layers, {SIZE[0]}x{SIZE[1]}, float32, one thread")
        for _ in range(TURNS):
            begun, made = [time.process_time()], list[Tensor]()
            for make in both:
                made.append(make())
                begun.append(time.process_time())
            (first, second), worst = (after - before for before, after in pairwise(begun)), relative_error(*made)
            ratio = f"{first / second:.2f} times as long; latents differ by {worst:.1e}"
            print(f"theirs {first:.2f} s, ours {second:.2f} s: {ratio}", flush=True)
    return 0 if worst <= BOUNDS[torch.float32] else 1


if __name__ == "__main__":
    sys.exit(main())
