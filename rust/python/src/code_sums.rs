//! Binding of `code_sums`.

use ferrovae_core::code_sums::{Element, Shape, Total, code_sums as core};
use ferrovae_core::{Error, Result};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

/// Writes sums [H, K, D] and counts [H, K], float64 for float64 rows and float32 for all others; weights are float64.
#[pyfunction]
fn code_sums(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    indices: Span,
    weights: Option<Span>,
    sizes: (usize, usize, usize, usize),
    sums: Span,
    counts: Span,
    threads: usize,
) -> PyResult<()> {
    fn add<X: Element, O: Total>(
        x: Span,
        indices: Span,
        weights: Option<Span>,
        shape: Shape,
        sums: Span,
        counts: Span,
        threads: usize,
    ) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
        let (x, indices) = unsafe { (read::<X>(x), read::<i64>(indices)) };
        // SAFETY: as above.
        let weights = weights.map(|weights| unsafe { read::<f64>(weights) });
        // SAFETY: as above; these two were made for this call.
        let (sums, counts) = unsafe { (write::<O>(sums), write::<O>(counts)) };
        core(x, indices, weights, shape, sums, counts, threads)
    }
    let (heads, rows, codes, dims) = sizes;
    let shape = Shape { heads, rows, codes, dims };
    py.detach(|| match dtype {
        "float32" => add::<f32, f32>(x, indices, weights, shape, sums, counts, threads),
        "bfloat16" => add::<bf16, f32>(x, indices, weights, shape, sums, counts, threads),
        "float16" => add::<f16, f32>(x, indices, weights, shape, sums, counts, threads),
        "float64" => add::<f64, f64>(x, indices, weights, shape, sums, counts, threads),
        _ => Err(Error::Argument(format!("code_sums: dtype {dtype:?} has no Rust kernel"))),
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(code_sums, module)?)
}
