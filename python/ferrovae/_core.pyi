"""The compiled extension: see `rust/python`. Tensors travel as `(data_ptr, number of elements)`."""

from os import PathLike

__version__: str
Span = tuple[int, int]

class DataError(ValueError):
    """A file or dataset that is not what it should be."""

def multiply_add_peak() -> float: ...
def simd_level() -> str: ...

# --- reparameterize_kl ---------------------------------------------------------------------------------------------

Strided = tuple[Span, int, int]
Noise = tuple[int, Span | None, int, int]

def reparameterize_kl(
    dtype: str,
    shape: list[int],
    mean: Strided,
    logvar: Strided,
    prior: list[tuple[Span, int, bool] | None],
    noise: Noise,
    z: Span,
    kl: Span,
    elementwise: bool,
    threads: int,
) -> None: ...
def reparameterize_kl_backward(
    dtype: str,
    shape: list[int],
    mean: Strided,
    logvar: Strided,
    prior: list[tuple[Span, int, bool] | None],
    noise: Noise,
    dz: Span | None,
    dkl: Span | None,
    elementwise: bool,
    dmean: Span,
    dlogvar: Span | None,
    dprior: list[tuple[Span, bool] | None],
    threads: int,
) -> None: ...

# --- nearest_code --------------------------------------------------------------------------------------------------

def nearest_code(
    dtype: str,
    x: Span,
    codebook: Span,
    sizes: tuple[int, int, int, int, int],
    metric: str,
    out: Span,
    threads: int,
) -> None: ...
def nearest_code_distances(
    dtype: str,
    x: Span,
    codebook: Span,
    indices: Span,
    sizes: tuple[int, int, int, int, int],
    metric: str,
    out: Span,
    threads: int,
) -> None: ...

# --- residual_nearest_code ------------------------------------------------------------------------------------------

def residual_nearest_code(
    dtype: str,
    x: Span,
    codebooks: Span,
    limits: Span | None,
    sizes: tuple[int, int, int, int, int, int],
    metric: str,
    indices: Span,
    quantized: Span,
    codes: Span,
    threads: int,
) -> None: ...
def residual_nearest_code_backward(
    dtype: str,
    of_quantized: Span,
    of_codes: Span,
    indices: Span,
    sizes: tuple[int, int, int, int, int, int],
    out: Span,
    threads: int,
) -> None: ...

# --- bernoulli_log_prob --------------------------------------------------------------------------------------------
Typed = tuple[int, int, str]

def bernoulli_log_prob(logits: Typed, x: Typed, columns: int, out: Span, threads: int) -> None: ...
def bernoulli_log_prob_backward(
    logits: Typed, x: Typed, grad: Span, columns: int, out: Typed, threads: int
) -> None: ...
def bernoulli_log_prob_f64(logits: Span, x: Span, columns: int, out: Span, threads: int) -> None: ...
def bernoulli_log_prob_backward_f64(
    logits: Span, x: Span, grad: Span, columns: int, out: Span, threads: int
) -> None: ...

# --- log-likelihoods -----------------------------------------------------------------------------------------------
Rows = tuple[int, int, str, int]

def continuous_bernoulli_log_prob(
    x: Rows, first: Rows, second: Rows | None, columns: int, out: Typed, threads: int
) -> None: ...
def continuous_bernoulli_log_prob_backward(
    x: Rows,
    first: Rows,
    second: Rows | None,
    columns: int,
    grad: Typed,
    d_first: Typed | None,
    d_second: Typed | None,
    threads: int,
) -> None: ...
def gaussian_log_prob(x: Rows, first: Rows, second: Rows | None, columns: int, out: Typed, threads: int) -> None: ...
def gaussian_log_prob_backward(
    x: Rows,
    first: Rows,
    second: Rows | None,
    columns: int,
    grad: Typed,
    d_first: Typed | None,
    d_second: Typed | None,
    threads: int,
) -> None: ...
def negative_binomial_log_prob(
    x: Rows, first: Rows, second: Rows | None, columns: int, out: Typed, threads: int
) -> None: ...
def negative_binomial_log_prob_backward(
    x: Rows,
    first: Rows,
    second: Rows | None,
    columns: int,
    grad: Typed,
    d_first: Typed | None,
    d_second: Typed | None,
    threads: int,
) -> None: ...
def poisson_log_prob(x: Rows, first: Rows, second: Rows | None, columns: int, out: Typed, threads: int) -> None: ...
def poisson_log_prob_backward(
    x: Rows,
    first: Rows,
    second: Rows | None,
    columns: int,
    grad: Typed,
    d_first: Typed | None,
    d_second: Typed | None,
    threads: int,
) -> None: ...
def categorical_log_prob(logits: Typed, x: Typed, sizes: tuple[int, int], out: Typed, threads: int) -> None: ...
def categorical_log_prob_backward(
    logits: Typed, x: Typed, sizes: tuple[int, int], grad: Typed, out: Typed, threads: int
) -> None: ...

# --- discretized_logistic_log_prob: (x, mean, log scale), (levels, columns) -----------------------------------------

def discretized_logistic_log_prob(
    data: tuple[Typed, Typed, Typed], sizes: tuple[int, int], out: Span, threads: int
) -> None: ...
def discretized_logistic_log_prob_backward(
    data: tuple[Typed, Typed, Typed], sizes: tuple[int, int], grad: Span, out: tuple[Typed, Typed], threads: int
) -> None: ...
def discretized_logistic_log_prob_f64(
    data: tuple[Span, Span, Span], sizes: tuple[int, int], out: Span, threads: int
) -> None: ...
def discretized_logistic_log_prob_backward_f64(
    data: tuple[Span, Span, Span], sizes: tuple[int, int], grad: Span, out: tuple[Span, Span], threads: int
) -> None: ...

# --- discretized_logistic_mixture_log_prob: (x, logits, means, log scales, coefficients), (images, M, pixels, levels) -

FiveSpans = tuple[Span, Span, Span, Span, Span]
FourSpans = tuple[Span, Span, Span, Span]

def discretized_logistic_mixture_log_prob(
    dtype: str, data: FiveSpans, sizes: tuple[int, int, int, int], floor: float, out: Span, threads: int
) -> None: ...
def discretized_logistic_mixture_log_prob_backward(
    dtype: str,
    data: FiveSpans,
    sizes: tuple[int, int, int, int],
    floor: float,
    grad: Span,
    out: FourSpans,
    threads: int,
) -> None: ...

# --- code_logsumexp, sample_code -----------------------------------------------------------------------------------
CodeSizes = tuple[int, int, int, int]

def code_logsumexp(
    x: Span,
    codebook: Span,
    bias: Span,
    sizes: CodeSizes,
    metric: str,
    inverse_temperature: float,
    out: Span,
    threads: int,
) -> None: ...
def code_probabilities(
    x: Span,
    codebook: Span,
    bias: Span,
    lse: Span,
    sizes: CodeSizes,
    metric: str,
    inverse_temperature: float,
    probabilities: Span,
    slopes: Span,
    threads: int,
) -> None: ...
def sample_code(
    x: Span,
    codebook: Span,
    bias: Span,
    sizes: CodeSizes,
    metric: str,
    inverse_temperature: float,
    noise: tuple[int, Span],
    out: Span,
    threads: int,
) -> None: ...

# --- code_sums -----------------------------------------------------------------------------------------------------

def code_sums(
    dtype: str,
    x: Span,
    indices: Span,
    weights: Span | None,
    sizes: tuple[int, int, int, int],
    sums: Span,
    counts: Span,
    threads: int,
) -> None: ...

# --- sign_code_entropy, sign_code_mean -----------------------------------------------------------------------------

def sign_code_entropy(dtype: str, x: Span, slope: float, threads: int) -> float: ...
def sign_code_entropy_backward(dtype: str, x: Span, grad: float, slope: float, out: Span, threads: int) -> None: ...
def sign_code_mean(dtype: str, x: Span, bits: int, slope: float, out: Span, threads: int) -> None: ...
def sign_code_mean_backward(
    dtype: str, x: Span, weights: Span, bits: int, slope: float, out: Span, threads: int
) -> None: ...

# --- evidence ------------------------------------------------------------------------------------------------------

class LogWeights:
    def __init__(self, rows: int, samples: int) -> None: ...
    def add_float64(self, values: Span, threads: int) -> int | None: ...
    def add_float32(self, values: Span, threads: int) -> int | None: ...
    def summaries(
        self, precision: float, threads: int
    ) -> list[tuple[float, float, float, float, float, float, bool, bool]]: ...

def good_khat(samples: int) -> float: ...

# --- data ----------------------------------------------------------------------------------------------------------

def idx_shape(path: str | PathLike[str], least: int, most: int) -> list[int]: ...
def idx_read(path: str | PathLike[str], shape: list[int], out: Span) -> None: ...
def npy_header(path: str | PathLike[str]) -> tuple[str, int, bool, bool, list[int], int]: ...

class Pipeline:
    """One pass over an epoch; see `ferrovae.data.passes`."""

    def __init__(
        self,
        owner: object,
        name: str,
        element: str,
        data: Span,
        width: int,
        labels: Span | None,
        shuffle: bool,
        seed: int,
        epoch: int,
        spec: tuple[str, float, float] | None,
        steps: tuple[int, int, bool, int, int],
        threads: int,
    ) -> None: ...
    @property
    def submitted(self) -> int: ...
    def submit(self, number: int, addresses: tuple[int, int, int, int], capacity: int, owner: object) -> bool: ...
    def take(self, step: int) -> tuple[int, int] | None: ...
    def close(self) -> None: ...
