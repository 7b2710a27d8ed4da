//! Binding of `discretized_logistic_log_prob`.

use ferrovae_core::discretized_logistic_log_prob::{self as core, Logistics, Logistics64};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};
use crate::typed::{Typed, values, values_mut};

/// The numbers of x, mean and log scale, and the sizes (levels, columns).
///
/// # Safety
/// As [`values`].
unsafe fn logistics<'a>(
    (x, mean, log_scale): (Typed, Typed, Typed),
    (levels, columns): (usize, usize),
) -> Result<Logistics<'a>, ferrovae_core::Error> {
    // SAFETY: the caller's promise.
    unsafe { Ok(Logistics { x: values(x)?, mean: values(mean)?, log_scale: values(log_scale)?, levels, columns }) }
}

/// The same in double precision.
///
/// # Safety
/// As [`read`].
unsafe fn logistics_f64<'a>(
    (x, mean, log_scale): (Span, Span, Span),
    (levels, columns): (usize, usize),
) -> Logistics64<'a> {
    // SAFETY: the caller's promise.
    unsafe { Logistics64 { x: read(x), mean: read(mean), log_scale: read(log_scale), levels, columns } }
}

#[pyfunction]
fn discretized_logistic_log_prob(
    py: Python<'_>,
    data: (Typed, Typed, Typed),
    sizes: (usize, usize),
    out: Span,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the caller keeps the tensors alive and unwritten, and `out` unread, until this returns.
    py.detach(|| unsafe { core::discretized_logistic_log_prob(logistics(data, sizes)?, write(out), threads) })
        .map_err(to_python)
}

#[pyfunction]
fn discretized_logistic_log_prob_backward(
    py: Python<'_>,
    data: (Typed, Typed, Typed),
    sizes: (usize, usize),
    grad: Span,
    out: (Typed, Typed),
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: as above.
        let (data, grad, out) =
            unsafe { (logistics(data, sizes)?, read(grad), [values_mut(out.0)?, values_mut(out.1)?]) };
        core::discretized_logistic_log_prob_backward(data, grad, out, threads)
    })
    .map_err(to_python)
}

#[pyfunction]
fn discretized_logistic_log_prob_f64(
    py: Python<'_>,
    data: (Span, Span, Span),
    sizes: (usize, usize),
    out: Span,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: as above.
    py.detach(|| unsafe { core::discretized_logistic_log_prob_f64(logistics_f64(data, sizes), write(out), threads) })
        .map_err(to_python)
}

#[pyfunction]
fn discretized_logistic_log_prob_backward_f64(
    py: Python<'_>,
    data: (Span, Span, Span),
    sizes: (usize, usize),
    grad: Span,
    out: (Span, Span),
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: as above.
        let (data, grad, out) = unsafe { (logistics_f64(data, sizes), read(grad), [write(out.0), write(out.1)]) };
        core::discretized_logistic_log_prob_backward_f64(data, grad, out, threads)
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(discretized_logistic_log_prob, module)?)?;
    module.add_function(wrap_pyfunction!(discretized_logistic_log_prob_backward, module)?)?;
    module.add_function(wrap_pyfunction!(discretized_logistic_log_prob_f64, module)?)?;
    module.add_function(wrap_pyfunction!(discretized_logistic_log_prob_backward_f64, module)?)
}
