//! Binding of `nearest_code` and `nearest_code_distances`.

use ferrovae_core::nearest_code::{self as core, Metric, Real, Row, Shape};
use ferrovae_core::{Error, Result};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

type Sizes = (usize, usize, usize, usize, usize);

fn shape((heads, rows, codes, dims, count): Sizes) -> Shape {
    Shape { heads, rows, codes, dims, count }
}

fn unknown(dtype: &str) -> Error {
    Error::Argument(format!("nearest_code: dtype {dtype:?} has no Rust kernel"))
}

/// Writes int64 indices [H, N, k]; the codebook is float64 for float64 rows and float32 for all others.
#[pyfunction]
fn nearest_code(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    codebook: Span,
    sizes: Sizes,
    metric: &str,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    fn search<X: Row>(x: Span, codebook: Span, shape: Shape, metric: Metric, out: Span, threads: usize) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
        let (x, codebook, out) = unsafe { (read::<X>(x), read::<f32>(codebook), write::<i64>(out)) };
        core::nearest_code(x, codebook, shape, metric, out, threads)
    }
    let (shape, metric) = (shape(sizes), Metric::from_name(metric).map_err(to_python)?);
    py.detach(|| match dtype {
        "float32" => search::<f32>(x, codebook, shape, metric, out, threads),
        "bfloat16" => search::<bf16>(x, codebook, shape, metric, out, threads),
        "float16" => search::<f16>(x, codebook, shape, metric, out, threads),
        "float64" => {
            // SAFETY: as above.
            let (x, codebook, out) = unsafe { (read::<f64>(x), read::<f64>(codebook), write::<i64>(out)) };
            core::nearest_code_f64(x, codebook, shape, metric, out, threads)
        }
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

/// Writes the distances [H, N, k] of int64 `indices`: float64 for float64 rows, float32 for all others.
#[pyfunction]
fn nearest_code_distances(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    codebook: Span,
    indices: Span,
    sizes: Sizes,
    metric: &str,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    fn measure<X: Real>(
        x: Span,
        codebook: Span,
        indices: Span,
        shape: Shape,
        metric: Metric,
        out: Span,
        threads: usize,
    ) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
        let (x, codebook) = unsafe { (read::<X>(x), read::<f32>(codebook)) };
        // SAFETY: as above.
        let (indices, out) = unsafe { (read::<i64>(indices), write::<f32>(out)) };
        core::distances(x, codebook, indices, shape, metric, |value| value as f32, out, threads)
    }
    let (shape, metric) = (shape(sizes), Metric::from_name(metric).map_err(to_python)?);
    py.detach(|| match dtype {
        "float32" => measure::<f32>(x, codebook, indices, shape, metric, out, threads),
        "bfloat16" => measure::<bf16>(x, codebook, indices, shape, metric, out, threads),
        "float16" => measure::<f16>(x, codebook, indices, shape, metric, out, threads),
        "float64" => {
            // SAFETY: as above.
            let (x, codebook) = unsafe { (read::<f64>(x), read::<f64>(codebook)) };
            // SAFETY: as above.
            let (indices, out) = unsafe { (read::<i64>(indices), write::<f64>(out)) };
            core::distances(x, codebook, indices, shape, metric, |value| value, out, threads)
        }
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(nearest_code, module)?)?;
    module.add_function(wrap_pyfunction!(nearest_code_distances, module)?)
}
