"""The report's charts, drawn by matplotlib into self-contained SVG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ferrovae.report.pictures import INSTALL

INK, BLUE, ORANGE, GREY, RED = "#1f2933", "#2f6fb2", "#d9822b", "#9aa5b1", "#c0392b"


def chart(draw: Callable[..., None], *, panels: int = 1, size: tuple[float, float] = (4.6, 2.9)) -> str:
    """An SVG of `panels` axes side by side, handed to `draw`."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(INSTALL) from None
    style: Any = {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "svg.hashsalt": "ferrovae",
    }
    with rc_context(style):
        figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def training_curves(metrics: Sequence[dict[str, Any]]) -> str:
    """ELBO, reconstruction and KL against the epoch, training and validation."""

    def draw(*axes: Any) -> None:
        for axis, (key, title) in zip(
            axes, (("elbo", "ELBO"), ("reconstruction", "Reconstruction"), ("kl", "KL")), strict=True
        ):
            for split, colour, marker in (("train", GREY, ""), ("validation", BLUE, "o")):
                points = [(line["epoch"], line[key]) for line in metrics if line.get("split") == split and key in line]
                if points:
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.4, label=split)
            axis.set_title(title)
            axis.set_xlabel("epoch")
        axes[0].set_ylabel("nats per image")
        axes[0].legend(loc="lower right")

    return chart(draw, panels=3, size=(3.4, 2.6))


def log_px_histogram(log_px: torch.Tensor, elbo: torch.Tensor, name: str) -> str:
    """The images' log p(x), with their ELBO beside it."""

    def draw(axis: Any) -> None:
        both = torch.cat([log_px, elbo])
        low, high = float(both.min()), float(both.max())
        bins = [low + (high - low) * step / 30 for step in range(31)] if high > low else 1
        axis.hist(elbo.tolist(), bins=bins, color=ORANGE, alpha=0.45, label="ELBO")
        axis.hist(log_px.tolist(), bins=bins, color=BLUE, alpha=0.65, label=name)
        axis.axvline(float(log_px.mean()), color=BLUE, linewidth=1)
        axis.axvline(float(elbo.mean()), color=ORANGE, linewidth=1)
        axis.set_xlabel("nats per image (lines: means)")
        axis.set_ylabel("images")
        axis.legend(loc="upper left")

    return chart(draw)


def khat_scatter(log_px: torch.Tensor, khat: torch.Tensor, good: float) -> str:
    """Pareto k-hat of each image against its log p(x); above the lower line no standard error is given."""

    def draw(axis: Any) -> None:
        shown = khat.isfinite()
        colours = [BLUE if value <= good else ORANGE if value <= 1 else RED for value in khat[shown].tolist()]
        axis.scatter(log_px[shown].tolist(), khat[shown].tolist(), s=9, c=colours, linewidths=0, alpha=0.8)
        axis.axhline(good, color=ORANGE, linewidth=1, linestyle="--")
        axis.axhline(1.0, color=RED, linewidth=1, linestyle="--")
        axis.set_xlabel("log p(x), nats")
        axis.set_ylabel("Pareto k-hat")

    return chart(draw)


def unit_variances(variances: torch.Tensor, threshold: float) -> str:
    """Var_x(E_q[z_d|x]) of every latent dimension, largest first; those above the line are active."""

    def draw(axis: Any) -> None:
        ordered = variances.flatten().double().sort(descending=True).values.clamp_min(1e-9).tolist()
        axis.bar(range(len(ordered)), ordered, color=[BLUE if value > threshold else GREY for value in ordered])
        axis.axhline(threshold, color=RED, linewidth=1, linestyle="--")
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(min(ordered) / 3, 1e-7))
        axis.set_xlabel("latent dimension, by variance")
        axis.set_ylabel("variance of the posterior mean")

    return chart(draw)


def code_usage(counts: torch.Tensor) -> str:
    """The share of every code, most used first; the line is the share if all were used alike."""

    def draw(axis: Any) -> None:
        share = (counts.double() / max(int(counts.sum()), 1)).sort(descending=True).values.tolist()
        axis.bar(range(len(share)), share, width=1.0, color=BLUE)
        axis.axhline(1 / len(share), color=RED, linewidth=1, linestyle="--")
        axis.set_xlabel("code, by use")
        axis.set_ylabel("share of positions")

    return chart(draw)
