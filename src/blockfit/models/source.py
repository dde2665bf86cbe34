"""Where a model came from, as a value that is printed, saved and read back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from blockfit.arguments import one_of
from blockfit.errors import BlockfitError
from blockfit.fields import LEFT_OUT, read
from blockfit.models.preprocessing import Preprocessing

LIBRARIES = ("timm", "transformers", "torchvision", "open_clip", "demo", "module")
"""Where an architecture can come from; ``module`` is a user's own class."""


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Args:
        library: one of ``LIBRARIES``.
        arguments: JSON values that rebuild the architecture (see ``skeleton``).
        licence: of the weights, where the checkpoint says.
        preprocessing: its own, where known.
        passed_on: modules of the library's model in whose place an ``nn.Identity`` stands, such as
            the head of a model that gives features.
    """

    library: str
    name: str
    arguments: dict[str, Any]
    licence: str | None = None
    preprocessing: Preprocessing | None = None
    passed_on: tuple[str, ...] = field(default=(), metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        one_of("library", self.library, LIBRARIES)
        if not all(self.passed_on):
            raise BlockfitError("passed_on must name modules, not the model itself")

    @property
    def loads_as(self) -> str | None:
        """What ``blockfit.load`` and the command line take for it; ``None`` for a user's module."""
        if self.library == "module":
            return None
        prefix = {"timm": "timm/", "torchvision": "torchvision/"}.get(self.library, "")
        if Path(self.name).is_dir():
            return self.name
        return self.name if self.name.startswith(prefix) else prefix + self.name

    def to_json(self) -> dict[str, Any]:
        """The source as plain JSON values."""
        return {
            "library": self.library,
            "name": self.name,
            "arguments": self.arguments,
            "licence": self.licence,
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
            **({"passed_on": [*self.passed_on]} if self.passed_on else {}),
        }

    @classmethod
    def from_json(cls, value: object, where: str = "base") -> Source:
        """Read what ``to_json`` wrote; ``where`` names the place in messages."""
        return read(cls, value, where)


_LOADS = re.compile(
    "auto_map|custom_pipelines|trust_remote_code|code_revision|use_kernels|kernel_config"
    "|allow_all_kernels|.*(attn|experts)_implementation.*"
)
"""Keys of a transformers config that name code to fetch and run, or choose a kernel."""

_TIMM_LOADS = re.compile(
    "pretrained.*|checkpoint_path|cache_dir|pruned|scriptable|exportable|no_jit"
    "|model_cfg|feature_cfg|kwargs_filter|url|file|state_dict|hf_hub_id|hf_hub_filename"
)
"""Options of timm's ``create_model`` that read files or the network, or are none of a model's."""

ATTENTIONS = ("eager", "sdpa")
"""What a saved transformers model may compute attention with; the rest depend on the machine."""


def attention_of(config: Any) -> str | dict[str, Any] | None:
    """What a transformers config computes attention with, as ``attn_implementation`` takes it.

    One of ``ATTENTIONS``, a mapping where its parts (a backbone, a tower) differ from the whole,
    or ``None`` where it cannot be saved.
    """
    own = getattr(config, "_attn_implementation", None)
    if own not in ATTENTIONS:
        return None
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    inner = {name: attention_of(part) for name, part in parts.items()}
    different = {name: value for name, value in inner.items() if value not in (None, own)}
    return {"": own, **different} if different else cast(str, own)


def check_attention(value: object) -> None:
    """Refuse an attention that ``attention_of`` does not give."""
    if isinstance(value, Mapping):
        for part in value.values():
            check_attention(part)
    elif value not in (None, *ATTENTIONS):
        raise BlockfitError(f"unknown attention {value!r}; choose {' or '.join(ATTENTIONS)}")


def without_loading(config: Any) -> Any:
    """A transformers config without the keys that ``check_config`` refuses, at any depth."""
    if isinstance(config, Mapping):
        kept = {k: without_loading(v) for k, v in config.items() if not _LOADS.fullmatch(str(k))}
        return {k: False if k == "use_pretrained_backbone" else v for k, v in kept.items()}
    if isinstance(config, list | tuple):
        return [without_loading(value) for value in config]
    return config


def check_config(config: object) -> None:
    """Refuse a transformers config that would fetch or run anything while a model is built.

    A config that wraps a timm model is held to ``check_timm``, at any depth.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if _LOADS.fullmatch(str(key)) or (key == "use_pretrained_backbone" and value):
                raise BlockfitError(
                    f"config: {key!r} could fetch or run code or weights that are not in the "
                    "folder; take it out of the folder's files if you trust their author"
                )
            if key in ("architecture", "backbone") and isinstance(value, str):
                check_timm(value.partition(".")[0], {})
            if key in ("model_args", "backbone_kwargs"):
                check_timm("model", value or {})
            check_config(value)
    elif isinstance(config, list | tuple):
        for value in config:
            check_config(value)


_FETCHES = re.compile("use_kernels|kernel_config|allow_all_kernels|custom_pipelines")


def check_original(config: object) -> None:
    """Refuse a folder's transformers config that would have transformers ask the Hub for more.

    Backbones named there by their Hub id, and kernels, which are compiled code. What merely
    describes the model stays free: its weights are in the folder.
    """
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        chooses = key == "backbone" or str(key).endswith(("attn_implementation", "_implementation"))
        if (chooses and "/" in str(value)) or (_FETCHES.fullmatch(str(key)) and value):
            raise BlockfitError(
                f"config.json: {key!r} would have the Hub asked for {value!r:.80}, and no name "
                "was given; take it out, or allow it with "
                "trust_remote_code=True if you trust the folder's author"
            )
        check_original(value)


def check_timm(architecture: object, options: object) -> None:
    """Refuse what would make timm read files or the network while it builds a model.

    Raises:
        BlockfitError: where the architecture is no bare name, or names the option.
    """
    if not isinstance(architecture, str) or not re.fullmatch(r"\w+", architecture):
        raise BlockfitError(
            f"{architecture!r} is not the bare name of a timm architecture; a saved folder may "
            "name no other place to load one from"
        )
    if not isinstance(options, Mapping):
        raise BlockfitError(f"the options of {architecture} must be an object, got {options!r}")
    if loading := [key for key in options if _TIMM_LOADS.fullmatch(str(key))]:
        raise BlockfitError(
            f"timm's option {loading[0]!r} is not part of an architecture; a saved folder may not "
            "hold it, since its weights are all in the folder"
        )


MOST_TENSORS = 5_000
"""Parameters of a model built from somebody's file, counted when made and when they get values.

The largest vision transformers have about 1,000.
"""


@contextmanager
def bounded() -> Iterator[None]:
    """Models are built within limits: a number in a file must not take hours or all memory.

    Raises:
        BlockfitError: where more than ``MOST_TENSORS`` parameters are made.
    """
    made = 0
    linspace = torch.linspace

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 1
        if made > MOST_TENSORS:
            raise _too_large()

    def schedule(start: Any, end: Any, steps: int, **options: Any) -> torch.Tensor:
        """Stochastic depth's: one step per block, values read out of it."""
        if isinstance(steps, int) and steps > MOST_TENSORS:
            raise _too_large()
        return linspace(start, end, steps, **options)

    hook = register_module_parameter_registration_hook(count)
    torch.linspace = cast(Any, schedule)
    try:
        yield
    finally:
        torch.linspace = linspace
        hook.remove()


def _too_large() -> BlockfitError:
    return BlockfitError(
        f"it describes a model of more than {MOST_TENSORS} blocks or parameters; the numbers in "
        "the file are wrong"
    )


def attach(model: nn.Module, source: Source) -> None:
    """Remember ``source`` on the model; it survives ``deepcopy`` and is not in the state dict."""
    model.blockfit_source = source  # type: ignore[assignment]


def licence_of(folder: Path) -> str | None:
    """The licence that a model card in ``folder`` names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    header = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    line = header and re.search(r"^license:[ \t]*['\"]?([^'\"\n]+)", header.group(1), re.MULTILINE)
    return line.group(1).strip() if line else None
