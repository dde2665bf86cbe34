"""``blockfit doctor``: what is installed, what is missing and how to get it."""

from __future__ import annotations

from blockfit.commands import options as opt
from blockfit.commands.installed import examine
from blockfit.commands.output import Output


def doctor(
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Show versions, devices, caches, and what is missing for each extra."""
    out = Output(as_json, quiet)
    found = examine()
    out.line(f"Python {found.python} on {found.platform}")
    out.table(
        ("package", "installed", "asked for"),
        [(p.name, p.installed or "–", p.wanted or "–") for p in found.packages],
    )
    out.table(
        ("extra", "missing", "command"),
        [
            (e.name, ", ".join(e.missing) or "nothing", e.command if e.missing else "")
            for e in found.extras
        ],
    )
    out.table(("device", "what it is"), [(d.name, d.description) for d in found.devices])
    out.table(
        ("cache", "folder", "there"),
        [(c.what, c.path, "yes" if c.exists else "not yet") for c in found.caches],
    )
    hub = "only cached files are used (HF_HUB_OFFLINE is set)" if found.offline else "may be asked"
    out.line(f"torch computes with {found.threads} threads; the Hub {hub}")
    out.result(found.to_json())
