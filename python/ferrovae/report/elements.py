"""Small pieces of HTML. Text goes in through `text`, which escapes it; everything else here is ours."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import torch

from ferrovae.report import pictures


def text(value: object) -> str:
    """A value as escaped text."""
    return html.escape(str(value), quote=True)


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Big numbers with a line of explanation each: (number, what it is)."""
    inner = "".join(
        f'<div class="tile"><b>{text(number)}</b><span>{text(what)}</span></div>' for number, what in values
    )
    return f'<div class="tiles">{inner}</div>'


def card(title: str, body: str, note: str = "", *, wide: bool = False) -> str:
    """A titled box around HTML `body`, with a sentence below."""
    below = f"<p>{text(note)}</p>" if note else ""
    return f'<div class="card{" wide" if wide else ""}"><h3>{text(title)}</h3>{body}{below}</div>'


def chart(uri: str, alt: str) -> str:
    """A chart that fills its card."""
    return f'<img class="chart" src="{uri}" alt="{text(alt)}">'


def picture(pixels: torch.Tensor, width: int, alt: str) -> str:
    """Pixels [H, W, 3] shown `width` browser pixels wide, without smoothing."""
    return f'<img class="pixels" src="{pictures.png(pixels)}" width="{width}" alt="{text(alt)}">'


def rows(pairs: Sequence[tuple[str, str]]) -> str:
    """Labelled rows of HTML, one below the other."""
    return (
        '<div class="pair">' + "".join(f"<div>{text(label)}</div><div>{body}</div>" for label, body in pairs) + "</div>"
    )


def captioned(items: Iterable[tuple[str, str]]) -> str:
    """(HTML, caption) side by side."""
    inner = "".join(f"<figure>{body}<figcaption>{text(caption)}</figcaption></figure>" for body, caption in items)
    return f'<div class="row">{inner}</div>'


def table(values: Iterable[tuple[str, object]]) -> str:
    """Two columns: name and value."""
    return (
        "<table>"
        + "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in values)
        + "</table>"
    )
