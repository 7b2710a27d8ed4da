//! Binding of `sign_code_entropy` and its gradient.

use ferrovae_core::{Error, sign_code_entropy as core};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

fn unknown(dtype: &str) -> Error {
    Error::Argument(format!("sign_code_entropy: dtype {dtype:?} has no Rust kernel"))
}

/// The sum of the entropies of all bits.
#[pyfunction]
fn sign_code_entropy(py: Python<'_>, dtype: &str, x: Span, slope: f64, threads: usize) -> PyResult<f64> {
    py.detach(|| match dtype {
        // SAFETY: the Python layer passes a whole contiguous tensor of this element type and keeps it alive.
        "float32" => Ok(core::sign_code_entropy(unsafe { read::<f32>(x) }, slope, threads)),
        // SAFETY: as above.
        "float64" => Ok(core::sign_code_entropy(unsafe { read::<f64>(x) }, slope, threads)),
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

/// Writes the gradient in x of `grad` times that sum.
#[pyfunction]
fn sign_code_entropy_backward(
    py: Python<'_>,
    dtype: &str,
    x: Span,
    grad: f64,
    slope: f64,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| match dtype {
        "float32" => {
            // SAFETY: the Python layer passes whole contiguous tensors of this element type and keeps them alive.
            let (x, out) = unsafe { (read::<f32>(x), write::<f32>(out)) };
            core::sign_code_entropy_backward(x, grad, slope, out, threads)
        }
        "float64" => {
            // SAFETY: as above.
            let (x, out) = unsafe { (read::<f64>(x), write::<f64>(out)) };
            core::sign_code_entropy_backward(x, grad, slope, out, threads)
        }
        _ => Err(unknown(dtype)),
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sign_code_entropy, module)?)?;
    module.add_function(wrap_pyfunction!(sign_code_entropy_backward, module)?)
}
