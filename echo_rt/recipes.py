"""Recipes: how each published checkpoint is sampled by those who made it, as one table. Knows no torch.

Weights do not say how they want to be sampled, and the wrong way gives a video all the same, a worse one. The values
are those of the publishers' own configurations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echo_rt.errors import ConfigError, not_one_of

LONGVIDEO_FILE = "longvideo.pt"  # Causal-Forcing's, which runs by none of the recipes


@dataclass(frozen=True)
class PublishedFile:
    """A file on the Hugging Face hub: repository ``hub``, ``path`` in it (None for all of the repository).

    ``role``: the option that takes it. ``known_by``: how a path ends that is taken for this file where no recipe is
    named; None for a name that says too little.
    """

    hub: str
    path: str | None
    role: Literal["model", "checkpoint", "lora"]
    known_by: str | None = None

    @property
    def download(self) -> str:
        """The command that fetches it, into a folder of the repository's name."""
        path = "" if self.path is None else f" {self.path}"
        return f"hf download {self.hub}{path} --local-dir {self.hub.rpartition('/')[2]}"


@dataclass(frozen=True)
class Recipe:
    """The way a checkpoint is sampled.

    ``facts``: of the rollout, by the names in :data:`echo_rt.options.OVERRIDES`. ``files``: what is published, without
    Wan2.1 itself. ``ema``: whether the publisher runs the averaged weights. ``normalize_k``: whether the published
    memory encoder normalizes its keys, None without one. ``notes``: where ours differs from the publisher's program, or
    goes on where that one ends.
    """

    name: str
    facts: Mapping[str, Any]
    files: tuple[PublishedFile, ...]
    ema: bool = False
    normalize_k: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def memory(self) -> Literal["required", "absent"]:
        """Whether there must be a memory encoder or must be none."""
        return "absent" if self.normalize_k is None else "required"

    @property
    def lora(self) -> bool:
        """Whether a LoRA is merged into the checkpoint."""
        return any(file.role == "lora" for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """Every value in plain JSON types."""
        files = [
            {"hub": file.hub, "path": file.path, "option": file.role, "download": file.download}
            for file in (BASE, *self.files)
        ]
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in self.facts.items()}
        more = {"facts": facts, "memory": self.memory, "lora": self.lora, "files": files, "notes": list(self.notes)}
        return {**vars(self), **more}


BASE = PublishedFile("Wan-AI/Wan2.1-T2V-1.3B", None, "model")
_ECHO_INFINITY = "Echo-Team/Echo-Infinity"
_CAUSAL_FORCING = "zhuhz22/Causal-Forcing"
_LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"
_OPSD_V = "MeiGen-AI/OPSD-V"
_PHYMOTION = "PhyMotion-CausalForcing-1.3B"

_FOUR_STEPS = (1000, 750, 500, 250)
_SHARED: dict[str, Any] = {  # by most recipes
    "frames_per_block": 3,
    "sink_frames": 3,
    "local_frames": 9,
    "max_temporal_id": 20,
    "denoising_steps": _FOUR_STEPS,
    "first_block_steps": (),
    "timestep_shift": 5.0,
    "context_timestep": 0.0,
    "recache_sink": False,
}
_ALL_OF_21 = {"sink_frames": 0, "local_frames": 21, "max_temporal_id": 1023}  # a window of the trained length
_RELATIVE = _SHARED | {"max_temporal_id": 11}  # ids are places in the window
_ECHO_NOTE = (
    "the publisher's program makes 21 latent frames and no prompt switch; past frame 20 nothing is published: "
    "ours goes on with bounded ids, and the memory reads keys rotated by them"
)
_NO_SWITCH = "the publisher has no prompt switch; ours makes the keys of the whole window anew"
_FORCING_NOTES = (
    "the publisher's program makes 21 latent frames (81 of video) at most; what follows is our rolling window",
    _NO_SWITCH,
)
_ABSOLUTE_NOTE = (
    "positions are absolute up to frame 1023, where the publisher's program ends; ours goes on with bounded ids"
)
_LONGLIVE_FACTS = _SHARED | {"recache_sink": True}
_LONGLIVE_FILES = (
    PublishedFile(_LONGLIVE, "models/longlive_base.pt", "checkpoint", known_by="longlive_base.pt"),
    PublishedFile(_LONGLIVE, "models/lora.pt", "lora"),
)


def _forcing(name: str, hub: str, folder: str, known_by: str, *, ema: bool = True, **facts: Any) -> Recipe:
    """A recipe without sink and memory: a window as long as what the publisher makes, and absolute positions."""
    file = PublishedFile(hub, f"{folder}{known_by}", "checkpoint", known_by)
    return Recipe(name, _SHARED | _ALL_OF_21 | facts, (file,), ema, notes=_FORCING_NOTES)


def _few_steps(*steps: int) -> Recipe:
    name, file = f"causal-forcing-framewise-{len(steps)}step", f"framewise-{len(steps)}step.pt"
    facts: dict[str, Any] = {"frames_per_block": 1, "denoising_steps": steps, "first_block_steps": _FOUR_STEPS}
    return _forcing(name, _CAUSAL_FORCING, "causal-forcing++/", file, **facts)


def _self_gradient(kind: str, **facts: Any) -> Recipe:
    path = f"{kind}/ar/model.pt"
    file = PublishedFile("JunhaoZhuang/Self_Gradient_Forcing", path, "checkpoint", path)
    return Recipe(f"self-gradient-forcing-{kind}", _SHARED | facts, (file,), ema=True, notes=(_NO_SWITCH,))


def _opsd_v(base: str, checkpoint: str) -> Recipe:
    """A recipe known by its LoRA: the base below it is another publisher's."""
    lora = f"opsdv_{base.replace('-', '_')}_lora.pt"
    files = (
        PublishedFile(_OPSD_V, f"checkpoints/{checkpoint}", "checkpoint"),
        PublishedFile(_OPSD_V, f"checkpoints/{lora}", "lora", known_by=lora),
    )
    end = "the publisher's program ends at frame 1023, where its table of positions does; ours goes on"
    return Recipe(f"opsd-v-{base}", _RELATIVE, files, notes=(end, _NO_SWITCH))


_TABLE = (
    Recipe(
        "echo-infinity-short",
        _SHARED | {"memory_frames": 3, "memory_reads": "rotated", "rebuild_on_prompt_switch": False},
        (PublishedFile(_ECHO_INFINITY, None, "checkpoint"),),
        normalize_k=True,
        notes=(_ECHO_NOTE,),
    ),
    Recipe(
        "echo-infinity-long",
        _SHARED | {"memory_frames": 3, "memory_reads": "unrotated", "rebuild_on_prompt_switch": True},
        (PublishedFile(_ECHO_INFINITY, None, "checkpoint"), PublishedFile(_ECHO_INFINITY, None, "lora")),
        normalize_k=False,
    ),
    _forcing("self-forcing", "gdhe17/Self-Forcing", "checkpoints/", "self_forcing_dmd.pt"),
    _forcing("causal-forcing-chunkwise", _CAUSAL_FORCING, "", "chunkwise/causal_forcing.pt", ema=False),
    _forcing("causal-forcing-framewise", _CAUSAL_FORCING, "", "framewise/causal_forcing.pt", frames_per_block=1),
    _few_steps(1000, 500),
    _few_steps(1000),
    Recipe("longlive", _LONGLIVE_FACTS | {"max_temporal_id": 1023}, _LONGLIVE_FILES, notes=(_ABSOLUTE_NOTE,)),
    # Of the same files, whose names select the one above.
    Recipe("longlive-infinity", _LONGLIVE_FACTS | {"max_temporal_id": 11}, _LONGLIVE_FILES),
    _self_gradient("chunkwise"),
    _self_gradient("framewise", frames_per_block=1, sink_frames=4, local_frames=17),
    Recipe(
        "rmd",
        _SHARED | _ALL_OF_21 | {"frames_per_block": 1},
        (PublishedFile("cjeen/RMD", "stage2/model.pt", "checkpoint", known_by="RMD/stage2/model.pt"),),
        notes=(_ABSOLUTE_NOTE, _NO_SWITCH),
    ),
    _opsd_v("longlive", "longlive_base.pt"),
    _opsd_v("self-forcing", "self_forcing_dmd_ema_as_generator.pt"),
    Recipe(
        "phymotion",
        _RELATIVE,
        (
            PublishedFile(_CAUSAL_FORCING, "chunkwise/causal_forcing.pt", "checkpoint"),
            PublishedFile(f"6kplus/{_PHYMOTION}", None, "lora", known_by=_PHYMOTION),
        ),
        notes=(
            "published videos have 45 frames, which fill the window once; past them ours follows the published code",
            "the publisher's program empties most of the window between scenes; our prompt switch makes its keys anew",
        ),
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}


def find_recipe(name: object, source: str = "recipe") -> Recipe:
    """The recipe called ``name``; :class:`ConfigError`, which begins with ``source``, names all and the closest."""
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        raise ConfigError(not_one_of(source, RECIPES, name))
    return recipe


def published_as(*paths: str | Path) -> tuple[Recipe, str] | None:
    """The recipe of the first of ``paths`` that ends as a published file's, and that end; None for any others."""
    known = [(recipe, file.known_by) for recipe in RECIPES.values() for file in recipe.files if file.known_by]
    # Not resolved: in a hub's cache the name is a link to a file called by its digest.
    for parts in (Path(os.path.abspath(path)).parts for path in paths):
        for recipe, name in known:
            if parts[-len(Path(name).parts) :] == Path(name).parts:
                return recipe, name
    return None
