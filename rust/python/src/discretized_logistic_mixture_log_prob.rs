//! Binding of `discretized_logistic_mixture_log_prob`.

use ferrovae_core::Error;
use ferrovae_core::discretized_logistic_mixture_log_prob::{self as core, Mixture, MixtureGradients};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

/// x, logits, means, log scales, coefficients.
type Data = (Span, Span, Span, Span, Span);
/// The gradients in all but x.
type Gradients = (Span, Span, Span, Span);
/// Images, components, pixels, levels.
type Sizes = (usize, usize, usize, usize);

/// The numbers.
///
/// # Safety
/// As [`read`].
unsafe fn mixture<'a, T>(data: Data, (images, components, pixels, levels): Sizes, floor: f64) -> Mixture<'a, T> {
    // SAFETY: the caller's promise.
    unsafe {
        Mixture {
            x: read(data.0),
            logits: read(data.1),
            means: read(data.2),
            log_scales: read(data.3),
            coefficients: read(data.4),
            images,
            components,
            pixels,
            levels,
            floor,
        }
    }
}

/// Room for the gradients.
///
/// # Safety
/// As [`write`].
unsafe fn gradients<'a, T>(out: Gradients) -> MixtureGradients<'a, T> {
    // SAFETY: the caller's promise.
    unsafe {
        MixtureGradients {
            logits: write(out.0),
            means: write(out.1),
            log_scales: write(out.2),
            coefficients: write(out.3),
        }
    }
}

fn unknown(dtype: &str) -> Error {
    Error::Argument(format!("discretized_logistic_mixture_log_prob: numbers are {dtype}"))
}

#[pyfunction]
fn discretized_logistic_mixture_log_prob(
    py: Python<'_>,
    dtype: &str,
    data: Data,
    sizes: Sizes,
    floor: f64,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: the caller keeps the tensors alive and unwritten, and `out` unread, until this returns.
        unsafe {
            match dtype {
                "float32" => {
                    core::discretized_logistic_mixture_log_prob(mixture(data, sizes, floor), write(out), threads)
                }
                "float64" => {
                    core::discretized_logistic_mixture_log_prob_f64(mixture(data, sizes, floor), write(out), threads)
                }
                _ => Err(unknown(dtype)),
            }
        }
    })
    .map_err(to_python)
}

#[pyfunction]
fn discretized_logistic_mixture_log_prob_backward(
    py: Python<'_>,
    dtype: &str,
    data: Data,
    sizes: Sizes,
    floor: f64,
    grad: Span,
    out: Gradients,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: as above.
        unsafe {
            match dtype {
                "float32" => core::discretized_logistic_mixture_log_prob_backward(
                    mixture(data, sizes, floor),
                    read(grad),
                    gradients(out),
                    threads,
                ),
                "float64" => core::discretized_logistic_mixture_log_prob_backward_f64(
                    mixture(data, sizes, floor),
                    read(grad),
                    gradients(out),
                ),
                _ => Err(unknown(dtype)),
            }
        }
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(discretized_logistic_mixture_log_prob, module)?)?;
    module.add_function(wrap_pyfunction!(discretized_logistic_mixture_log_prob_backward, module)?)
}
