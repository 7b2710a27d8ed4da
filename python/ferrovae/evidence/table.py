"""The evidence as text: what was found, and in words what to trust."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import torch

from ferrovae.evidence.result import standard_error_over_images

if TYPE_CHECKING:
    from ferrovae.evidence.result import Evidence


def render(evidence: Evidence, images: int) -> str:
    """The table of an `Evidence`, with the `images` images of largest k-hat."""
    if len(evidence) == 0:
        return "log p(x): no images."
    if bool(evidence.point_mass.all()):
        parts = [_title(evidence), _means(evidence), _wrapped(_bound())]
    else:
        verdict = _wrapped(_verdict(evidence))
        parts = [_title(evidence), _means(evidence), _bins(evidence), verdict, _images(evidence, images)]
    return "\n\n".join(part for part in parts if part)


def _title(evidence: Evidence) -> str:
    draws = "one draw" if bool(evidence.point_mass.all()) else f"{evidence.samples:,} samples"
    return f"log p(x) of {_count(len(evidence))}, {draws} each (nats per image, {evidence.dims} dimensions)"


def _means(evidence: Evidence) -> str:
    rows = [("", "mean", "SE over images", "Monte Carlo SE")]
    bits = evidence.bits_per_dim()
    if bool(evidence.point_mass.all()):
        rows.append(_mean_row("log p(x|z) + log p(z)", evidence.log_px, "n/a"))
    else:
        error = evidence.mean_standard_error()
        withheld = "withheld" if math.isnan(error) else f"{error:.4f}"
        elbo_error = float(evidence.elbo_standard_error.square().sum().sqrt() / len(evidence))
        rows.append(_mean_row("log p(x), importance average", evidence.log_px, withheld))
        rows.append(_mean_row("ELBO", evidence.elbo, "n/a" if math.isnan(elbo_error) else f"{elbo_error:.4f}"))
    rows.append(_mean_row("  reconstruction", evidence.reconstruction, ""))
    rows.append(_mean_row("  KL", evidence.kl, ""))
    rows.append(("bits per dimension", f"{float(bits.mean()):.4f}", _error(bits, 4), ""))
    return "\n".join(f"  {name:<30}{mean:>12}{over:>17}{carlo:>17}".rstrip() for name, mean, over, carlo in rows)


def _mean_row(name: str, values: torch.Tensor, monte_carlo: str) -> tuple[str, str, str, str]:
    return name, f"{float(values.mean()):.3f}", _error(values, 3), monte_carlo


def _error(values: torch.Tensor, digits: int) -> str:
    error = standard_error_over_images(values)
    return "n/a" if math.isnan(error) else f"{error:.{digits}f}"


def _bins(evidence: Evidence) -> str:
    good, khat = evidence.good_khat, evidence.khat
    bins = [
        (f"(-inf, {good:.2f}]", "good", khat <= good),
        (f"({good:.2f}, 1]", "bad", (khat > good) & (khat <= 1)),
        ("(1, inf)", "very bad", khat > 1),
        ("none", "not enough large weights to fit", khat.isnan()),
    ]
    lines = [f"  {'Pareto k-hat':<18}{'images':>8}{'share':>9}"]
    for interval, name, mask in bins:
        if interval != "none" or bool(mask.any()):
            lines.append(f"  {interval:<18}{int(mask.sum()):>8}{_share(mask):>9}   {name}")
    if bool(evidence.exact.any()):
        lines.append(f"  of these, exact: {int(evidence.exact.sum())} (constant weights)")
    return "\n".join(lines)


def _verdict(evidence: Evidence) -> str:
    total, unreliable = len(evidence), ~evidence.reliable
    count, good = int(unreliable.sum()), evidence.good_khat
    if bool(evidence.exact.all()):
        return (
            f"The weights of {_all(total)} are constant: the posterior q(z|x) is exact as far as {evidence.samples:,} "
            "samples tell, and log p(x) has no Monte Carlo error."
        )
    if count == 0:
        return (
            f"k-hat is at most {good:.2f} for {_all(total)}: the importance average and its standard error can be "
            "trusted. It is a lower bound in expectation."
        )
    if evidence.samples < 21:
        return (
            f"{_plural(evidence.samples, 'sample')} an image are too few for a k-hat (21 are needed): the importance "
            "average is a lower bound in expectation, how close is not known, and its standard error is withheld. "
            "Take more samples."
        )
    many, are = ("images", "there") if total > 1 else ("image", "here")
    where = f"{count:,} of {total:,} {many}"
    too_large = f"k-hat exceeds {good:.2f}" + (" or cannot be fitted" if bool(evidence.khat.isnan().any()) else "")
    return (
        f"{too_large} for {where}: the importance average is unreliable {are}, most likely too low, and its standard "
        f"error is withheld. {_remedy(evidence)}"
    )


def _remedy(evidence: Evidence) -> str:
    needed = evidence.samples_needed()[~evidence.reliable & ~evidence.point_mass]
    reachable = needed[needed.isfinite()]
    beyond = int(needed.isinf().sum())
    remedy = "Read the value as a lower bound."
    if len(reachable):
        median = float(reachable.quantile(0.5))
        remedy += " More samples help where k-hat is below 1"
        remedy += (
            f" (about {_round(median)} an image, in the median)." if median > evidence.samples else ", but slowly."
        )
    if beyond:
        remedy += f" For {_count(beyond)} with k-hat of 1 or more no number of samples will do."
    return remedy


def _bound() -> str:
    return (
        "The posterior is a point mass (one code each), so this is a lower bound on log p(x), not an estimate of it: "
        "the probability of the other codes is left out. It has no Monte Carlo error; k-hat does not apply."
    )


def _images(evidence: Evidence, images: int) -> str:
    shown = min(images, len(evidence))
    if shown <= 0:
        return ""
    order = torch.where(evidence.khat.isnan(), torch.inf, evidence.khat).argsort(descending=True, stable=True)[:shown]
    needed = evidence.samples_needed()
    lines = [
        f"  {'largest k-hat':<16}{'log p(x)':>12}{'SE':>10}{'ELBO':>12}{'ESS':>10}{'k-hat':>8}{'samples needed':>18}"
    ]
    for i in order.tolist():
        khat, error = float(evidence.khat[i]), float(evidence.standard_error[i])
        lines.append(
            f"  image {int(evidence.index[i]):<10}{float(evidence.log_px[i]):>12.3f}"
            f"{'withheld' if math.isnan(error) else f'{error:.3f}':>10}{float(evidence.elbo[i]):>12.3f}"
            f"{float(evidence.ess[i]):>10.1f}{'none' if math.isnan(khat) else f'{khat:.2f}':>8}"
            f"{'' if evidence.reliable[i] else _needed(float(needed[i])):>18}".rstrip()
        )
    return "\n".join(lines)


def _needed(samples: float) -> str:
    if math.isnan(samples):
        return "not known"
    return _round(samples) if math.isfinite(samples) else "not reachable"


def _round(samples: float) -> str:
    """Two significant digits: the formula is a rule of thumb."""
    return (
        f"{float(f'{samples:.1e}'):,.0f}" if samples < 1e7 else f"{samples:.0e}".replace("e+0", "e").replace("e+", "e")
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=100)


def _share(mask: torch.Tensor) -> str:
    return f"{100 * float(mask.double().mean()):.0f} %"


def _count(images: int) -> str:
    return _plural(images, "image")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _all(total: int) -> str:
    return f"all {total:,} images" if total > 1 else "the image"
