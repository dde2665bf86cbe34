"""Whether the Hugging Face Hub answers, asked briefly before a library would try and wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATIENCE = 5.0
"""Seconds that the Hub has to answer."""


def silent() -> bool:
    """Whether the Hub does not answer one request; false where it is switched off or not needed.

    The libraries repeat a failed request several times, which takes them about 20 seconds per
    file and prints a line each time. The endpoint, the proxies and the offline switch are those
    of huggingface_hub; none of its settings is changed.
    """
    try:
        from huggingface_hub import constants, get_session
    except ImportError:
        return False
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # its HTTP client has changed, and with it the class of what is raised
        return True
    return False


def only_cached(options: Mapping[str, Any]) -> dict[str, bool]:
    """What keeps transformers from asking a Hub that does not answer; nothing where it does."""
    return {} if "local_files_only" in options or not silent() else {"local_files_only": True}


_OTHER_WEIGHTS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


def need(config: Any, options: Mapping[str, Any]) -> None:
    """Raise OSError where timm would wait in vain for the weights that ``config`` names."""
    if not config.hf_hub_id or _OTHER_WEIGHTS & options.keys():
        return
    from huggingface_hub import try_to_load_from_cache

    own = config.hf_hub_filename
    files = (own,) if own else ("model.safetensors", "pytorch_model.bin")
    cache = options.get("cache_dir")
    cached = (try_to_load_from_cache(config.hf_hub_id, name, cache_dir=cache) for name in files)
    if not any(isinstance(path, str) for path in cached) and silent():
        raise OSError("the Hugging Face Hub does not answer")
