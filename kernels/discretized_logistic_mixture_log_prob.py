"""Log-likelihood of RGB pixels under mixtures of discretised logistics, and its gradients.

N images of P pixels, M components, all tensors contiguous: x (N, 3, P), or fewer images, a divisor n of N: image i
meets image i mod n; logits (N, M, P); means, log_scales and coefficients (N, 3, M, P). A program holds a piece of an
image's pixels and walks over the components, keeping a running maximum and sum; the pieces' sums are added by a second,
ordered pass. The backward kernel walks twice: for the sums, then for the shares. Computed in float32.
"""

import torch
import triton
import triton.language as tl

from .logistic import ends, level, log_mass, slopes

BLOCK = 128
_VARIES = ["x_images", "components", "pixels", "top", "floor"]


@triton.jit
def _pixels(x, x_images, pixels, top, BLOCK_P: tl.constexpr):
    """This program's image int64, its pixels and which of them there are, the three levels there and T."""
    pieces = tl.cdiv(pixels, BLOCK_P)
    program = tl.program_id(0)
    image = (program // pieces).to(tl.int64)
    pixel = program % pieces * BLOCK_P + tl.arange(0, BLOCK_P)
    there = pixel < pixels
    highest = tl.zeros([BLOCK_P], tl.float32) + top
    start = x + image % x_images * 3 * pixels + pixel
    red = level(tl.load(start, mask=there, other=0.0).to(tl.float32), highest)
    green = level(tl.load(start + pixels, mask=there, other=0.0).to(tl.float32), highest)
    blue = level(tl.load(start + 2 * pixels, mask=there, other=0.0).to(tl.float32), highest)
    return image, pixel, there, red, green, blue, highest


@triton.jit
def _tanh(value):
    factor = tl.exp(-2.0 * tl.abs(value))
    size = (1.0 - factor) / (1.0 + factor)
    return tl.where(value < 0, -size, size)


@triton.jit
def _mass(v, before, mean, log_scale, floor, highest):
    """Log of a channel's mass, and what its derivatives are made of."""
    scale = tl.where(log_scale < floor, floor, log_scale)
    distance = tl.fma(-mean, highest, 2.0 * v - highest) - before
    a, b, width, rate = ends(distance - 1.0, distance + 1.0, scale, highest)
    return log_mass(v, a, b, width, scale, highest), a, b, width, rate


@triton.jit
def _load(values, offsets, apart, there):
    """A component's three numbers."""
    return (
        tl.load(values + offsets, mask=there, other=0.0).to(tl.float32),
        tl.load(values + offsets + apart, mask=there, other=0.0).to(tl.float32),
        tl.load(values + offsets + 2 * apart, mask=there, other=0.0).to(tl.float32),
    )


@triton.jit
def _add(most, total, score):
    """A running maximum and sum of exponentials, with one more."""
    larger = tl.where(score > most, score, most)
    return larger, total * tl.exp(most - larger) + tl.exp(score - larger)


@triton.jit(do_not_specialize=_VARIES)
def forward_kernel(
    x,
    logits,
    means,
    log_scales,
    coefficients,
    out,
    x_images,
    components,
    pixels,
    top,
    floor,
    BLOCK_P: tl.constexpr,
):
    """out [N, pieces of an image]."""
    image, pixel, there, red, green, blue, highest = _pixels(x, x_images, pixels, top, BLOCK_P)
    least = tl.zeros([BLOCK_P], tl.float32) - 3e38
    lowest = tl.zeros([BLOCK_P], tl.float32) + floor
    most_score, most_logit = least, least
    scores, weights = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    n_red, n_green = 2.0 * red - highest, 2.0 * green - highest
    apart = components.to(tl.int64) * pixels
    for m in range(components):
        offsets = (image * 3 * components + m) * pixels + pixel
        mean_0, mean_1, mean_2 = _load(means, offsets, apart, there)
        scale_0, scale_1, scale_2 = _load(log_scales, offsets, apart, there)
        raw_0, raw_1, raw_2 = _load(coefficients, offsets, apart, there)
        logit = tl.load(logits + (image * components + m) * pixels + pixel, mask=there, other=0.0).to(tl.float32)
        one, _, _, _, _ = _mass(red, 0.0, mean_0, scale_0, lowest, highest)
        two, _, _, _, _ = _mass(green, _tanh(raw_0) * n_red, mean_1, scale_1, lowest, highest)
        before = _tanh(raw_1) * n_red + _tanh(raw_2) * n_green
        three, _, _, _, _ = _mass(blue, before, mean_2, scale_2, lowest, highest)
        most_score, scores = _add(most_score, scores, logit + one + two + three)
        most_logit, weights = _add(most_logit, weights, logit)
    total = (most_score + tl.log(scores)) - (most_logit + tl.log(weights))
    tl.store(out + tl.program_id(0), tl.sum(tl.where(there, total, 0.0), axis=0))


@triton.jit(do_not_specialize=_VARIES)
def backward_kernel(
    x,
    logits,
    means,
    log_scales,
    coefficients,
    grad,
    d_logits,
    d_means,
    d_log_scales,
    d_coefficients,
    x_images,
    components,
    pixels,
    top,
    floor,
    BLOCK_P: tl.constexpr,
):
    """Each as its parameter: grad times the derivatives, times the component's share of the likelihood."""
    image, pixel, there, red, green, blue, highest = _pixels(x, x_images, pixels, top, BLOCK_P)
    least = tl.zeros([BLOCK_P], tl.float32) - 3e38
    lowest = tl.zeros([BLOCK_P], tl.float32) + floor
    most_score, most_logit = least, least
    scores, weights = tl.zeros([BLOCK_P], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    n_red, n_green = 2.0 * red - highest, 2.0 * green - highest
    apart = components.to(tl.int64) * pixels
    weight = tl.load(grad + image).to(tl.float32)
    for turn in range(2 * components):
        m = turn % components
        offsets = (image * 3 * components + m) * pixels + pixel
        mean_0, mean_1, mean_2 = _load(means, offsets, apart, there)
        scale_0, scale_1, scale_2 = _load(log_scales, offsets, apart, there)
        raw_0, raw_1, raw_2 = _load(coefficients, offsets, apart, there)
        at = (image * components + m) * pixels + pixel
        logit = tl.load(logits + at, mask=there, other=0.0).to(tl.float32)
        c_0, c_1, c_2 = _tanh(raw_0), _tanh(raw_1), _tanh(raw_2)
        one, a_0, b_0, width_0, rate_0 = _mass(red, 0.0, mean_0, scale_0, lowest, highest)
        two, a_1, b_1, width_1, rate_1 = _mass(green, c_0 * n_red, mean_1, scale_1, lowest, highest)
        before = c_1 * n_red + c_2 * n_green
        three, a_2, b_2, width_2, rate_2 = _mass(blue, before, mean_2, scale_2, lowest, highest)
        score = logit + one + two + three
        if turn < components:
            most_score, scores = _add(most_score, scores, score)
            most_logit, weights = _add(most_logit, weights, logit)
        else:
            share = tl.exp(score - most_score) / scores
            tl.store(
                d_logits + at,
                (weight * (share - tl.exp(logit - most_logit) / weights)).to(d_logits.dtype.element_ty),
                mask=there,
            )
            m_0, s_0 = slopes(red, a_0, b_0, width_0, rate_0, highest)
            m_1, s_1 = slopes(green, a_1, b_1, width_1, rate_1, highest)
            m_2, s_2 = slopes(blue, a_2, b_2, width_2, rate_2, highest)
            # A component without a share has no gradient, also where its own derivatives are infinite.
            has, by = share != 0, weight * share
            m_0, m_1, m_2 = tl.where(has, by * m_0, 0.0), tl.where(has, by * m_1, 0.0), tl.where(has, by * m_2, 0.0)
            s_0 = tl.where(has & (scale_0 >= lowest), by * s_0, 0.0)
            s_1 = tl.where(has & (scale_1 >= lowest), by * s_1, 0.0)
            s_2 = tl.where(has & (scale_2 >= lowest), by * s_2, 0.0)
            _store(d_means + offsets, apart, there, m_0, m_1, m_2)
            _store(d_log_scales + offsets, apart, there, s_0, s_1, s_2)
            of_0 = m_1 * (1.0 - c_0 * c_0) * n_red / highest
            of_1 = m_2 * (1.0 - c_1 * c_1) * n_red / highest
            of_2 = m_2 * (1.0 - c_2 * c_2) * n_green / highest
            _store(d_coefficients + offsets, apart, there, of_0, of_1, of_2)


@triton.jit
def _store(at, apart, there, one, two, three):
    """A component's three numbers."""
    tl.store(at, one.to(at.dtype.element_ty), mask=there)
    tl.store(at + apart, two.to(at.dtype.element_ty), mask=there)
    tl.store(at + 2 * apart, three.to(at.dtype.element_ty), mask=there)


def _launch(kernel, tensors: tuple[torch.Tensor, ...], levels: int, floor: float, batch_dims: int) -> None:
    x, logits = tensors[:2]
    images, components = logits.shape[:batch_dims].numel(), logits.shape[batch_dims]
    pixels = logits.shape[batch_dims + 1 :].numel()
    with torch.cuda.device_of(logits):
        kernel[(images * -(-pixels // BLOCK),)](
            *tensors,
            x.numel() // (3 * pixels),
            components,
            pixels,
            levels - 1,
            max(floor, -1e4),
            BLOCK_P=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def forward(
    x: torch.Tensor,
    logits: torch.Tensor,
    means: torch.Tensor,
    log_scales: torch.Tensor,
    coefficients: torch.Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> torch.Tensor:
    """Log-likelihoods of the batch's shape; all contiguous."""
    batch, pixels = logits.shape[:batch_dims], logits.shape[batch_dims + 1 :].numel()
    if logits.numel() == 0:
        return torch.zeros(batch, dtype=torch.float32, device=logits.device)
    out = torch.empty((batch.numel(), -(-pixels // BLOCK)), dtype=torch.float32, device=logits.device)
    _launch(forward_kernel, (x, logits, means, log_scales, coefficients, out), levels, floor, batch_dims)
    return out.sum(1).view(batch)


def backward(
    x: torch.Tensor,
    logits: torch.Tensor,
    means: torch.Tensor,
    log_scales: torch.Tensor,
    coefficients: torch.Tensor,
    grad: torch.Tensor,
    levels: int,
    floor: float,
    batch_dims: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients in all parameters; all contiguous, one number `grad` an image."""
    out = tuple(torch.empty_like(value) for value in (logits, means, log_scales, coefficients))
    if logits.numel():
        tensors = x, logits, means, log_scales, coefficients, grad, *out
        _launch(backward_kernel, tensors, levels, floor, batch_dims)
    return out


def aot_configurations() -> list[dict]:
    """The configurations shipped, for the ahead-of-time tests."""
    configurations = []
    for kind in ("fp32", "bf16"):
        inputs = dict.fromkeys(("x", "logits", "means", "log_scales", "coefficients"), f"*{kind}")
        counts = {"x_images": "i32", "components": "i32", "pixels": "i32", "top": "i32", "floor": "fp32"}
        names = ("d_logits", "d_means", "d_log_scales", "d_coefficients")
        gradients = {"grad": "*fp32"} | dict.fromkeys(names, f"*{kind}")
        for kernel, others in (("forward_kernel", {"out": "*fp32"}), ("backward_kernel", gradients)):
            configurations.append(
                {
                    "kernel": kernel,
                    "name": f"{kind} {BLOCK}",
                    "signature": inputs | others | counts,
                    "constexprs": {"BLOCK_P": BLOCK},
                    "num_warps": 4,
                }
            )
    return configurations
