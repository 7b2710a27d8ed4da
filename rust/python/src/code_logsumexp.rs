//! Binding of `code_logsumexp` and `code_probabilities`.

use ferrovae_core::code_logsumexp as core;
use ferrovae_core::code_scores::{Scoring, Shape};
use ferrovae_core::nearest_code::Metric;
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

pub type Sizes = (usize, usize, usize, usize);

/// H, N, K, D.
pub fn shape((heads, rows, codes, dims): Sizes) -> Shape {
    Shape { heads, rows, codes, dims }
}

/// The metric of that name over a temperature.
pub fn scoring(metric: &str, inverse_temperature: f32) -> PyResult<Scoring> {
    Ok(Scoring { metric: Metric::from_name(metric).map_err(to_python)?, inverse_temperature })
}

/// float32 x [H, N, D], codebook [H, K, D], bias [H, K] -> out [H, N].
#[pyfunction]
fn code_logsumexp(
    py: Python<'_>,
    x: Span,
    codebook: Span,
    bias: Span,
    sizes: Sizes,
    metric: &str,
    inverse_temperature: f32,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    let scoring = scoring(metric, inverse_temperature)?;
    // SAFETY: the Python layer passes whole contiguous float32 tensors and keeps them alive.
    py.detach(|| unsafe {
        core::code_logsumexp(read(x), read(codebook), read(bias), shape(sizes), scoring, write(out), threads)
    })
    .map_err(to_python)
}

/// One head: float32 x [N, D], codebook [K, D], bias [K], lse [N] -> probabilities [N, K], slopes [N, K] or empty.
#[pyfunction]
fn code_probabilities(
    py: Python<'_>,
    x: Span,
    codebook: Span,
    bias: Span,
    lse: Span,
    sizes: Sizes,
    metric: &str,
    inverse_temperature: f32,
    probabilities: Span,
    slopes: Span,
    threads: usize,
) -> PyResult<()> {
    let scoring = scoring(metric, inverse_temperature)?;
    // SAFETY: the Python layer passes whole contiguous float32 tensors and keeps them alive.
    py.detach(|| unsafe {
        let (x, codebook, bias, lse) = (read(x), read(codebook), read(bias), read(lse));
        let (probabilities, slopes) = (write(probabilities), write(slopes));
        core::code_probabilities(x, codebook, bias, lse, shape(sizes), scoring, probabilities, slopes, threads)
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(code_logsumexp, module)?)?;
    module.add_function(wrap_pyfunction!(code_probabilities, module)?)
}
