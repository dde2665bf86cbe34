"""``blockfit push``: an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockfit.commands import options as opt
from blockfit.commands.command import command
from blockfit.commands.output import Output

Exported = Annotated[Path, typer.Argument(help="That export --plain or --hub wrote.")]
Repository = Annotated[str, typer.Argument(help="Where to, as owner/name.")]
Private = Annotated[bool, opt.option("--private", "Where the repository is new.", opt.OUT)]


@command("Deploy", "blockfit push stock/ OWNER/NAME")
def push(
    out: Output,
    folder: Exported,
    repository: Repository,
    private: Private = False,
    overwrite: opt.Overwrite = False,
    base_model: opt.BaseModel = None,
    license: opt.License = None,
) -> None:
    """Upload an exported folder to the Hugging Face Hub."""
    from blockfit.formats.exported_folder import push_folder

    card: dict[str, str | None] = {"base_model": base_model, "license": license}
    with out.working():
        out.say(f"uploading {folder} to {repository}")
        url = push_folder(folder, repository, private=private, overwrite=overwrite, **card)
    out.line(f"{folder} is at {url}")
    out.result({"folder": str(folder), "repository": repository, "url": url, "private": private})
