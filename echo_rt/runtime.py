"""A loaded model: owns weights and buffers, and lends them to one stream at a time."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from echo_rt.engine.build import open_networks
from echo_rt.engine.engine import Engine
from echo_rt.engine.guard import Guard
from echo_rt.engine.initial_video import InitialVideo
from echo_rt.engine.scheduler import Blocks, CallerNoise
from echo_rt.errors import ConfigError, StallError, StreamError
from echo_rt.ops.backends import choose_backend
from echo_rt.options import WAN_VAE, ExplainsHabits, Lora, MemoryMode, RuntimeOptions, explains_habits
from echo_rt.snapshot.fit import BACKEND, implementations_of
from echo_rt.snapshot.snapshot import Snapshot
from echo_rt.stream import Stream
from echo_rt.utils.atomic_file import Closing
from echo_rt.utils.device import dtype_name, give_memory_back, model_context, parse_device, parse_dtype, parse_vae_dtype
from echo_rt.utils.process import Bound, ProcessGuard, computes, note_loading
from echo_rt.utils.wording import one_line, type_of
from echo_rt.weights.load_model import LoadedModel, load_model

_logger = logging.getLogger("echo_rt.runtime")

# Engines of devices that are still busy: they may still write to these buffers, so the memory is not freed.
_abandoned: list[Engine] = []


class Runtime(ExplainsHabits, Closing, Bound):
    """A model on a device, ready to stream. Make one with :meth:`from_pretrained`; close it to free its memory.

    Attributes:
        config, vae_config: sizes, window, memory and schedule of the model; sizes of its VAE.
        taken: the recipe and the weights that were taken, and why.
        memory, lookahead: the memory's mode; number of blocks begun ahead.
        device, dtype, vae_dtype: where and in which dtypes it computes.
        decoder: name of the decoder that turns latents into frames: ``"wan"``, or the kind of a tiny one.
        backend, backend_reason: the implementation of the operations, and why.
        attention, text_attention: implementations of attention over the cache and over the text, and why.
        linear: implementations of the transformer's linear layers by shape, and why.
        vae_attention, convolutions: those of the VAE decoder; None and empty for a tiny decoder.
    """

    _instead = "load another with Runtime.from_pretrained(...) in the process that uses it"
    _made_by = "Runtime.from_pretrained(MODEL)"

    def __init__(self, *, loaded: LoadedModel, options: RuntimeOptions, prescribed: Mapping[str, str]) -> None:
        self._lock = threading.RLock()  # held while a stream or the runtime itself begins or ends
        self._live: Callable[[], Stream | None] = lambda: None  # the last stream, while somebody holds it
        self._process = ProcessGuard()
        networks = open_networks(loaded, options, prescribed)
        taken = loaded.taken.for_snapshots()
        engine = Engine(loaded.config, networks, options, loaded.mode, folder=loaded.folder, taken=taken)
        self.config, self.vae_config, self.memory = loaded.config, engine.vae, loaded.mode
        self.taken = loaded.taken
        self.device, self.dtype, self.vae_dtype = engine.device, networks.model_dtype, engine.vae_dtype
        self.backend, self.backend_reason = networks.backend.name, networks.backend.reason
        self.decoder, self.lookahead = networks.vae_name, engine.lookahead
        self.attention, self.text_attention = networks.attention
        self.linear = networks.linear
        self.vae_attention, self.convolutions = networks.vae_attention, networks.convolutions
        self._engine: Engine | None = engine
        # Torch tracks buffers by the CUDA stream they were made on, and might reuse them while a queue still writes.
        self._ending = weakref.finalize(engine, engine.executor.synchronize)
        self._ending.atexit = False
        engine.executor.synchronize()  # weights loaded on this thread's CUDA stream are there for any other

    @classmethod
    @computes
    @explains_habits
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
        torch_dtype: str | torch.dtype | None = None,
        vae_dtype: str | torch.dtype | None = None,
        memory: str | MemoryMode | None = None,
        vae: str | Path = WAN_VAE,
        vae_tiles: int = 1,
        vae_file: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        backend: str | None = None,
        attention: str | None = None,
        linear: str | None = None,
        convolution: str | None = None,
        width: int | None = None,
        height: int | None = None,
        graphs: bool | None = None,
        lookahead: int | None = None,
        check: bool = False,
        keep_text_encoder: bool | None = None,
        overrides: Mapping[str, Any] | None = None,
        float8_except: Sequence[str] = (),
        like: Snapshot | None = None,
    ) -> Runtime:
        """Load a model from disk; nothing is ever downloaded.

        Args:
            model: Wan2.1-T2V-1.3B: a folder in the original or the diffusers layout, or with single files under
                ComfyUI's names; a transformer's file; or the id of a model in the local Hugging Face cache.
            checkpoint: generator weights (Echo-Infinity, Self-Forcing, ...) that replace the folder's transformer.
            lora: LoRAs to merge into the transformer, in order: a path (a file, or a PEFT folder), or a list of paths
                and (path, strength) pairs. One may have the memory encoder.
            lora_alpha: alpha of the LoRAs that do not state one; None for their rank.
            ema: True for the checkpoint's EMA weights, False for the plain ones; None for the recipe's choice, where
                the checkpoint has both. Without a checkpoint, only None.
            recipe: how the checkpoint is sampled, a name in :data:`echo_rt.recipes.RECIPES`; None for the one that the
                model's folder names, or that the files' names and contents tell.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None for a GPU where there is one.
            dtype, torch_dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` (or short, ``"bf16"``), or ``"float8"``:
                the transformer's large matmuls and self-attention in float8, the rest in bfloat16. None for bfloat16
                on a GPU, float32 on a CPU.
            vae_dtype: the VAE's dtype; None for ``dtype`` (with float8: bfloat16).
            memory: ``"evolve"``, ``"prior"`` or ``"off"``; None for evolve where the weights have a memory encoder.
            vae: the decoder that turns latents into frames: ``"wan"``, the model's own VAE; for previews ``"tiny"``,
                the tiny decoder in the model's folder, or the path of one.
            vae_tiles: number of horizontal tiles for the two highest resolutions of the model's own VAE: the same
                video with less device memory, but more time.
            vae_file, text_encoder, tokenizer: the VAE's file, the umT5 file and the tokenizer's folder, where they are
                not in the model's folder or others are wanted.
            backend: the implementation of the operations; None for ``ECHO_RT_BACKEND``, or else ``"cuda"`` on a GPU
                where the kernels support the model, and ``"torch"`` elsewhere.
            width, height: size of the video in pixels; None for that of the model's folder, or 832 and 480.
            attention: the implementation of attention, a name that ``echo-rt doctor`` lists; None for the fastest one
                on this model's shapes, measured once per GPU. The VAE uses it too where it supports the VAE's shapes.
            linear: the same for the transformer's linear layers; there is more than torch's with nvmath-python.
            convolution: the same for the model's own VAE's convolutions, wherever it works; one for convolutions over
                time and one for upsampling may be joined by a comma.
            graphs: whether stages that repeat are captured and replayed as CUDA graphs; None for yes on a GPU. A stage
                that cannot be captured ends its stream with :class:`CaptureError`.
            lookahead: number of blocks, 0 or more, begun before an earlier one is handed out. The device stays busy
                meanwhile, and prompts take effect that many blocks later. None for 1 on a GPU, 0 on a CPU.
            check: assert on every block that the steady state allocates nothing, never waits for the device and moves
                no buffer (:class:`SteadyStateError`). For debugging: it changes a setting of torch in the process.
            keep_text_encoder: whether the text encoder stays loaded between prompts; None for while a stream is live,
                if an eighth of the memory is free beside it.
            overrides: other settings of the rollout, by the names in :data:`echo_rt.options.OVERRIDES`.
            float8_except: layers that stay in bfloat16 in dtype float8, as patterns of weight names such as
                ``"blocks.0.*"`` or ``"*.ffn.2"``; one without a match is an error. One of q, k and v of self-attention
                keeps all three. ``"blocks.0.self_attn.attention"`` is what a layer does with them, and with ``@1``
                behind it at denoising step 1 of a block; the last layer's is always in bfloat16.
            like: a snapshot to resume: recipe, backend, attention, linear layers and convolutions that are not asked
                for by name are those of its video, whatever the files, ``ECHO_RT_BACKEND`` or a measurement say.

        Raises:
            WeightsError: files that are missing, damaged, or of another model.
            ConfigError: sizes, windows or options that the model cannot have, too little memory, or a recipe that is
                unknown, cannot be told from the files, or does not fit the weights.
            BackendError: a device or backend that is not available.
        """
        given = locals()
        if not isinstance(like, Snapshot | None):
            raise ConfigError(
                f"like must be a Snapshot, as Snapshot.load(path) returns, or None; got {type(like).__name__}"
            )
        if torch_dtype is not None and dtype is not None:
            raise ConfigError(
                f"torch_dtype is another name of dtype: expected one of them, got {torch_dtype!r} and {dtype!r}"
            )
        given |= {"dtype": torch_dtype if dtype is None else dtype}
        options = RuntimeOptions(**{field.name: given[field.name] for field in fields(RuntimeOptions)})
        place = parse_device(device)
        note_loading(place)
        parse_vae_dtype(vae_dtype, parse_dtype(options.dtype, place))
        prescribed = {} if like is None else implementations_of(like.model)
        choose_backend(backend, place, prescribed=prescribed.get(BACKEND))  # raises before the weights are read
        loaded = load_model(model, options, None if like is None else like.model)
        return cls(loaded=loaded, options=options, prescribed=prescribed)

    def __repr__(self) -> str:
        width, height = self.frame_size
        state = "closed" if self._process.closed else "open"
        return (
            f"<Runtime of {self.taken.model}, recipe {self.taken.recipe}, {width}x{height}, "
            f"{dtype_name(self.dtype)} on {self.device}, {state}>"
        )

    # ---------------------------------------------------------------- properties

    @property
    def frame_size(self) -> tuple[int, int]:
        """``(width, height)`` of the video in pixels."""
        stride = self.vae_config.spatial_stride
        return self.config.latent_width * stride, self.config.latent_height * stride

    @property
    def fps(self) -> int:
        """Frame rate of the video, in frames per second."""
        return self.vae_config.frame_rate

    @property
    def words(self) -> tuple[str, ...]:
        """The words that a model of few words knows, such as the one in the package; empty for any other."""
        return self._require_open().prompts.words

    @property
    def decoder_bytes(self) -> int:
        """Device memory, in bytes, of the decoder's buffers for a stream; :class:`StreamError` once closed."""
        return self._require_open().pipeline.decoder_bytes

    @property
    def text_encoder_loaded(self) -> bool:
        """Whether the text encoder is in memory now."""
        return self._engine is not None and self._engine.prompts.loaded

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt to float32 ``[length, text_dim]``, on the host; :class:`PromptError` for an empty one."""
        return self.encode_prompts([prompt])[0]

    @computes
    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Encode several prompts. The text encoder is loaded for this, and released afterwards unless kept."""
        return self._require_open().prompts.encode(prompts)

    # ---------------------------------------------------------------- streams

    @computes
    @explains_habits
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
        """Start an endless video, which may continue a given one.

        Args:
            prompt: the text; or ``prompt_embeds [length, text_dim]`` in its place.
            seed: 0 .. 2^64-1; the same seed and prompts give the same video.
            guard: what to do about a block with NaN, or one that takes too long; None ends the stream with an error.
            noise: replaces the seed's noise: a function ``(block, shape) -> float32 tensor``, called once for each
                generated block, numbered from 0, when it begins, in the thread that makes it. ``shape`` is ``(steps, B,
                C, h, w)``: the block's initial noise, then the fresh noise between its steps. Pass it again to resume.
            initial_video: the frames that the video begins with, encoded and decoded by the model's own VAE: uint8
                ``[F, H, W, 3]`` RGB like :attr:`Chunk.frames`, a tensor or an array, or an iterable of such pieces. F
                must fill whole blocks; a picture (F = 1) does so where a block is one latent frame.
            initial_latents: normalized latents float32 ``[frames, channels, h, w]`` like :attr:`Chunk.latents`, whole
                blocks, in place of ``initial_video``; the VAE encoder is not needed.
            fit: how an ``initial_video`` of another size is fitted after scaling: ``"crop"`` its edges or ``"pad"``
                with black; None raises an error.
            include_initial: False does not hand out the given blocks. They are computed before this returns, and
                counted: the first block and frame handed out are not number 0.

        Raises:
            StreamError: another stream of this runtime is live, or the runtime is closed.
            PromptError: neither or both of ``prompt`` and ``prompt_embeds``, an empty prompt, embeddings that do not
                fit the model.
            ConfigError: an invalid seed, guard, noise, or initial video or latents. The stream raises it for noise of
                another shape or dtype.
            WeightsError: an ``initial_video`` without the model's own VAE.
            NumericalError: latents of the initial video that are not finite.
        """
        with self._free() as engine:  # now, as encoding a prompt takes long, and again after it
            engine.initial_video.check(initial_video, fit, include_initial, initial_latents)
            blocks, prompts = Blocks(engine, seed, guard, noise), engine.prompts
        del engine  # the runtime may be closed meanwhile
        try:
            if initial_video is None:  # whose encoder would need the memory
                prompts.hold(blocks)
            first = prompts.resolve(prompt, prompt_embeds)
            if initial_video is not None:
                initial_latents = self._require_open().initial_video.encode(initial_video, fit)
            with self._free() as engine, model_context(engine.device, engine.dtype, engine.vae_dtype):
                blocks.start(engine, first, initial_latents, include_initial)
                return self._enliven(engine, blocks)
        except BaseException:
            prompts.let_go(blocks)
            raise

    @computes
    def resume(
        self, snapshot: Snapshot | str | Path, *, guard: Guard | None = None, noise: CallerNoise | None = None
    ) -> Stream:
        """Continue a video, bit for bit, from a :meth:`Stream.snapshot`.

        Args:
            snapshot: of this model, or its file; ``like=snapshot`` loads a runtime with the implementations of its
                video.
            guard: as in :meth:`stream`.
            noise: the function that :meth:`stream` was given, None if it was given none.

        Raises:
            StreamError: a snapshot of another model, of another backend or other implementations (unless they were
                asked for by name), or with other ``noise``; another live stream of this runtime.
            SnapshotError: a file that is missing, damaged, or no snapshot.
            ConfigError: an invalid guard or noise.
        """
        if isinstance(snapshot, str | Path):
            snapshot = Snapshot.load(snapshot)
        if not isinstance(snapshot, Snapshot):
            raise StreamError(f"expected a Snapshot of stream.snapshot(), or its file, got {type_of(snapshot)}")
        with self._free() as engine, model_context(engine.device, engine.dtype, engine.vae_dtype):
            blocks = Blocks(engine, snapshot.seed, guard, noise)
            blocks.restore(engine, snapshot)
            return self._enliven(engine, blocks)

    def _enliven(self, engine: Engine, blocks: Blocks) -> Stream:
        stream = Stream(engine=engine, blocks=blocks, process=self._process)
        if self._engine is None:  # closed meanwhile by a signal handler of this thread
            stream.close()
        self._require_open()
        self._live = weakref.ref(stream)
        return stream

    def _require_open(self) -> Engine:
        engine = self._engine  # read first: it goes after the runtime is closed
        self._process.require("runtime")
        assert engine is not None
        return engine

    @contextmanager
    def _free(self) -> Iterator[Engine]:
        """Yield the engine under the lock; :class:`StreamError` while a stream is live."""
        while True:
            with self._lock:
                engine, last = self._require_open(), self._live()
                if last is None or last._engine is None:
                    yield engine
                    return
            if not last.closed and last.failure is None:
                raise StreamError(
                    f"this runtime has a live stream, at block {last.next_block}; "
                    "close it first, or load another runtime"
                )
            if last._busy_here:
                raise StreamError("this thread is in the middle of a block of the runtime's stream; let it end first")
            # A failed stream may be held only by a traceback, and a closed one may still be making its last block.
            # Wait without the lock, which a signal handler amid that block may need.
            last.close()

    # ---------------------------------------------------------------- life

    @computes
    def close(self) -> None:
        """End the live stream and free all memory. Idempotent.

        A device that is lost, or still busy with a block that a guard gave up, is only a warning in the log, so that it
        does not replace the error that led here.
        """
        self._process.closed = True
        if self._process.left:
            self._ending.detach()
            self._engine = None  # without a lock, which a thread that only the parent has may hold
            return
        with self._lock:
            live = self._live()
            engine, self._engine = self._engine, None
        amid_block = live is not None and live._busy_here
        if live is not None:
            live.close()  # waits without the lock, which a signal handler amid its block may need
        if engine is None:
            return
        try:
            engine.prompts.close()
            if amid_block:
                return  # the block still needs the engine; its end releases it
            self._ending.detach()
            engine.executor.close()  # submitted work ends before its buffers are freed
            engine = None
            give_memory_back(self.device)
        except (RuntimeError, StallError) as error:
            if isinstance(error, StallError) and engine is not None:
                _abandoned.append(engine)
            _logger.warning("closing the runtime: %s", one_line(error))
