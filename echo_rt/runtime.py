"""A loaded model: owns weights and buffers, lends them to one stream at a time."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from echo_rt.engine.build import build_engine, open_networks
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import Guard
from echo_rt.engine.initial_video import InitialVideo
from echo_rt.engine.scheduler import CallerNoise, Initial
from echo_rt.errors import ConfigError, StallError, StreamError
from echo_rt.ops.backends import choose_backend
from echo_rt.options import WAN_VAE, Lora, MemoryMode, RuntimeOptions, check_seed
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.snapshot.ways import BACKEND, ways_of
from echo_rt.stream import Stream
from echo_rt.utils.device import give_memory_back, parse_device, parse_dtype, parse_vae_dtype
from echo_rt.utils.process import ProcessGuard, note_loading, release_on_error
from echo_rt.utils.threads import log_threads
from echo_rt.utils.wording import one_line
from echo_rt.weights.load_model import LoadedModel, load_model

_logger = logging.getLogger("echo_rt.runtime")

# Engines that a device did not let go of: it may write to their buffers still, so nobody else is given them.
_abandoned: list[Engine] = []


class Runtime:
    """A model on a device, ready to stream. Make one with :meth:`from_pretrained`; close it to give memory back.

    ``config`` and ``vae_config`` say what it computes, ``taken`` by which recipe and of which weights, ``dtype`` and
    ``vae_dtype`` how precisely, ``vae`` who makes pictures of latents (``"wan"``, or the kind of a tiny decoder),
    ``backend`` which implementation of the operations it has and ``backend_reason`` why, ``attention`` and
    ``text_attention`` with which libraries and why, ``vae_attention`` and ``convolutions`` how the VAE's are computed
    and why (a tiny decoder has None and none), ``frame_size`` the video's ``(width, height)`` in pixels and ``fps`` its
    frames a second.
    """

    def __init__(self, loaded: LoadedModel, options: RuntimeOptions, prescribed: Mapping[str, str]) -> None:
        self._lock = threading.RLock()  # held while a stream comes to life, or the runtime to its end
        self._live: weakref.ref[Stream] | None = None
        self._process = ProcessGuard()
        networks = open_networks(loaded, options, prescribed)
        engine = build_engine(
            loaded.config, networks, options, loaded.mode, folder=loaded.folder, taken=loaded.taken.for_snapshots()
        )
        log_threads(engine.device)
        self.config, self.vae_config, self.memory = loaded.config, engine.vae, loaded.mode
        self.taken = loaded.taken
        self.device, self.dtype, self.vae_dtype = engine.device, networks.model_dtype, engine.vae_dtype
        self.backend, self.backend_reason = networks.backend.name, networks.backend.reason
        self.vae, self.lookahead = networks.vae_name, engine.lookahead
        self.attention, self.text_attention = networks.attention
        self.vae_attention, self.convolutions = networks.vae_attention, networks.convolutions
        self._engine: Engine | None = engine
        # Torch knows its buffers by the stream they were made on, and would lend them out amid a block of the queues.
        self._ending = weakref.finalize(engine, engine.executor.synchronize)
        self._ending.atexit = False
        engine.executor.synchronize()  # what was loaded on this thread's CUDA stream is there for any other

    @classmethod
    @release_on_error
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        checkpoint: str | Path | None = None,
        lora: Lora = None,
        lora_alpha: float | None = None,
        ema: bool | None = None,
        recipe: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        vae_dtype: str | torch.dtype | None = None,
        memory: str | MemoryMode | None = None,
        vae: str | Path = WAN_VAE,
        vae_tiles: int = 1,
        vae_file: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        backend: str | None = None,
        attention: str | None = None,
        convolution: str | None = None,
        width: int | None = None,
        height: int | None = None,
        graphs: bool | None = None,
        lookahead: int | None = None,
        check: bool = False,
        keep_text_encoder: bool = False,
        overrides: Mapping[str, Any] | None = None,
        float8_except: Sequence[str] = (),
        like: Snapshot | None = None,
    ) -> Runtime:
        """Load a model from disk; nothing is ever downloaded.

        Args:
            model: Wan2.1-T2V-1.3B: a folder in the original or the diffusers layout or with single files by ComfyUI's
                names, the file of a transformer, or the id of a model in the local Hugging Face cache.
            checkpoint: generator weights (Echo-Infinity, Self-Forcing, ...) that replace the folder's transformer.
            lora: LoRAs merged into the transformer, in order: a path, or a list of paths and (path, strength) pairs, of
                which one may carry the memory encoder. A path is a file in any naming, or a folder of PEFT.
            lora_alpha: alpha of the LoRAs that state none; None for their rank.
            ema: True for the checkpoint's EMA weights, False for the plain ones, None for those that the recipe takes,
                where it has them; of no checkpoint neither can be asked for.
            recipe: how the checkpoint is sampled, a name in :data:`echo_rt.recipes.RECIPES`; ``overrides`` act on top.
                None for the one that the model's folder names, or else the files tell by what they hold or are called.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None for a GPU where there is one.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"float8"`` for the transformer's large products in
                float8 and all else in bfloat16; None for bfloat16 on a GPU, float32 on a CPU.
            vae_dtype: what the VAE decodes in, whatever the rest computes in; None for the same (float8: bfloat16).
            memory: ``"evolve"``, ``"prior"`` or ``"off"``; None for evolve where the weights have a memory encoder.
            vae: who makes pictures of latents: ``"wan"``, the model's own VAE; for previews ``"tiny"``, the tiny
                decoder in the model's folder (``taew2_1`` of TAEHV or ``lighttaew2_1`` of LightX2V, ``.pth`` or
                ``.safetensors``), or the path of such a file; the model's own VAE need not be there then.
            vae_tiles: in how many bands of rows the model's own VAE decodes its two highest resolutions: the same video
                in less device memory and more time.
            vae_file, text_encoder, tokenizer: the VAE's file, the umT5 file and the tokenizer's folder, in place of the
                model's own or where it has none.
            backend: which implementation of the operations; None for ``ECHO_RT_BACKEND``, or else ``"cuda"`` on a GPU
                that the kernels were built for and ``"torch"`` elsewhere. That is also where the kernels do not cover
                the model, which is one whose memory evolves in float32 or has other head sizes.
            width, height: of the video, in pixels; None for the model folder's own, or 832 and 480.
            attention: which library computes attention, by the names ``echo-rt doctor`` lists; None for the one that a
                trial on this model's shapes finds fastest, once for a GPU. The VAE's attention too, where the library
                has heads of its size and its dtype, and the one that a trial finds elsewhere.
            convolution: how the model's own VAE computes its convolutions wherever that works, by the names ``echo-rt
                doctor`` lists; one for those over time and one for those that enlarge may be joined by a comma. None
                for what a trial on their shapes finds fastest and right, once for a GPU.
            graphs: whether what repeats from block to block is captured and replayed as CUDA graphs; None for: on a
                GPU, yes. A stage that cannot be captured ends its stream with :class:`CaptureError`.
            lookahead: how many blocks are begun before an earlier one is handed out, 0 or more: the device is busy
                while a block is shown, and a prompt takes effect so much later; None for 1 on a GPU, 0 on a CPU.
            check: assert on every block that the steady state allocates nothing, never waits for the device and moves
                no buffer (:class:`SteadyStateError`); for debugging, and for this process's torch as a whole.
            keep_text_encoder: keep the text encoder loaded between prompts.
            overrides: other facts of the rollout, by the names in :data:`echo_rt.options.OVERRIDES`.
            float8_except: layers that stay in bfloat16 in dtype float8, as patterns of their weights' names such as
                ``"blocks.0.*"`` or ``"*.ffn.2"``; one that matches none is an error. The projections q, k and v of
                self-attention are one product: to keep one of them is to keep all three.
            like: a snapshot to go on with: recipe, backend, attention and convolutions that are not asked for by name
                are those of its video, whatever the files tell, ``ECHO_RT_BACKEND`` names or a trial would find.

        Raises:
            WeightsError: files that are missing, damaged, or of another model.
            ConfigError: sizes, windows or options that the model cannot have, or the machine no memory for; no recipe
                where nothing tells it, or one that does not fit the weights.
            BackendError: a device or backend that is not there.
        """
        if not isinstance(like, Snapshot | None):
            raise ConfigError(f"like must be a Snapshot or None, got {type(like).__name__}")
        options = RuntimeOptions(
            checkpoint=checkpoint,
            lora=lora,
            lora_alpha=lora_alpha,
            ema=ema,
            recipe=recipe,
            device=device,
            dtype=dtype,
            float8_except=float8_except,
            vae_dtype=vae_dtype,
            memory=memory,
            vae=vae,
            vae_tiles=vae_tiles,
            vae_file=vae_file,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            backend=backend,
            attention=attention,
            convolution=convolution,
            graphs=graphs,
            lookahead=lookahead,
            width=width,
            height=height,
            overrides=overrides,
            check=check,
            keep_text_encoder=keep_text_encoder,
        )
        place = parse_device(device)
        note_loading(place)
        parse_vae_dtype(vae_dtype, parse_dtype(dtype, place))
        ways = {} if like is None else ways_of(like.model)
        choose_backend(backend, place, prescribed=ways.get(BACKEND))  # one that was named is refused before the weights
        return cls(load_model(model, options, None if like is None else like.model), options, ways)

    # ---------------------------------------------------------------- facts

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the video in pixels."""
        stride = self.vae_config.spatial_stride
        return self.config.latent_width * stride, self.config.latent_height * stride

    @property
    def fps(self) -> int:
        """Frames of a second of video."""
        return self.vae_config.frame_rate

    @property
    def decoder_bytes(self) -> int:
        """Device memory, in bytes, that the video decoder keeps for a stream; :class:`StreamError` once closed."""
        return self._require_open().pipeline.decoder_bytes

    @property
    def text_encoder_loaded(self) -> bool:
        """Whether the text encoder is in memory at this moment."""
        return self._engine is not None and self._engine.prompts.loaded

    # ---------------------------------------------------------------- prompts

    def encode_prompt(self, prompt: str) -> Tensor:
        """Embeddings ``[length, text_dim]`` float32 of a prompt; :class:`PromptError` for an empty one."""
        return self.encode_prompts([prompt])[0]

    @release_on_error
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings of several prompts. The text encoder is loaded for this, and released after it unless kept."""
        return self._require_open().prompts.encode(prompts)

    # ---------------------------------------------------------------- streams

    @release_on_error
    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        seed: int = 0,
        guard: Guard | None = None,
        noise: CallerNoise | None = None,
        initial_video: InitialVideo | None = None,
        initial_latents: Tensor | None = None,
        fit: Literal["crop", "pad"] | None = None,
        include_initial: bool = True,
    ) -> Stream:
        """Begin an endless video, or go on with a given one.

        Args:
            prompt: what to show; or ``prompt_embeds [length, text_dim]`` in its place.
            seed: 0 .. 2^64-1; the same seed and prompts give the same video.
            guard: what to do about a block with NaN, or one that takes too long; None for an end with an error.
            noise: the noise in the place of the seed's: a function ``(block, shape) -> float32 tensor`` that is called
                once for each block that is generated, counted from 0, when the block is begun, in the thread that makes
                it. ``shape`` is ``(steps, B, C, h, w)``: what the block begins with, then the fresh noise between its
                steps. A resumed stream is given it again.
            initial_video: what the video begins with: uint8 ``[F, H, W, 3]`` RGB as :attr:`Chunk.frames` is, a tensor
                or an array, or an iterable of such pieces, read as they are encoded. F must fill whole blocks; a
                picture, F of 1, does where a block is one latent frame. Encoded by the model's own VAE, which is loaded
                for it. The first blocks of the video are these frames, as the decoder makes them of their latents.
            initial_latents: such frames as normalized latents, float32 ``[frames, channels, h, w]`` like
                :attr:`Chunk.latents`, whole blocks, in place of ``initial_video``; no encoder is needed.
            fit: of an ``initial_video`` of another size, scaled to the video's: ``"crop"`` what sticks out, or
                ``"pad"`` with black what is missing; None for an error.
            include_initial: False leaves those blocks out of what is handed out; numbers of blocks and frames count
                them all the same, so the first one is not 0. They are worked through before this returns.

        Raises:
            StreamError: another stream of this runtime is live, or the runtime is closed.
            PromptError: neither or both given, an empty prompt, embeddings that do not fit.
            ConfigError: a seed, guard or noise that there cannot be, frames or latents of another size, number or kind;
                from the stream, for noise of another kind.
            WeightsError: ``initial_video`` is given, and the model's own VAE is not there.
            NumericalError: its latents are not finite.
        """
        check_seed(seed)
        with self._free() as engine:  # before a prompt is encoded, which takes long, and again after it
            engine.initial_video.check(initial_video, fit, include_initial, initial_latents)
        embeds = self._require_open().prompts.resolve(prompt, prompt_embeds)
        if initial_video is not None:
            initial_latents = self._require_open().initial_video.encode(initial_video, fit)
        initial = None if initial_latents is None else Initial(initial_latents, shown=include_initial)
        with self._free() as engine:
            return self._enliven(Stream.begin(engine, embeds, seed, guard, noise, initial))

    @release_on_error
    def resume(self, snapshot: Snapshot, *, guard: Guard | None = None, noise: CallerNoise | None = None) -> Stream:
        """Go on, bit for bit, where :meth:`Stream.snapshot` was taken.

        :class:`StreamError` for a snapshot of another model, one whose video was computed by another backend or in
        other ways than this runtime has, unless its user named these (see ``like``), or while another stream is live.
        ``noise``: what :meth:`stream` was given; :class:`StreamError` where one of the two was given it alone.
        """
        with self._free() as engine:
            return self._enliven(Stream.restore(engine, snapshot, guard, noise))

    def _enliven(self, stream: Stream) -> Stream:
        if self._engine is None:  # closed meanwhile, by a signal handler of this thread
            stream.close()
        self._require_open()
        self._live = weakref.ref(stream)
        return stream

    def _require_open(self) -> Engine:
        self._process.require("runtime")
        engine = self._engine
        if engine is None:
            raise StreamError("the runtime is closed; load another with Runtime.from_pretrained(...)")
        return engine

    @contextmanager
    def _free(self) -> Iterator[Engine]:
        """The engine, with the lock, while no stream is live; :class:`StreamError` where one is."""
        while True:
            with self._lock:
                engine = self._require_open()
                last = self._last()
                if last is None:
                    yield engine
                    return
            # A failed one may be out of everyone's reach, held by a traceback; of a closed one a last block may still
            # be under way in the buffers. It is waited for without the lock, which a handler amid that block may want.
            last.close()

    def _last(self) -> Stream | None:
        """A stream that is over and has not let go of the buffers; :class:`StreamError` for one that is live."""
        live = self._live() if self._live is not None else None
        if live is None or live.gone:
            return None
        if not live.closed and live.failure is None:
            raise StreamError(
                f"this runtime has a live stream, at block {live.next_block}; close it first, or load another runtime"
            )
        if live.busy_in_this_thread:
            raise StreamError("this thread is in the middle of a block of the runtime's stream; let it end first")
        return live

    # ---------------------------------------------------------------- life

    def close(self) -> None:
        """End the live stream and give every buffer back. Idempotent.

        A device that is lost, or still busy with a block that a guard gave up, is no error here but a warning in the
        log: closing is what follows an error, and must not be told in its place.
        """
        if self._process.left:
            self._ending.detach()
            self._engine = None  # a lock may be held by a thread that only the parent has
            return
        with self._lock:
            live = self._live() if self._live is not None else None
            engine, self._engine = self._engine, None
        amid_block = live is not None and live.busy_in_this_thread
        if live is not None:
            live.close()  # waits, but holds nothing that a signal's handler amid its block would wait for
        if engine is None:
            return
        try:
            engine.prompts.close()
            if amid_block:
                return  # it is used on, until the block's end lets go of it
            self._ending.detach()
            engine.executor.close()  # what is under way ends before its buffers go
            engine = None
            give_memory_back(self.device)
        except (RuntimeError, StallError) as error:
            if isinstance(error, StallError) and engine is not None:
                _abandoned.append(engine)
            _logger.warning("closing the runtime: %s", one_line(error))

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
