//! Binding of `residual_nearest_code` and its gradient.

use ferrovae_core::nearest_code::{Metric, Row};
use ferrovae_core::residual_nearest_code::{self as core, Inputs, Number, Outputs, Shape};
use ferrovae_core::{Error, Result};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

type Sizes = (usize, usize, usize, usize, usize, usize);

fn shape((groups, rows, stages, books, codes, dims): Sizes) -> Shape {
    Shape { groups, rows, stages, books, codes, dims }
}

fn unknown(dtype: &str) -> Error {
    Error::Argument(format!("residual_nearest_code: dtype {dtype:?} has no Rust kernel"))
}

/// Writes indices, quantized and (unless empty) codes; codebooks and results are float64 for float64 rows, else float32.
#[pyfunction]
fn residual_nearest_code(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    codebooks: Span,
    limits: Option<Span>,
    sizes: Sizes,
    metric: &str,
    indices: Span,
    quantized: Span,
    codes: Span,
    threads: usize,
) -> PyResult<()> {
    let (shape, metric) = (shape(sizes), Metric::from_name(metric).map_err(to_python)?);
    // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
    let limits = limits.map(|limits| unsafe { read::<i64>(limits) });
    // SAFETY: as above.
    let indices = unsafe { write::<i64>(indices) };
    let inputs_and_outputs = (x, codebooks, limits, indices, quantized, codes);
    py.detach(|| match dtype {
        "float32" => run::<f32>(inputs_and_outputs, shape, metric, threads),
        "bfloat16" => run::<bf16>(inputs_and_outputs, shape, metric, threads),
        "float16" => run::<f16>(inputs_and_outputs, shape, metric, threads),
        "float64" => {
            let (inputs, outputs) = borrow::<f64, f64>(inputs_and_outputs);
            core::residual_nearest_code_f64(inputs, shape, metric, outputs, threads)
        }
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

type Borrowed<'a> = (Span, Span, Option<&'a [i64]>, &'a mut [i64], Span, Span);

fn borrow<X, E>((x, codebooks, limits, indices, quantized, codes): Borrowed<'_>) -> (Inputs<'_, X, E>, Outputs<'_, E>) {
    // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
    let (x, codebooks) = unsafe { (read::<X>(x), read::<E>(codebooks)) };
    // SAFETY: as above.
    let (quantized, codes) = unsafe { (write::<E>(quantized), write::<E>(codes)) };
    (Inputs { x, codebooks, limits }, Outputs { indices, quantized, codes })
}

fn run<X: Row>(borrowed: Borrowed<'_>, shape: Shape, metric: Metric, threads: usize) -> Result<()> {
    let (inputs, outputs) = borrow::<X, f32>(borrowed);
    core::residual_nearest_code(inputs, shape, metric, outputs, threads)
}

/// Writes the gradient [G, Q, K, D] in the codebooks; `dtype` is that of all gradients.
#[pyfunction]
fn residual_nearest_code_backward(
    py: Python<'_>,
    dtype: &str,
    of_quantized: Span,
    of_codes: Span,
    indices: Span,
    sizes: Sizes,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    fn run<E: Number>(
        of_quantized: Span,
        of_codes: Span,
        indices: Span,
        shape: Shape,
        out: Span,
        threads: usize,
    ) -> Result<()> {
        // SAFETY: the Python layer passes whole contiguous tensors of these element types and keeps them alive.
        let (of_quantized, of_codes) = unsafe { (read::<E>(of_quantized), read::<E>(of_codes)) };
        // SAFETY: as above.
        let (indices, out) = unsafe { (read::<i64>(indices), write::<E>(out)) };
        core::gradients(of_quantized, of_codes, indices, shape, out, threads)
    }
    let shape = shape(sizes);
    py.detach(|| match dtype {
        "float32" => run::<f32>(of_quantized, of_codes, indices, shape, out, threads),
        "float64" => run::<f64>(of_quantized, of_codes, indices, shape, out, threads),
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(residual_nearest_code, module)?)?;
    module.add_function(wrap_pyfunction!(residual_nearest_code_backward, module)?)
}
