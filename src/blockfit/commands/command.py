"""How a command is declared: groups of options become options, and what all commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

from blockfit import processes
from blockfit.commands import options as opt
from blockfit.commands.help import Declared, HelpAll
from blockfit.commands.output import Output, start_logging
from blockfit.commands.wording import as_options, option_names
from blockfit.errors import BlockfitError


@dataclass(frozen=True)
class Common:
    """The options of every command."""

    as_json: opt.Json = False
    quiet: opt.Quiet = False
    verbose: opt.Verbose = False
    debug: opt.Debug = False
    help_all: Annotated[bool, HelpAll] = False


def command(
    group: str, example: str, old: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function one that typer reads: its options flat, groups among them.

    A parameter whose type is a dataclass stands for one option per field. The first parameter is
    the ``Output``, made from the options that all commands share. Several processes join for the
    duration; help and refused options come before that, and without torch.
    """
    declared = Declared(group, example, old or {})
    return lambda body: _flat(body, declared)


def _flat(body: Callable[..., None], declared: Declared) -> Callable[..., None]:
    hints = get_type_hints(body, include_extras=True)
    own = list(inspect.signature(body).parameters.values())[1:]
    groups = {p.name: hints[p.name] for p in own if is_dataclass(hints[p.name])}
    flat: list[inspect.Parameter] = []
    for parameter in own:
        if parameter.name in groups:
            flat += _options(groups[parameter.name])
        else:
            flat.append(
                parameter.replace(
                    annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY
                )
            )
    flat += _options(Common)
    names = option_names(flat)

    def run(**values: Any) -> None:
        common = _taken(Common, values)
        whole = {name: _taken(group, values) for name, group in groups.items()}
        if common.verbose:
            start_logging()
        with _in_words_of(names):
            for group in whole.values():
                if (check := getattr(group, "check", None)) is not None:
                    check()
            with processes.joined():
                out = Output(common.as_json, common.quiet, common.verbose, names)
                body(out, **values, **whole)

    run.__name__, run.__doc__, run.__module__ = body.__name__, body.__doc__, body.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    run.__dict__["__signature__"] = inspect.Signature(flat)
    run.__dict__["declared"] = declared
    return run


@contextmanager
def _in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """An error of the library names options where it named parameters."""
    try:
        yield
    except BlockfitError as error:
        told = as_options(str(error), names)
        if told == str(error):
            raise
        raise BlockfitError(told) from error


def _options(group: Any) -> list[inspect.Parameter]:
    """One keyword per field of a group, with the field's default."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _taken(group: Any, values: dict[str, Any]) -> Any:
    """The group's value, its fields taken out of ``values``."""
    return group(**{field.name: values.pop(field.name) for field in fields(group)})
