"""The library's sentences in the words of the command line: options where it names parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping

OTHER_NAMES = {
    "spans": "--span",
    "latency_images": "--measure-latency",
    "batch": "--fixed-batch",
    "column": "--text-column",
    "dtype": "--weights",
    "export_plain": "--plain",
    "export_hub": "--hub",
    "export_onnx": "--onnx",
    "export_program": "--pt2",
}
"""Parameters of the library whose options have another name, and functions that are options."""


def option_names(parameters: Iterable[inspect.Parameter]) -> dict[str, str]:
    """Of a command's parameters, the option of each by the name that the library has for it."""
    names = {}
    for parameter in parameters:
        for told in getattr(parameter.annotation, "__metadata__", ()):
            texts = (getattr(told, "default", None), *(getattr(told, "param_decls", None) or ()))
            long = [text for text in texts if isinstance(text, str) and text.startswith("--")]
            if long:
                names[parameter.name] = long[0]
    known = set(names.values())
    if "--from" in known:  # what a sweep lacks is asked of the command that made it
        known.add("--measure-latency")
    return {name: text for name, text in OTHER_NAMES.items() if text in known} | names


def as_options(text: str, names: Mapping[str, str]) -> str:
    """``text`` with options in the place of parameters.

    The library writes a parameter as ``name=`` or ``name=value``; a name with an underscore can
    be nothing else; and a name that begins a sentence, before a number or "must be", is one.

    >>> as_options("max_drop 1 is too little; give limit=512 or force_budget=True",
    ...            {n: "--" + n.replace("_", "-") for n in ("max_drop", "limit", "force_budget")})
    '--max-drop 1 is too little; give --limit 512 or --force-budget'
    """
    if not names:
        return text
    either = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    text = re.sub(rf"(?<![\w-])({either})= \((--[\w-]+)\)", lambda found: names[found[1]], text)
    text = re.sub(rf"(?<![\w-])({either})=True\b", lambda found: names[found[1]], text)
    text = re.sub(
        rf"(?<![\w-])({either})=(?=[\w'\"\[(.])", lambda found: f"{names[found[1]]} ", text
    )
    text = re.sub(rf"(?<![\w-])({either})=", lambda found: names[found[1]], text)
    text = re.sub(
        rf"^({either})(?= [\d.]+%?(?![\w.])| must be )", lambda found: names[found[1]], text
    )
    long = [name for name in names if "_" in name]
    for name in sorted(long, key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){name}(?!\w)", names[name], text)
    return text
