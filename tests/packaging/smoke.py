"""What an installed ferrovae must do, run by an interpreter that has nothing else of this repository.

`python smoke.py operations`: every operation on every backend that can run here, against the reference.
`python smoke.py all`: that, and a model trained for three steps, evaluated and loaded back.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ferrovae as fv
from ferrovae.ops._registry import operations


def results(backend: str) -> list[torch.Tensor]:
    """Every operation that `backend` has, once, with a backward pass, on the backend in use."""
    ops, generator = fv.ops, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    def count(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    x, codebook, seed = normal(9, 4), normal(6, 4), torch.tensor([7])
    pixels, grey = count(256, 2, 3, 2, 2) / 127.5 - 1, torch.rand(5, 9, generator=generator)
    mixture = normal(2, 2, 2, 2), *(normal(2, 3, 2, 2, 2) for _ in range(3))
    with_options = [
        (ops.reparameterize_kl, (normal(5, 3), normal(5, 3)), {"seed": seed}),
        (ops.reparameterize_kl_from_moments, (normal(5, 6),), {"seed": seed}),
        (ops.nearest_code, (x, codebook), {"return_distances": True, "topk": 2}),
        (ops.sample_code, (x, codebook), {"seed": seed}),
    ]
    plain = [
        (ops.bernoulli_log_prob, (count(2, 5, 40), normal(5, 40))),
        (ops.continuous_bernoulli_log_prob, (grey, normal(5, 9))),
        (ops.categorical_log_prob, (count(4, 5, 9), normal(5, 4, 9))),
        (ops.gaussian_log_prob, (grey, normal(5, 9), normal(5, 9))),
        (ops.poisson_log_prob, (count(9, 5, 9), normal(5, 9))),
        (ops.negative_binomial_log_prob, (count(9, 5, 9), normal(5, 9), normal(5, 9))),
        (ops.discretized_logistic_log_prob, (pixels, normal(2, 3, 2, 2), normal(2, 3, 2, 2))),
        (ops.discretized_logistic_mixture_log_prob, (pixels, *mixture)),
        (ops.residual_nearest_code, (x, torch.stack([codebook, codebook / 3]))),
        (ops.code_sums, (x, count(6, 9), 6)),
        (ops.sign_code_entropy, (x / 100,)),
        (ops.sign_code_mean, (x / 100,)),
        (ops.code_logsumexp, (x, codebook)),
        (ops.code_cross_entropy, (x, codebook, count(6, 9))),
        (ops.expected_code, (x, codebook)),
        (ops.mean_code_entropy, (x, codebook)),
    ]
    found: list[torch.Tensor] = []
    for function, arguments, options in [*with_options, *((*call, {}) for call in plain)]:
        if has(backend, function.__name__):
            returned = function(*arguments, **options)
            found += returned if isinstance(returned, tuple) else [returned]
    sum(value.sum() for value in found if value.requires_grad).backward()
    return [*(value.detach() for value in found), x.grad, codebook.grad]


def has(backend: str, name: str) -> bool:
    """Whether the backend has a kernel for the operation of that name, and for what it is made of."""
    parts = [operation for key, operation in operations.items() if key.startswith(name)]
    return all(backend in operation.kernels for operation in parts)


def check_operations() -> None:
    for backend in ("rust", "triton"):
        reasons = {operation.obstacle(backend, "cpu") for name, operation in operations.items() if has(backend, name)}
        if reasons - {None}:
            print(f"{backend}: not here ({'; '.join(sorted(reasons - {None}))})")
            continue
        computed = []
        for chosen in (backend, "reference"):
            with fv.use_backend(chosen):
                computed.append(results(backend))
        for ours, reference in zip(*computed, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
        print(f"{backend}: agrees with the reference")


def check_training() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "ferrovae"]
        sizes = ["--hidden", "8", "--latent-dim", "2", "--max-steps", "3"]
        subprocess.run([*command, "train", "vae", "--run-dir", str(run), *sizes], check=True)
        subprocess.run([*command, "evaluate", str(run), "--samples", "20", "--images", "5"], check=True)
        assert (run / "evaluation.json").is_file()
        assert (run / "report.html").is_file()
        assert fv.load(run).sample(2).shape == (2, 1, 8, 8)
    print("trained three steps, evaluated, loaded")


if __name__ == "__main__":
    print(f"ferrovae {fv.__version__} from {Path(fv.__file__).parent}, torch {torch.__version__}")
    check_operations()
    if sys.argv[1:] == ["all"]:
        check_training()
