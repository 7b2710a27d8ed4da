//! Binding of `sample_code`.

use ferrovae_core::sample_code as core;
use pyo3::prelude::*;

use crate::code_logsumexp::{Sizes, scoring, shape};
use crate::errors::to_python;
use crate::memory::{Span, read, write};

/// float32 x [H, N, D], codebook [H, K, D], bias [H, K]; noise: key and int64 row ids [N] -> int64 out [H, N].
#[pyfunction]
fn sample_code(
    py: Python<'_>,
    x: Span,
    codebook: Span,
    bias: Span,
    sizes: Sizes,
    metric: &str,
    inverse_temperature: f32,
    noise: (i64, Span),
    out: Span,
    threads: usize,
) -> PyResult<()> {
    let scoring = scoring(metric, inverse_temperature)?;
    let (key, row_ids) = (noise.0.cast_unsigned(), noise.1);
    // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
    py.detach(|| unsafe {
        let noise = core::Noise { key, row_ids: read(row_ids) };
        core::sample_code(read(x), read(codebook), read(bias), shape(sizes), scoring, noise, write(out), threads)
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sample_code, module)?)
}
