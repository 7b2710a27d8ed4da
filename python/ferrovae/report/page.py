"""`report.html`: one self-contained page about one run, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

from ferrovae import __version__
from ferrovae.report import charts, elements, gallery
from ferrovae.report.evaluation import ACTIVE_VARIANCE, Evaluation
from ferrovae.training.checkpoint import replace_file
from ferrovae.training.run import read_metrics


def write(evaluations: Evaluation | Sequence[Evaluation], path: Path | None = None) -> Path:
    """Write the report of one or more evaluated runs; by default `report.html` in the first run's directory.

    The page needs no network and no other file: images are inline, text is escaped.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    chosen = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    target = chosen[0].subject.run_dir / "report.html" if path is None else Path(path)
    replace_file(target, render(chosen))
    return target


def render(evaluations: Sequence[Evaluation]) -> str:
    """The page as a string."""
    style = files("ferrovae.report").joinpath("style.css").read_text(encoding="utf-8")
    several = len(evaluations) > 1
    sections = [_section(evaluation, number, several) for number, evaluation in enumerate(evaluations)]
    links = "".join(f'<a href="#run{number}">{_title(e)}</a>' for number, e in enumerate(evaluations))
    heading = "What the models found" if several else _title(evaluations[0])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ferrovae: {heading}</title><style>{style}</style></head><body><main>"
        f"<h1>{heading}</h1>"
        + (f"<nav>{links}</nav>" if several else "")
        + "".join(sections)
        + f"<footer>ferrovae {elements.text(__version__)}. All values in nats per image, summed over pixels, "
        "unless a unit is given.</footer></main></body></html>\n"
    )


def _title(evaluation: Evaluation) -> str:
    return elements.text(evaluation.title)


def _section(evaluation: Evaluation, number: int, titled: bool) -> str:
    subject, result = evaluation.subject, evaluation.evidence
    metrics = read_metrics(subject.run_dir)
    trained = f"{metrics[-1]['step']:,} steps, {metrics[-1]['epoch']:.3g} epochs" if metrics else "no training record"
    intro = f"{subject.run_dir} · {len(subject.dataset)} test images · {trained}"
    title = f"<h2>{_title(evaluation)}</h2>" if titled else ""
    parts = [
        f'<section id="run{number}">{title}<p>{elements.text(intro)}</p>',
        elements.tiles(_headline(evaluation)),
        f"<pre>{elements.text(result.table())}</pre>",
        '<div class="cards">',
    ]
    if metrics:
        curves = elements.chart(charts.training_curves(metrics), "training curves")
        parts.append(elements.card("Training", curves, "Validation always weighs the KL by 1.", wide=True))
    parts.append(elements.card("Real images and reconstructions", gallery.reconstructions(evaluation), wide=True))
    parts.append(
        elements.card(
            "Samples", gallery.samples(evaluation), "z from the prior; shown is the mean of p(x|z).", wide=True
        )
    )
    parts += _vae_cards(evaluation) if evaluation.usage is None else _vq_cards(evaluation)
    name = "log p(x)" if evaluation.usage is None else "bound"
    parts += [
        elements.card(
            "How probable each image is",
            elements.chart(charts.log_px_histogram(result.log_px, result.elbo, name), "histogram of log p(x)"),
        ),
        elements.card("Configuration", elements.table(_settings(evaluation))),
        elements.card(
            "Worst images", gallery.extremes(evaluation, worst=True), "Above: real. Below: reconstruction.", wide=True
        ),
        elements.card("Best images", gallery.extremes(evaluation, worst=False), wide=True),
        "</div></section>",
    ]
    return "".join(parts)


def _headline(evaluation: Evaluation) -> list[tuple[str, str]]:
    result = evaluation.evidence
    log_px, elbo = float(result.log_px.mean()), float(result.elbo.mean())
    bits = f"{float(result.bits_per_dim().mean()):.4f}"
    if evaluation.usage is not None:
        usage = evaluation.usage
        return [
            (f"{elbo:.2f}", "ELBO, nats per image: a lower bound on log p(x)"),
            (bits, "bits/dim, at most"),
            (f"{usage.perplexity:.1f}", f"code perplexity, of {len(usage.counts)}"),
            (f"{usage.active}", f"codes in use, of {len(usage.counts)}"),
            (f"{evaluation.squared_error:.5f}", "squared error per pixel"),
        ]
    units = evaluation.units
    assert units is not None
    return [
        (f"{log_px:.2f}", f"log p(x), nats per image, {result.samples:,} samples"),
        (f"{elbo:.2f}", f"ELBO; the gap is {log_px - elbo:.2f} nats"),
        (bits, "bits/dim"),
        (f"{units.count}", f"active units, of {units.variance.numel()}"),
        (f"{int(result.reliable.sum())} of {len(result.reliable)}", "images whose estimate k-hat trusts"),
    ]


def _vae_cards(evaluation: Evaluation) -> list[str]:
    result = evaluation.evidence
    assert evaluation.units is not None
    good = result.good_khat
    return [
        elements.card(
            "Latent traversal",
            gallery.traversal(evaluation),
            f"The most active dimensions, each moved from -{gallery.REACH:g} to {gallery.REACH:g}; the others stay.",
            wide=True,
        ),
        elements.card(
            "Active units",
            elements.chart(charts.unit_variances(evaluation.units.variance, ACTIVE_VARIANCE), "active units"),
            "A dimension above the line follows the image; the others repeat the prior.",
        ),
        elements.card(
            "Which estimates to trust",
            elements.chart(charts.khat_scatter(result.log_px, result.khat, good), "k-hat of every image"),
            f"Above {good:.2f} the importance average is unreliable and its standard error is withheld.",
        ),
    ]


def _vq_cards(evaluation: Evaluation) -> list[str]:
    assert evaluation.usage is not None
    return [
        elements.card(
            "Code usage",
            elements.chart(charts.code_usage(evaluation.usage.counts), "use of every code"),
            f"Perplexity {evaluation.usage.perplexity:.1f}: as many codes, used alike, would say as much.",
        )
    ]


def _settings(evaluation: Evaluation) -> list[tuple[str, object]]:
    config = evaluation.subject.config
    return [("model", config.kind), *((field.name, getattr(config, field.name)) for field in fields(config))]
