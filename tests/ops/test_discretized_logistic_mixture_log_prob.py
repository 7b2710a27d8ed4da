"""`discretized_logistic_mixture_log_prob` against mpmath, enumeration and float64, and its gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from mpmath import mp, mpf
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from ferrovae import use_backend
from ferrovae.ops import discretized_logistic_mixture_log_prob
from ops.logistic_truth import exact, log_masses, on_levels

INF = math.inf
BACKENDS = ["reference", "rust", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu_backend():
    """What a user of a CPU gets."""
    with use_backend("rust"):
        yield


def means_of(x, means, coefficients):
    c = coefficients.tanh()
    red, green = x[..., 0:1, :, :], x[..., 1:2, :, :]
    of_green = means[..., 1, :, :, :] + c[..., 0, :, :, :] * red
    of_blue = means[..., 2, :, :, :] + c[..., 1, :, :, :] * red + c[..., 2, :, :, :] * green
    return torch.stack((means[..., 0, :, :, :], of_green, of_blue), -4)


def truth(x, logits, means, log_scales, coefficients, levels=256, floor=-7.0):
    """In float64: x (..., 3, H, W), logits (..., M, H, W), the others (..., 3, M, H, W)."""
    x, logits, means, log_scales, coefficients = (v.double() for v in (x, logits, means, log_scales, coefficients))
    top = levels - 1
    x = (2 * ((x + 1) * top / 2).round() - top) / top
    each = log_masses(x.unsqueeze(-3), means_of(x, means, coefficients), log_scales.clamp_min(floor), levels)
    total = (logits.log_softmax(-3) + each.sum(-4)).logsumexp(-3)
    return total.flatten(-2).sum(-1)


def sample(*batch, components=3, size=(3, 7), shift=-3.0):
    x = on_levels(*batch, 3, *size)
    logits = torch.randn(*batch, components, *size) * 2
    means = x.unsqueeze(-3) + torch.randn(*batch, 3, components, *size) * 0.1
    return x, logits, means, torch.randn(means.shape) + shift, torch.randn(means.shape)


def assert_close(ours, expected, relative=3e-6):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=relative, atol=2e-6)


def with_gradients(function, x, *parameters, weights):
    leaves = [value.clone().requires_grad_() for value in parameters]
    value = function(x, *leaves)
    return value.detach(), torch.autograd.grad(value, leaves, weights.to(value.dtype))


def test_one_pixel_against_mpmath(backend: str) -> None:
    coefficients, logits = [[0.3, -1.0], [2.0, 0.1], [-0.5, 0.7]], [0.4, -1.3]
    for levels, (low, middle, high) in ((256, (0, 90, 255)), (7, (1, 3, 6))):
        top = levels - 1
        for triple in ((low, middle, high), (high, low, middle), (middle, middle, middle)):
            x = [2 * v / top - 1 for v in triple]
            means = [[x[0] + 0.01, -0.5], [x[1], 0.3], [0.1, x[2] - 0.02]]
            scales = [[-4.0, -1.0], [-9.0, 0.5], [-2.0, -3.0]]
            likelihood = mpf(0)
            with mp.workdps(60):
                weights = [mp.exp(mpf(value)) for value in torch.tensor(logits).tolist()]
                for m in (0, 1):
                    c = [mp.tanh(mpf(row[m])) for row in torch.tensor(coefficients).tolist()]
                    values = [mpf(2 * v) / top - 1 for v in triple]
                    grown = [0, c[0] * values[0], c[1] * values[0] + c[2] * values[1]]
                    centre = [mpf(row[m]) for row in torch.tensor(means).tolist()]
                    each = [
                        exact(v, mean + more, max(row[m], -7.0), levels)
                        for v, mean, more, row in zip(triple, centre, grown, scales, strict=True)
                    ]
                    likelihood += weights[m] / sum(weights) * mp.exp(sum(each))
                expected = float(mp.log(likelihood))
            tensors = [torch.tensor(value)[None, ..., None, None] for value in (x, logits, means, scales, coefficients)]
            ours = discretized_logistic_mixture_log_prob(*tensors, levels=levels)
            # At the floor a scale is a quarter of a half level, and tanh times 255 half levels is off by 3e-5 of one.
            assert ours.item() == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_probabilities_of_all_colours_sum_to_one(cpu_backend: None) -> None:
    levels = 6
    colours = torch.tensor(list(itertools.product(range(levels), repeat=3)))
    x = (colours * (2 / (levels - 1)) - 1)[..., None, None]
    _, *parameters = sample(1, components=3, size=(1, 1), shift=-1.0)
    parameters = [value.expand(len(x), *value.shape[1:]) for value in parameters]
    log_prob = discretized_logistic_mixture_log_prob(x, *parameters, levels=levels)
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("components", "size", "shift"), [(1, (1, 1), -3.0), (3, (3, 5), -6.0), (5, (1, 17), 1.0), (2, (10, 13), -3.0)]
)
def test_values_and_gradients_against_float64(backend: str, components: int, size: tuple, shift: float) -> None:
    inputs, weights = sample(2, components=components, size=size, shift=shift), torch.randn(2)
    ours = with_gradients(discretized_logistic_mixture_log_prob, *inputs, weights=weights)
    expected = with_gradients(truth, *(value.double() for value in inputs), weights=weights)
    assert_close(ours[0], expected[0], 1e-5)
    for slope, due in zip(ours[1], expected[1], strict=True):
        assert ((slope - due).abs() <= 1e-4 * due.abs().max().clamp_min(1)).all()


@pytest.mark.parametrize("size", [(1, 790), (32, 96), (256, 768)])
def test_large_images(cpu_backend: None, size: tuple) -> None:
    inputs = sample(1, components=1, size=size)
    assert_close(discretized_logistic_mixture_log_prob(*inputs), truth(*inputs), 1e-6)


def test_scales_below_the_floor_count_as_it_and_get_no_gradient(backend: str) -> None:
    x, logits, means, log_scales, coefficients = sample(1)
    log_scales[..., 0] = -9.0
    log_scales.requires_grad_()
    ours = discretized_logistic_mixture_log_prob(x, logits, means, log_scales, coefficients)
    (slope,) = torch.autograd.grad(ours.sum(), log_scales)
    assert torch.equal(slope[..., 0], torch.zeros_like(slope[..., 0]))
    assert (slope[..., 1:] != 0).any()
    at_floor = log_scales.detach().clamp_min(-7)
    assert torch.equal(ours, discretized_logistic_mixture_log_prob(x, logits, means, at_floor, coefficients))
    free = discretized_logistic_mixture_log_prob(x, logits, means, log_scales, coefficients, log_scale_floor=-INF)
    assert_close(free, truth(x, logits, means, log_scales, coefficients, floor=-INF), 1e-4)


def published(x, logits, means, log_scales, coefficients):
    """Salimans et al.'s branches, written out in float64."""
    x, logits, means, log_scales, coefficients = (v.double() for v in (x, logits, means, log_scales, coefficients))
    middle = means_of(x, means, coefficients)
    x, scale = x.unsqueeze(-3), log_scales.clamp_min(-7).exp()
    above, below = torch.sigmoid((x - middle + 1 / 255) / scale), torch.sigmoid((x - middle - 1 / 255) / scale)
    z = (x - middle) / scale
    density = (torch.sigmoid(z) * torch.sigmoid(-z) / scale / 127.5).log()
    at_low, at_high = above.clamp_min(1e-300).log(), (1 - below).clamp_min(1e-300).log()
    each = torch.where(above - below > 1e-5, (above - below).clamp_min(1e-12).log(), density)
    each = torch.where(x < -0.999, at_low, torch.where(x > 0.999, at_high, each))
    return (logits.log_softmax(-3) + each.sum(-4)).logsumexp(-3).flatten(-2).sum(-1)


def test_the_published_approximation(cpu_backend: None) -> None:
    inputs, weights = sample(2, shift=-2.0), torch.ones(2)
    run = lambda *tensors: discretized_logistic_mixture_log_prob(*tensors, compat="pixelcnn++")  # noqa: E731
    ours, expected = (with_gradients(f, *inputs, weights=weights) for f in (run, published))
    assert_close(ours[0], expected[0], 1e-4)
    for slope, due in zip(ours[1], expected[1], strict=True):
        assert ((slope - due).abs() <= 2e-3 * due.abs().max()).all()
    far = [value.clone() for value in inputs]
    far[2] += 3.0
    far[3].fill_(-4.0)
    assert (run(*far) - truth(*far)).abs().min() > 0.02


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_impossible_components_do_not_count(backend: str) -> None:
    x, logits, means, log_scales, coefficients = sample(1, components=2)
    x.fill_(1 / 255)
    alone = discretized_logistic_mixture_log_prob(
        x, *(v.narrow(-3, 0, 1) for v in (logits, means, log_scales, coefficients))
    )
    weightless = logits.clone()
    weightless[:, 1] = -INF
    assert_close(discretized_logistic_mixture_log_prob(x, weightless, means, log_scales, coefficients), alone)
    far = means.clone()
    far[:, :, 1] = INF
    leaves = [value.clone().requires_grad_() for value in (logits, far, log_scales, coefficients)]
    value = discretized_logistic_mixture_log_prob(x, *leaves)
    assert_close(value, alone + logits.double().log_softmax(1)[:, 0].sum())
    value.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    far[:, :, 0] = INF
    assert discretized_logistic_mixture_log_prob(x, logits, far, log_scales, coefficients).item() == -INF


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_spoils_its_own_image_only(backend: str) -> None:
    inputs = sample(6)
    for image, value in enumerate(inputs):
        value[image].view(-1)[-1] = math.nan
    assert discretized_logistic_mixture_log_prob(*inputs).isnan().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is the reference's and Rust's")
    inputs, weights = [value.to(dtype) for value in sample(2)], torch.ones(2)
    ours = with_gradients(discretized_logistic_mixture_log_prob, *inputs, weights=weights)
    expected = with_gradients(truth, *(value.double() for value in inputs), weights=weights)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(ours[0], expected[0], 1e-11 if dtype == torch.float64 else 1e-5)
    step = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}[dtype]
    for slope, due in zip(ours[1], expected[1], strict=True):
        assert slope.dtype == dtype
        assert ((slope.double() - due).abs() <= step * (1 + due.abs())).all()


def test_samples_share_their_data(backend: str) -> None:
    x, *_ = sample(2)
    _, *parameters = sample(3, 2)
    expected = truth(x.expand(3, *x.shape), *parameters)
    for data in (x, x[None], x.expand(3, *x.shape)):
        assert_close(discretized_logistic_mixture_log_prob(data, *parameters, batch_dims=2), expected, 1e-5)


@pytest.mark.parametrize(("batch", "size"), [(0, (2, 3)), (2, (0, 3))])
def test_empty(backend: str, batch: int, size: tuple) -> None:
    inputs = sample(batch, size=size)
    inputs[1].requires_grad_()
    ours = discretized_logistic_mixture_log_prob(*inputs)
    assert ours.tolist() == [0.0] * batch
    ours.sum().backward()
    assert inputs[1].grad.shape == inputs[1].shape


def test_strides_threads_and_unwritten_memory_do_not_matter(cpu_backend: None, nan_filled_empty: None) -> None:
    inputs, weights = sample(3, components=10, size=(40, 30)), torch.randn(3)
    strided = [value.transpose(-1, -2).contiguous().transpose(-1, -2) for value in inputs]
    threads = torch.get_num_threads()
    try:
        results = []
        for count, values in ((1, inputs), (2, inputs), (3, inputs), (16, strided)):
            torch.set_num_threads(count)
            results.append(with_gradients(discretized_logistic_mixture_log_prob, *values, weights=weights))
    finally:
        torch.set_num_threads(threads)
    for value, slopes in results[1:]:
        assert torch.equal(value, results[0][0])
        for slope, first in zip(slopes, results[0][1], strict=True):
            assert torch.equal(slope, first)


def test_gradients_of_first_and_second_order(cpu_backend: None) -> None:
    x, *parameters = sample(2, components=2, size=(1, 2))
    leaves = [value.double().requires_grad_() for value in parameters]
    function = lambda *leaves: discretized_logistic_mixture_log_prob(x, *leaves)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# The check itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "samples", "strided"])
def test_opcheck(cpu_backend: None, case: str) -> None:
    x, *parameters = sample(2, components=2, size=(2, 3))
    batch_dims = 1
    if case == "samples":
        x, batch_dims = x[0], 2
        parameters = [value[:, None] for value in parameters]
        x = x[None]
    elif case == "strided":
        parameters = [value.transpose(-1, -2).contiguous().transpose(-1, -2) for value in parameters]
    parameters = [value.detach().requires_grad_() for value in parameters]
    grad = torch.randn(parameters[0].shape[:batch_dims], requires_grad=True)
    forward = torch.ops.ferrovae.discretized_logistic_mixture_log_prob.default
    torch.library.opcheck(forward, (*parameters, x, 256, -7.0, batch_dims, "auto"))
    backward = torch.ops.ferrovae.discretized_logistic_mixture_log_prob_backward.default
    torch.library.opcheck(backward, (*parameters, x, grad, 256, -7.0, batch_dims, "auto"))


def test_compiled_in_one_graph_for_every_batch_size(cpu_backend: None) -> None:
    counter, counts = CompileCounterWithBackend("aot_eager"), set()
    function = lambda x, logits, *others: discretized_logistic_mixture_log_prob(x, logits * 2, *others).exp()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch in (11, 5, 2, 8, 13):
        inputs, weights = sample(batch, components=4, size=(1, 6)), torch.ones(batch)
        eager, ours = (with_gradients(f, *inputs, weights=weights) for f in (function, compiled))
        for one, two in zip((eager[0], *eager[1]), (ours[0], *ours[1]), strict=True):
            torch.testing.assert_close(two, one)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # dynamo may call its backend twice for the first, since one argument is a float


def test_exported_vmapped_checkpointed_and_under_autocast(cpu_backend: None) -> None:
    class Module(torch.nn.Module):
        def forward(self, x, *parameters):
            return discretized_logistic_mixture_log_prob(x, *parameters)

    inputs = sample(3)
    expected = discretized_logistic_mixture_log_prob(*inputs)
    assert torch.equal(torch.export.export(Module(), inputs).module()(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(discretized_logistic_mixture_log_prob(*inputs), expected)
    stacked = [torch.stack((value, value.flip(0))) for value in inputs]
    assert torch.equal(
        torch.vmap(discretized_logistic_mixture_log_prob)(*stacked), torch.stack((expected, expected.flip(0)))
    )
    x, logits, *others = inputs
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    checkpoint(discretized_logistic_mixture_log_prob, x, leaves[0], *others, use_reentrant=False).sum().backward()
    discretized_logistic_mixture_log_prob(x, leaves[1], *others).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 5, 5)},
            ValueError,
            r"x is \(2, 3, 5, 5\), expected \(2, 3, 4, 5\) to match mixture_logi",
        ),
        ({"x": torch.zeros(2, 1, 4, 5)}, ValueError, r"x is \(2, 1, 4, 5\), expected \(2, 3, 4, 5\)"),
        ({"x": 1.0}, TypeError, r"x is a float, expected a tensor"),
        ({"means": torch.zeros(2, 3, 4, 5)}, ValueError, r"means is \(2, 3, 4, 5\), expected \(2, 3, 6, 4, 5\)"),
        (
            {"log_scales": torch.zeros(2, 3, 6, 4, 5).double()},
            TypeError,
            r"log_scales is torch.float64, expected torch.fl",
        ),
        (
            {"mixture_logits": torch.zeros(2, 0, 4, 5)},
            ValueError,
            r"means is \(2, 3, 6, 4, 5\), expected \(2, 3, 0, 4, 5\)",
        ),
        ({"levels": 1}, ValueError, r"levels is 1, expected 2 to 65536"),
        ({"batch_dims": 4}, ValueError, r"batch_dims is 4, expected 0 to 3"),
        ({"compat": "openai"}, ValueError, r"compat is 'openai', expected one of pixelcnn\+\+"),
        ({"compat": "pixelcnn++", "levels": 8}, ValueError, r"levels is 8, expected 256 with compat"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 5), "mixture_logits": torch.zeros(2, 6, 4, 5)}
    arguments |= {name: torch.zeros(2, 3, 6, 4, 5) for name in ("means", "log_scales", "coefficients")} | change
    with pytest.raises(error, match=f"^discretized_logistic_mixture_log_prob: {message}"):
        discretized_logistic_mixture_log_prob(**arguments)
