"""The choice of a recipe for a model's files, and a record of what was taken, shown in one line and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echo_rt.config import MemoryConfig
from echo_rt.errors import ConfigError
from echo_rt.options import RECIPE
from echo_rt.recipes import LONGVIDEO_FILE, RECIPES, Recipe, find_recipe, published_as
from echo_rt.weights.generator import GeneratorTensors, holds_memory
from echo_rt.weights.lora import open_lora
from echo_rt.weights.tensors import TensorFile

TAKEN = "taken"  # the fact of a snapshot's model: Taken as plain JSON types
_LONGVIDEO = (
    "has the name of a checkpoint for Rolling-Forcing, a window of four blocks at different noise levels, "
    "which is none of the recipes"
)
_WINDOW = {"frames_per_block", "sink_frames", "local_frames", "max_temporal_id"}


@dataclass(frozen=True)
class Choice:
    """A recipe, or None where facts of a folder or a snapshot stand in its place; ``reason``: why this one.

    ``by``: who says so, ``"caller"``, ``"snapshot"``, ``"folder"`` or ``"files"``.
    """

    recipe: Recipe | None
    reason: str
    by: Literal["caller", "snapshot", "folder", "files"]

    def facts(self, of_folder: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's, and on top those of the folder, unless they belong to another recipe than this one."""
        if self.recipe is None:
            return dict(of_folder)
        if self.recipe.name != of_folder.get(RECIPE, None if _is_whole(of_folder) else self.recipe.name):
            of_folder = {name: value for name, value in of_folder.items() if name in ("width", "height")}
        return {**self.recipe.facts, **of_folder}

    def check_memory(self, there: bool, source: str) -> None:
        """Raise :class:`ConfigError` where ``source`` lacks a memory encoder that the recipe needs, or the reverse.

        A recipe that a folder names runs without: the folder cannot know which checkpoint is given. A snapshot states
        its memory itself.
        """
        lenient = self.by == "snapshot" or (self.by == "folder" and not there)
        if self.recipe is None or lenient or there == (self.recipe.memory == "required"):
            return
        needs, has = ("has no memory", "a memory encoder") if there else ("needs a memory encoder", "none")
        raise ConfigError(
            f"recipe {self.recipe.name!r} {needs}, and {source} has {has}: expected the files of this recipe, "
            "or memory 'off'"
        )


@dataclass(frozen=True)
class Taken:
    """The recipe, weights and LoRAs that a model was made of, and the reasons.

    ``ema``: whether the weights are the checkpoint's averaged ones, None of a checkpoint without parts, or of none.
    ``loras``: file and strength of each. ``cautions``: differences from the files that the recipe is made for.
    """

    recipe: str | None
    recipe_reason: str
    ema: bool | None
    ema_reason: str
    model: str
    checkpoint: str | None
    loras: tuple[tuple[str, float], ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """Everything but the cautions, in one line."""
        weights = {True: "the EMA weights", False: "the plain weights", None: "the weights"}[self.ema]
        loras = "".join(f", with the LoRA {file} at strength {strength:g}" for file, strength in self.loras)
        checkpoint = "" if self.checkpoint is None else f" of {self.checkpoint} ({self.ema_reason})"
        if self.recipe is None:
            return f"model {self.model}: {weights}{checkpoint}{loras}, sampled as its config.json says"
        where = f" of {self.model}{loras}" if self.checkpoint is None else f"{checkpoint}{loras}, in {self.model}"
        return f"recipe {self.recipe} ({self.recipe_reason}): {weights}{where}"

    def for_snapshots(self) -> dict[str, Any]:
        """The entries that a stream resumed from a snapshot shares: all but the reason for the recipe."""
        return {name: value for name, value in self.as_json().items() if name != "recipe_reason"}

    def as_json(self) -> dict[str, Any]:
        """Everything but the cautions, in plain JSON types."""
        plain = {name: value for name, value in vars(self).items() if name != "cautions"}
        return {**plain, "loras": [{"file": file, "strength": strength} for file, strength in self.loras]}


def choose_recipe(
    named: str | None,
    of_folder: Mapping[str, Any],
    snapshot: Mapping[str, Any] | None,
    checkpoint: TensorFile | None,
    loras: Sequence[tuple[Path, float]],
    model: str | Path,
) -> Choice:
    """The recipe that the caller, the snapshot to go on with or the folder names, or else the one that the files tell.

    ``snapshot``: how it describes its model; ``of_folder``: the object ``echo_rt`` of the folder's config.

    Errors: ``ConfigError``, with the names of all recipes, where nothing tells which one it is.
    """
    if named is not None:
        return Choice(find_recipe(named), "asked for by name", "caller")
    if snapshot is not None:
        before = snapshot.get(TAKEN)
        name = before.get(RECIPE) if isinstance(before, dict) else None
        if name is None:
            return Choice(None, "as in the snapshot, which names none", "snapshot")
        return Choice(find_recipe(name, "the snapshot's recipe"), "as in the snapshot", "snapshot")
    if checkpoint is not None and checkpoint.path.name == LONGVIDEO_FILE:
        raise _unknown(f"{checkpoint.path} {_LONGVIDEO}")
    if RECIPE in of_folder:
        source = f"{model}: echo_rt in config.json: {RECIPE}"
        return Choice(find_recipe(of_folder[RECIPE], source), "the folder names it", "folder")
    if _is_whole(of_folder):
        return Choice(None, "the folder's config.json describes all of it", "folder")
    if checkpoint is None:
        raise _unknown(f"nothing says how {model} is sampled, a stock Wan2.1 without a checkpoint that is distilled")
    if any(holds_memory(open_lora(path)) for path, _ in loras):
        return Choice(RECIPES["echo-infinity-long"], "the LoRA has a memory encoder", "files")
    if holds_memory(checkpoint):
        return Choice(RECIPES["echo-infinity-short"], "the checkpoint has a memory encoder", "files")
    # A LoRA says more than the base below it, which several share.
    published = published_as(*(path for path, _ in loras), checkpoint.path)
    if published is not None:
        return Choice(published[0], f"{published[1]} is published under this name", "files")
    raise _unknown(f"neither tensors nor name of {checkpoint.path} tell how it is sampled")


def _is_whole(of_folder: Mapping[str, Any]) -> bool:
    """Return whether a folder states its whole window, as folders from before recipes do."""
    return of_folder.keys() >= _WINDOW


def _unknown(why: str) -> ConfigError:
    return ConfigError(f"{why}: expected a recipe by name, one of {', '.join(RECIPES)} (echo-rt recipes shows them)")


def ema_reason(asked: bool | None, recipe: Recipe | None, generator: GeneratorTensors | None) -> str:
    """The reason why these weights of a checkpoint were taken."""
    if generator is None:
        return "no checkpoint"
    if generator.ema is None:  # a bare file does not say which its weights are
        return "it has no others" + (", the recipe's are the EMA weights" if recipe is not None and recipe.ema else "")
    if asked is not None:
        return "asked for"
    if recipe is None:
        return "it has them" if generator.ema else "it has no EMA weights"
    if generator.ema == recipe.ema:
        return "as in the recipe"
    return f"it has no others, the recipe's are the {'EMA weights' if recipe.ema else 'plain ones'}"


def cautions(
    recipe: Recipe | None,
    checkpoint: TensorFile | None,
    lora: bool,
    memory: MemoryConfig | None,
    *,
    memory_is_asked: bool,
) -> tuple[str, ...]:
    """Differences between the files and those that the recipe is published for, where it can run them all the same.

    ``lora``: whether there is one; ``memory_is_asked``: whether the caller has said what the memory does.
    """
    if recipe is None:
        return ()
    found = []
    if checkpoint is not None and checkpoint.path.name == LONGVIDEO_FILE:
        found.append(f"{checkpoint.path} {_LONGVIDEO}")
    if recipe.lora and recipe.memory == "absent" and not lora:
        found.append(f"recipe {recipe.name} is published with a LoRA, and none is given")
    if recipe.memory == "required" and memory is None and not memory_is_asked:
        found.append(f"recipe {recipe.name} is made for a memory encoder, and there is none: it runs without")
    if memory is not None and recipe.normalize_k is not None and memory.normalize_k != recipe.normalize_k:
        words = {True: "normalizes", False: "does not normalize"}
        found.append(
            f"the memory encoder of recipe {recipe.name} {words[recipe.normalize_k]} its keys, "
            f"this one {words[memory.normalize_k]} them"
        )
    return tuple(found)
