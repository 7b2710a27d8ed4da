"""The evaluation of a run says what is true of it, and its page stands on its own."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import ferrovae as fv
from ferrovae import report
from ferrovae.report import elements, pictures
from ferrovae.report.codes import CodeUsage
from ferrovae.report.page import render

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed but not open; collects what the page points to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def vae(vae_run: Path) -> report.Evaluation:
    return report.evaluate(vae_run, samples=50, images=20)


@pytest.fixture(scope="module")
def vqvae(vqvae_run: Path) -> report.Evaluation:
    return report.evaluate(vqvae_run, images=30)


def test_evaluation_of_a_vae_is_what_the_model_says(vae: report.Evaluation, vae_run: Path) -> None:
    saved = json.loads((vae_run / "evaluation.json").read_text(encoding="utf-8"))
    assert len(saved["log_px"]) == len(saved["khat"]) == 20
    assert saved["mean"]["log_px"] == pytest.approx(float(vae.evidence.log_px.mean()))
    model = fv.load(vae_run)
    x = torch.cat(list(vae.subject.batches()))
    with torch.inference_mode():
        variances = model.posterior(x).mean.double().var(dim=0, unbiased=False)
        error = (model.reconstruct(x).double() - x).square().mean()
    assert saved["active_units"] == int((variances > 0.01).sum())
    assert saved["squared_error"] == pytest.approx(float(error), rel=1e-6)


def test_evaluation_of_a_vqvae_counts_its_codes(vqvae: report.Evaluation, vqvae_run: Path) -> None:
    saved = json.loads((vqvae_run / "evaluation.json").read_text(encoding="utf-8"))
    codes = fv.load(vqvae_run).encode(torch.cat(list(vqvae.subject.batches())))
    counts = torch.stack([(codes == code).sum() for code in range(16)]).double()
    assert saved["code_counts"] == counts.tolist()
    share = counts[counts > 0] / counts.sum()
    assert saved["perplexity"] == pytest.approx(math.exp(-float((share * share.log()).sum())))


@pytest.mark.parametrize(("counts", "perplexity"), [([5, 5, 5, 5], 4.0), ([7, 0, 0], 1.0), ([2, 2, 0, 0], 2.0)])
def test_perplexity_is_the_number_of_codes_used_alike(counts: list[int], perplexity: float) -> None:
    assert CodeUsage(torch.tensor([counts])).perplexity == pytest.approx(perplexity)


def test_test_images_are_the_same_pixels_at_every_look(vae: report.Evaluation) -> None:
    first = torch.cat(list(vae.subject.batches()))
    assert torch.equal(first, torch.cat(list(vae.subject.batches())))
    assert torch.equal(vae.subject.images([3, 7]), first[[3, 7]])


def test_the_page_is_whole_and_self_contained(vae: report.Evaluation, vqvae: report.Evaluation, tmp_path: Path) -> None:
    page = report.write([vae, vqvae], tmp_path / "report.html").read_text(encoding="utf-8")
    links = parsed(page).links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert re.search(r"https?://", re.sub(r"data:image/[^\"]*", "", page)) is None
    assert "<script" not in page
    for heading in (
        "Training",
        "Latent traversal",
        "Active units",
        "Code usage",
        "Worst images",
        "Best images",
        "Samples",
    ):
        assert f"<h3>{heading}</h3>" in page
    assert f"{vae.evidence.log_px.mean():.2f}" in page
    assert elements.text(vae.evidence.table()) in page


def test_text_from_a_run_is_escaped(vae: report.Evaluation) -> None:
    config = replace(vae.subject.config, data="<script>alert(1)</script>")
    page = render([replace(vae, subject=replace(vae.subject, config=config))])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parsed(page)


def test_grid_puts_every_image_in_its_place() -> None:
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 10
    canvas = pictures.grid(images, columns=3, gap=1)
    assert canvas.shape == (5, 11, 3)
    assert canvas[0, 4, 0] == images[1, 0, 0, 0]
    assert canvas[3, 0, 0] == images[3, 0, 0, 0]
    assert canvas[2, 0, 0] == 1


def test_bad_requests_are_named(vae_run: Path) -> None:
    with pytest.raises(ValueError, match="images is 0"):
        report.evaluate(vae_run, images=0)
