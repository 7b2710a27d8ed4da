//! Binding of `sign_code_mean` and its gradient.

use ferrovae_core::sign_code_mean::{self as core, Real};
use ferrovae_core::{Error, Result};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

fn unknown(dtype: &str) -> Error {
    Error::Argument(format!("sign_code_mean: dtype {dtype:?} has no Rust kernel"))
}

/// Writes the mean distribution [2^bits] of rows x [N, bits].
#[pyfunction]
fn sign_code_mean(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    bits: usize,
    slope: f64,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    fn mean<T: Real>(x: Span, bits: usize, slope: f64, out: Span, threads: usize) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of this element type and keeps them alive.
        let (x, out) = unsafe { (read::<T>(x), write::<T>(out)) };
        core::sign_code_mean(x, bits, slope, out, threads)
    }
    py.detach(|| match dtype {
        "float32" => mean::<f32>(x, bits, slope, out, threads),
        "float64" => mean::<f64>(x, bits, slope, out, threads),
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

/// Writes the gradient in x of the sum of weights [2^bits] times that distribution.
#[pyfunction]
fn sign_code_mean_backward(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    weights: Span,
    bits: usize,
    slope: f64,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    fn gradient<T: Real>(x: Span, weights: Span, bits: usize, slope: f64, out: Span, threads: usize) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of this element type and keeps them alive.
        let (x, weights, out) = unsafe { (read::<T>(x), read::<T>(weights), write::<T>(out)) };
        core::sign_code_mean_backward(x, weights, bits, slope, out, threads)
    }
    py.detach(|| match dtype {
        "float32" => gradient::<f32>(x, weights, bits, slope, out, threads),
        "float64" => gradient::<f64>(x, weights, bits, slope, out, threads),
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sign_code_mean, module)?)?;
    module.add_function(wrap_pyfunction!(sign_code_mean_backward, module)?)
}
