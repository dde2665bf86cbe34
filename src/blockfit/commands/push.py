"""The command ``push``: an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from blockfit.commands import options as opt
from blockfit.commands.output import Output
from blockfit.formats.exported_folder import push_folder


def push(
    folder: opt.ExportedFolder,
    repository: opt.Repository,
    private: opt.Private = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Upload a folder that export --plain or --hub wrote to the Hugging Face Hub."""
    out = Output(as_json, quiet)
    with out.working():
        out.say(f"uploading {folder} to {repository}")
        url = push_folder(Path(folder), repository, private=private, overwrite=overwrite)
    out.line(f"{folder} is at {url}")
    out.result({"folder": str(folder), "repository": repository, "url": url, "private": private})
