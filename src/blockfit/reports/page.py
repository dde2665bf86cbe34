"""The report: one self-contained HTML page, and its plots as files."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
from importlib.resources import files
from pathlib import Path

from PIL import Image

from blockfit.errors import BlockfitError, need
from blockfit.files import FileForm, check_file, check_kept, encoded, new_file, write_text
from blockfit.provenance import installed_versions
from blockfit.reports.content import Content
from blockfit.reports.views import all_plots, views
from blockfit.units import number

GENERATOR = "blockfit"
MARK = f'<meta name="generator" content="{GENERATOR}'
"""What a page holds that may be replaced by a newer one."""

FORM = FileForm(None, MARK)

LEGEND = """<ul class="legend" aria-label="Signs">
<li><i></i>kept</li><li><i class="repaired"></i>kept, output weights solved again</li>
<li><i class="span"></i>replaced by a map</li>
<li><i class="narrowed"></i>narrowed; bars: what stays of MLP, values, keys</li></ul>"""


def render(content: Content) -> str:
    """The page as HTML: no request leaves it, and texts from files are nothing but text.

    Raises:
        BlockfitError: where Jinja2 or matplotlib is missing, or the runs do not belong together.
    """
    need("jinja2", "report", "a report")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    pieces = files("blockfit.reports").joinpath("report_page")
    source, style, script = (
        pieces.joinpath(name).read_text("utf-8")
        for name in ("page.html.j2", "style.css", "page.js")
    )
    shown = views(content)
    digest = base64.b64encode(hashlib.sha256(encoded(script)).digest()).decode("ascii")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "drawn": Markup,  # SVG of our own plots: no text from files is in it
        "png": png_data,
        "width": png_width,
        "file": file_name,
        "number": number,
    }
    return environment.from_string(source).render(
        shown,
        title=f"{shown['heading']} – blockfit report",
        generator=f"{GENERATOR} {installed_versions()['blockfit'] or ''}".strip(),
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - likewise
        script_hash=f"sha256-{digest}",
        legend=Markup(LEGEND),  # noqa: S704 - a constant
    )


def png_data(png: bytes) -> str:
    """The address of a picture that lies in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def png_width(png: bytes) -> int:
    """In pixels."""
    return Image.open(io.BytesIO(png)).width


def file_name(name: str) -> str:
    """A file's name without its folders."""
    return name.replace("\\", "/").rpartition("/")[2] or name


def check_report(path: str | Path) -> None:
    """Refuse now what ``write_report`` would refuse at the end of a long run.

    Raises:
        BlockfitError: where ``path`` is taken by something other than an earlier report, or what a
            report needs is not installed.
    """
    for module, name in (("jinja2", "Jinja2"), ("matplotlib", "matplotlib")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BlockfitError(
                f'a report needs {name}, which is not installed; pip install "blockfit[report]"'
            ) from error
    check_file(path, FORM, overwrite=True)


def write_report(content: Content, path: str | Path, pictures: str | Path | None = None) -> None:
    """Write the page, whole or not at all, and with ``pictures`` its plots as PNG and SVG.

    Args:
        path: new, or an earlier report.
        pictures: a folder, made where there is none; files of the same names are replaced.

    Raises:
        BlockfitError: where ``path`` is taken or something cannot be written.
    """
    check_report(path)
    page = render(content)
    with new_file(path, FORM, overwrite=True) as partial:
        write_text(partial, page)
    if pictures is not None:
        write_pictures(content, pictures)


def write_pictures(content: Content, folder: str | Path) -> list[Path]:
    """Every plot as ``NAME.png`` and ``NAME.svg``; the paths that were written.

    Raises:
        BlockfitError: before anything is drawn, where a file of such a name is not an earlier plot.
    """
    target = check_kept(folder)
    plots = all_plots(content)
    for plot in plots:
        plot.check(target)
    written = [path for plot in plots for path in plot.write(target)]
    return [Path(folder) / path.name for path in written]
