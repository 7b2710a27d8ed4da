"""What a training run is: frozen dataclasses whose field docstrings are the command line's help. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ferrovae.training.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What training a VAE and a VQ-VAE have in common."""

    kind: ClassVar[str]

    data: str = "digits"
    """"digits" (scikit-learn's, 8 x 8), or a path: IDX folder or file, .npy."""
    validation_fraction: float = 0.05
    """Share of the training images, the last ones, held out for the validation curves and early stopping. 0: none."""
    likelihood: Literal["bernoulli", "gaussian", "categorical", "discretized_logistic"] = "bernoulli"
    """p(x|z), the distribution the decoder gives over an image."""
    sigma: float | Literal["learned", "per_dimension", "optimal"] = "optimal"
    """Standard deviation of a gaussian likelihood: a number, or how it is found."""
    binarize: Literal["auto", "stochastic", "none"] = "auto"
    """Draw binary pixels afresh each epoch with the grey values as probabilities; auto: for bernoulli only."""
    dequantize: bool = False
    """Add uniform noise of one grey level to the data of a gaussian likelihood, so that its log p(x) is meaningful."""
    batch_size: int = 100
    """Images in one step, over all ranks together."""
    epochs: int = 20
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many steps, whatever `epochs` says."""
    learning_rate: float = 1e-3
    """Adam's step size at the first step."""
    final_learning_rate: float | None = None
    """Adam's step size at the last step. None: the same as at the first."""
    schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    """The way from the first learning rate to the final one."""
    clip_norm: float | None = None
    """Scale gradients down to this norm when theirs is larger."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: run the networks under autocast; sums and parameters stay float32."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights (0.999, say), and validate and evaluate with it."""
    patience: int | None = None
    """Stop after this many validations in a row without a better ELBO; the best checkpoint is the result."""
    validate_every: int = 1
    """Epochs from one validation to the next."""
    checkpoint_every: int | None = None
    """Steps from one checkpoint to the next. None: one at the end of each epoch."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 50
    """Steps from one line of metrics.jsonl, and one check for NaN, to the next."""
    seed: int = 0
    """Decides the initial weights, the order of the images and every draw."""
    threads: int | None = None
    """Threads torch may use on the CPU. None: torch's choice; for an mlp one, as its steps are short."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:1"; auto: a GPU when there is one."""
    run_dir: str | None = None
    """Where the run is written. None: runs/MODEL-DATA."""

    @property
    def stochastic_binarization(self) -> bool:
        """Whether pixels are drawn, `auto` resolved."""
        return self.binarize == "stochastic" or (self.binarize == "auto" and self.likelihood == "bernoulli")

    @property
    def torch_threads(self) -> int | None:
        """`threads`, its default resolved; None: leave torch as it is."""
        return 1 if self.threads is None and getattr(self, "network", "conv") == "mlp" else self.threads

    def validate(self) -> None:
        """Raise `ConfigurationError` on the first setting that cannot be meant."""
        for name in ("batch_size", "epochs", "validate_every", "keep_checkpoints", "log_every"):
            _at_least(self, name, 1)
        for name in ("max_steps", "patience", "checkpoint_every", "threads"):
            _at_least(self, name, 1)
        for name in ("learning_rate", "final_learning_rate", "clip_norm"):
            _positive(self, name)
        if isinstance(self.sigma, float | int):
            _positive(self, "sigma")
        if not 0 <= self.validation_fraction < 1:
            _fail(self, "validation_fraction", "a share of at least 0 and below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            _fail(self, "ema_decay", "a number between 0 and 1, such as 0.999")
        if not 0 <= self.seed < 2**63:
            _fail(self, "seed", "an integer of at least 0 and below 2**63")
        if self.patience is not None and self.validation_fraction == 0:
            raise ConfigurationError("patience needs validation images, but validation_fraction is 0")
        if self.schedule == "constant" and self.final_learning_rate not in (None, self.learning_rate):
            raise ConfigurationError(
                f"final_learning_rate is {self.final_learning_rate} but schedule is 'constant'; "
                "choose 'exponential' or 'cosine'"
            )
        if self.sigma != "optimal" and self.likelihood != "gaussian":
            raise ConfigurationError(
                f"sigma is {self.sigma} but likelihood is {self.likelihood!r}: only 'gaussian' has a sigma"
            )
        if self.binarize == "stochastic" and self.likelihood != "bernoulli":
            raise ConfigurationError(
                f"binarize is 'stochastic' but likelihood is {self.likelihood!r}: binary pixels need 'bernoulli'"
            )
        if self.dequantize and self.likelihood != "gaussian":
            raise ConfigurationError(f"dequantize is set but likelihood is {self.likelihood!r}, expected 'gaussian'")


@dataclass(frozen=True, kw_only=True)
class TrainVAE(TrainingOptions):
    """Train a variational autoencoder with a Gaussian posterior and a standard normal prior."""

    kind: ClassVar[str] = "vae"

    latent_dim: int = 16
    """Dimensions of z."""
    network: Literal["mlp", "conv"] = "mlp"
    """Encoder and decoder: fully connected, or convolutional for images of any size."""
    hidden: tuple[int, ...] = (200, 200)
    """Widths of the hidden layers of an mlp encoder; its decoder mirrors them."""
    activation: Literal["tanh", "relu", "silu", "gelu"] = "tanh"
    """Nonlinearity between the layers."""
    width: int = 32
    """Channels of a conv network's first layer."""
    depth: int = 2
    """How often a conv network halves the image."""
    kl_warmup_epochs: float = 0.0
    """Raise the weight of the KL from 0 to 1 over this many epochs; validation always has weight 1."""
    free_bits: float = 0.0
    """Nats of KL per latent dimension, averaged over the batch, that cost nothing in training."""

    def validate(self) -> None:
        """Raise `ConfigurationError` on the first setting that cannot be meant."""
        super().validate()
        for name in ("latent_dim", "width", "depth"):
            _at_least(self, name, 1)
        if not self.hidden or min(self.hidden) < 1:
            _fail(self, "hidden", "one or more positive widths")
        if not (0 <= self.free_bits < math.inf):
            _fail(self, "free_bits", "nats of at least 0")
        if not (0 <= self.kl_warmup_epochs < math.inf):
            _fail(self, "kl_warmup_epochs", "a number of epochs of at least 0")
        if self.kl_warmup_epochs > self.epochs:
            raise ConfigurationError(
                f"kl_warmup_epochs is {self.kl_warmup_epochs:g}, longer than the {self.epochs} epochs of training: "
                "the objective would never become the ELBO"
            )


@dataclass(frozen=True, kw_only=True)
class TrainVQVAE(TrainingOptions):
    """Train a VQ-VAE: a grid of codes from a learned or a fixed codebook instead of a Gaussian z."""

    kind: ClassVar[str] = "vqvae"

    likelihood: Literal["bernoulli", "gaussian", "categorical", "discretized_logistic"] = "gaussian"
    """p(x|z), the distribution the decoder gives over an image."""
    quantizer: Literal["vq", "residual-vq", "fsq", "lfq", "sim-vq", "vector-quantize-pytorch"] = "vq"
    """The layer that turns vectors into codes; the last is the peer library's own, for comparison."""
    codebook_size: int = 256
    """Codes in the codebook (of fsq: the product of `levels`; of lfq: a power of two)."""
    num_quantizers: int = 4
    """Stages of residual-vq, each with a codebook of its own."""
    levels: tuple[int, ...] = (8, 6, 5)
    """Values of each dimension of fsq."""
    code_dim: int = 32
    """Dimensions of a code."""
    downsample: int = 4
    """Pixels per code along each side (a power of two): 28 x 28 images have a 7 x 7 grid."""
    width: int = 64
    """Channels of the networks."""
    commitment_weight: float = 1.0
    """Weight of the commitment loss, which keeps the encoder near its codes."""
    codebook_decay: float = 0.99
    """Decay of the moving averages the codebook follows."""
    dead_code_threshold: float = 1.0
    """Replace a code that is used less than this, on average, in a batch (0: never; never in evaluation)."""
    rotation_trick: bool = False
    """Carry gradients through the quantizer by a rotation instead of straight through."""

    def validate(self) -> None:
        """Raise `ConfigurationError` on the first setting that cannot be meant."""
        super().validate()
        for name in ("codebook_size", "code_dim", "downsample", "width", "num_quantizers"):
            _at_least(self, name, 1)
        if not self.levels or min(self.levels) < 2:
            _fail(self, "levels", "at least 2 values in every dimension, such as 8 6 5")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            _fail(self, "codebook_size", "a power of two, as lfq codes are bits")
        if self.downsample & (self.downsample - 1):
            _fail(self, "downsample", "a power of two")
        if not 0 < self.codebook_decay < 1:
            _fail(self, "codebook_decay", "a number between 0 and 1, such as 0.99")
        for name in ("commitment_weight", "dead_code_threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                _fail(self, name, "a number of at least 0")


Configuration = TrainVAE | TrainVQVAE


def _fail(config: TrainingOptions, name: str, expected: str) -> None:
    raise ConfigurationError(f"{name} is {getattr(config, name)!r}, expected {expected}")


def _at_least(config: TrainingOptions, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is not None and value < least:
        _fail(config, name, f"an integer of at least {least}")


def _positive(config: TrainingOptions, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
        _fail(config, name, "a positive number")
