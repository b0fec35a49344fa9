"""What a model is: frozen dataclasses, checked when made; sizes that follow from others are properties.

A *latent frame* is one time step of the VAE's latent video, a *block* the latent frames that are generated together, a
*token* one patch of a latent frame. Attention sees the *sink* (the first frames of the video, kept for ever), the
*memory* (a fixed number of frames' worth of tokens that evolves) and the *local window* (the most recent frames, the
block being generated included). Sources: arXiv 2606.04527 and its released recipes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import msgspec
from msgspec import Meta

from echo_rt.errors import ConfigError, not_one_of

if TYPE_CHECKING:
    from typing_extensions import Self

# How the memory encoder sees the keys that leave the window.
MEMORY_READS = ("unrotated", "rotated")

# What a field can be. Numbers come from files: those past the limits describe no model, and work would grow with them.
Size = Annotated[int, Meta(ge=1, le=2**20, description="a positive integer of at most 1048576")]
Depth = Annotated[int, Meta(ge=1, le=1024, description="a positive integer of at most 1024")]
_Flag = Annotated[bool, Meta(description="true or false")]
_Number = Annotated[float, Meta(ge=-1e6, le=1e6, description="a finite number")]
_Numbers = Annotated[tuple[_Number, ...], Meta(max_length=2**20, description="finite numbers")]
_Fraction = Annotated[float, Meta(ge=0.0, le=1.0, description="a number in 0..1")]
_Levels = Annotated[tuple[Depth, ...], Meta(min_length=1, max_length=16, description="1 to 16 positive integers")]
_Flags = Annotated[tuple[bool, ...], Meta(description="true or false for each")]
_Steps = Annotated[tuple[int, ...], Meta(max_length=1000, description="falling integers in 1..1000")]


@functools.cache
def _checked_fields(config: type) -> dict[str, Any]:
    hints = get_type_hints(config, include_extras=True)
    return {name: hint for name, hint in hints.items() if hasattr(hint, "__metadata__")}


class _Checked:
    """A config whose values are held against the types and limits of its fields when it is made."""

    _what: str  # names it in messages

    def __init_subclass__(cls, what: str) -> None:
        cls._what = what

    def __post_init__(self) -> None:
        for name, kind in _checked_fields(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it; a config can be hashed
                object.__setattr__(self, name, tuple(value))
            try:
                msgspec.convert(float(value) if isinstance(value, float) else value, kind)  # NumPy's is one
            except msgspec.ValidationError:
                self._refuse(name, kind.__metadata__[0].description)

    @classmethod
    def from_flat(cls, source: Mapping[str, Any]) -> Self:
        """Make a config of one flat JSON object; unknown keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in source.items() if name in names})

    def _refuse(self, name: str, expected: str) -> NoReturn:
        value = getattr(self, name)
        found = f"{list(value) if isinstance(value, tuple) else value!r}"
        raise ConfigError(f"{self._what}: {name} must be {expected}, got {found:.100}")


@dataclass(frozen=True)
class TransformerConfig(_Checked, what="transformer"):
    """Sizes of the diffusion transformer (Wan's ``config.json``).

    Defaults are the values of Wan2.1-T2V-1.3B that its ``config.json`` does not name.
    """

    dim: Size
    ffn_dim: Size
    freq_dim: Size
    num_heads: Size
    num_layers: Depth
    in_channels: Size = 16
    out_channels: Size = 16
    text_dim: Size = 4096
    text_len: Size = 512
    patch_size: Annotated[tuple[Size, Size, Size], Meta(description="(1, rows, columns)")] = (1, 2, 2)
    eps: _Fraction = 1e-6
    rope_theta: Annotated[float, Meta(gt=0, le=1e12, description="a number above 0")] = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size[0] != 1:
            self._refuse("patch_size", "(1, rows, columns)")
        if self.in_channels != self.out_channels:
            raise ConfigError(
                "transformer: a text-to-video model has as many input as output channels, "
                f"got in {self.in_channels} and out {self.out_channels}"
            )
        if self.dim % self.num_heads:
            raise ConfigError(f"transformer: dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.freq_dim % 2:
            self._refuse("freq_dim", "even")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ConfigError(
                f"transformer: the head size must be even and at least 6 for three rotary parts, got "
                f"dim {self.dim} / num_heads {self.num_heads} = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that are rotated by the frame, the row and the column."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    @property
    def patch_area(self) -> int:
        return self.patch_size[1] * self.patch_size[2]


@dataclass(frozen=True)
class WindowConfig(_Checked, what="window"):
    """What a block attends to, in latent frames, and the largest temporal RoPE id the model was trained with.

    ``sink_frames`` may be 0 without a memory. ``recache_sink``: a prompt switch whose recache reaches frame 0 leaves
    the sink with the keys and values of the new prompt; otherwise the old ones are restored.
    """

    frames_per_block: Size = 3
    sink_frames: Annotated[int, Meta(ge=0, le=2**20, description="an integer of 0 or more")] = 3
    local_frames: Size = 9
    max_temporal_id: Size = 20
    recache_sink: _Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sink_frames", "local_frames"):
            if getattr(self, name) % self.frames_per_block:
                self._refuse(name, f"a multiple of frames_per_block {self.frames_per_block}")

    @property
    def cached_frames(self) -> int:
        return self.sink_frames + self.local_frames


@dataclass(frozen=True)
class MemoryConfig(_Checked, what="memory"):
    """The evolving memory: its size in frames of tokens, and the settings in which recipes differ.

    ``reads``: the memory encoder reads the keys of evicted frames before rotation, or rotated by the ids that these
    frames have while the block that evicts them is generated.
    """

    frames: Size = 3
    layers: Depth = 2
    normalize_k: _Flag = False
    rebuild_on_prompt_switch: _Flag = True
    ffn_multiplier: Depth = 4
    reads: str = MEMORY_READS[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reads not in MEMORY_READS:
            raise ConfigError(not_one_of("memory: memory_reads", MEMORY_READS, self.reads))

    @property
    def reads_rotated(self) -> bool:
        return self.reads == "rotated"


@dataclass(frozen=True)
class SamplerConfig(_Checked, what="sampler"):
    """The few-step schedule: the training timesteps of the denoising steps, and the timestep of the context pass.

    ``first_block_steps``: the steps of the first generated block; empty for the same as all others.
    """

    denoising_steps: _Steps = (1000, 750, 500, 250)
    timestep_shift: Annotated[float, Meta(gt=0, le=1e6, description="a number above 0, and finite")] = 5.0
    context_timestep: _Number = 0.0
    num_train_timesteps: Size = 1000
    first_block_steps: _Steps = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, steps in (("denoising_steps", self.denoising_steps), ("first_block_steps", self.first_block_steps)):
            rises = any(a <= b for a, b in itertools.pairwise(steps))
            if rises or not all(1 <= step <= self.num_train_timesteps for step in steps):
                self._refuse(name, f"falling integers in 1..{self.num_train_timesteps}")
        if not self.denoising_steps:
            self._refuse("denoising_steps", "one step at least")
        if not 0 <= self.context_timestep <= self.num_train_timesteps:
            self._refuse("context_timestep", f"a number in 0..{self.num_train_timesteps}")

    @property
    def most_steps(self) -> int:
        """The largest number of denoising steps of any block."""
        return max(len(self.denoising_steps), len(self.first_block_steps))


@dataclass(frozen=True)
class ModelConfig(_Checked, what="latent size"):
    """Everything that determines the arithmetic of a rollout: transformer, window, memory, schedule, latent size."""

    transformer: TransformerConfig
    latent_height: Size
    latent_width: Size
    window: WindowConfig = WindowConfig()
    memory: MemoryConfig | None = None
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        _, patch_rows, patch_columns = self.transformer.patch_size
        if self.latent_height % patch_rows or self.latent_width % patch_columns:
            raise ConfigError(
                f"latent size {self.latent_width}x{self.latent_height} is not a whole number of "
                f"{patch_columns}x{patch_rows} patches"
            )
        window, frames = self.window, self.memory_frames
        if self.memory is not None and window.sink_frames == 0:
            raise ConfigError(
                f"window: sink_frames must be {window.frames_per_block} or more beside a memory, got 0; "
                "without a sink the memory has to be off"
            )
        if frames > window.frames_per_block:
            raise ConfigError(
                f"memory: {frames} memory frames are more than frames_per_block {window.frames_per_block}; "
                "their ids would run into the sink"
            )
        needed = window.cached_frames + frames
        if needed > window.max_temporal_id + 1:
            raise ConfigError(
                f"window: sink_frames {window.sink_frames} + memory frames {frames} + local_frames "
                f"{window.local_frames} need {needed} temporal ids, but max_temporal_id {window.max_temporal_id} "
                f"leaves {window.max_temporal_id + 1}"
            )

    @classmethod
    def from_flat(cls, source: Mapping[str, Any]) -> Self:
        """Make a config of one flat JSON object, as in golden bundles and snapshots; unknown keys are ignored."""
        try:
            channels = source.get("in_channels", 16)
            memory = source.get("memory")
            if memory is not None and not isinstance(memory, Mapping):
                raise ConfigError(f"memory must be an object or null, got {memory!r}")
            return cls(
                transformer=TransformerConfig.from_flat({"out_channels": channels, **source}),
                latent_height=source["latent_height"],
                latent_width=source["latent_width"],
                window=WindowConfig.from_flat(source),
                memory=None if memory is None else MemoryConfig.from_flat(memory),
                sampler=SamplerConfig.from_flat(source),
            )
        except KeyError as missing:
            raise ConfigError(f"the config lacks {missing.args[0]!r}") from None
        except TypeError as error:
            raise ConfigError(f"the config does not describe a model: {error}") from None

    def to_flat(self) -> dict[str, Any]:
        """Return one flat object of plain JSON types, the inverse of :meth:`from_flat`."""
        nested = dataclasses.asdict(self)
        flat = {**nested.pop("transformer"), **nested.pop("window"), **nested.pop("sampler"), **nested}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        _, patch_rows, patch_columns = self.transformer.patch_size
        return self.latent_height // patch_rows, self.latent_width // patch_columns

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens_per_block(self) -> int:
        return self.window.frames_per_block * self.tokens_per_frame

    @property
    def memory_frames(self) -> int:
        return 0 if self.memory is None else self.memory.frames

    @property
    def memory_tokens(self) -> int:
        return self.memory_frames * self.tokens_per_frame

    @property
    def ring_begin(self) -> int:
        """The first row of the local ring in a KV buffer that holds memory | sink | ring."""
        return self.memory_tokens + self.window.sink_frames * self.tokens_per_frame

    @property
    def cached_tokens(self) -> int:
        """The rows of a KV buffer, which are what a block attends to once the window is full."""
        return self.ring_begin + self.window.local_frames * self.tokens_per_frame

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent frame: channels, height, width."""
        return self.transformer.in_channels, self.latent_height, self.latent_width


# Per-channel statistics of Wan2.1's latents: what the transformer sees is (latent - mean) / std.
_WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VaeConfig(_Checked, what="vae"):
    """The causal video VAE; the defaults are those of Wan2.1."""

    base_dim: Size = 96
    z_dim: Size = 16
    dim_mult: _Levels = (1, 2, 4, 4)
    num_res_blocks: Depth = 2
    temporal_downsample: _Flags = (False, True, True)
    latents_mean: _Numbers = _WAN_LATENTS_MEAN
    latents_std: _Numbers = _WAN_LATENTS_STD
    frame_rate: Size = 16  # video frames a second that Wan2.1 was trained at

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"vae: temporal_downsample must name one choice between each two of the {len(self.dim_mult)} "
                f"resolutions, got {len(self.temporal_downsample)}"
            )
        entries = (len(self.latents_mean), len(self.latents_std))
        if entries != (self.z_dim, self.z_dim):
            raise ConfigError(f"vae: latents_mean and latents_std must have z_dim {self.z_dim} entries, got {entries}")

    @property
    def spatial_stride(self) -> int:
        """Video pixels per latent pixel, along a side."""
        return 1 << (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame (the first latent frame of a video decodes to one)."""
        return 1 << self.temporal_downsample.count(True)

    def video_frames(self, latent_frames: int) -> int:
        """Number of video frames that the first ``latent_frames`` latents of a stream decode to."""
        return 0 if latent_frames == 0 else 1 + self.temporal_stride * (latent_frames - 1)


@dataclass(frozen=True)
class TextEncoderConfig(_Checked, what="text encoder"):
    """The umT5 encoder; the defaults are those of umT5-xxl."""

    vocab_size: Size = 256384
    d_model: Size = 4096
    d_attn: Size = 4096
    d_ff: Size = 10240
    num_heads: Size = 64
    num_layers: Depth = 24
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    eps: _Fraction = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_attn % self.num_heads:
            raise ConfigError(f"text encoder: d_attn {self.d_attn} is not a multiple of num_heads {self.num_heads}")

    @property
    def d_kv(self) -> int:
        return self.d_attn // self.num_heads
