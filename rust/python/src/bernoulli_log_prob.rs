//! Binding of `bernoulli_log_prob`.

use ferrovae_core::bernoulli_log_prob as core;
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};
use crate::typed::{Typed, values, values_mut};

#[pyfunction]
fn bernoulli_log_prob(
    py: Python<'_>,
    logits: Typed,
    x: Typed,
    columns: usize,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the caller keeps the tensors alive and unwritten, and `out` unread, until this returns.
    py.detach(|| unsafe { core::bernoulli_log_prob(values(logits)?, values(x)?, columns, write(out), threads) })
        .map_err(to_python)
}

#[pyfunction]
fn bernoulli_log_prob_backward(
    py: Python<'_>,
    logits: Typed,
    x: Typed,
    grad: Span,
    columns: usize,
    out: Typed,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: as above.
        let (logits, x, grad, out) = unsafe { (values(logits)?, values(x)?, read(grad), values_mut(out)?) };
        core::bernoulli_log_prob_backward(logits, x, grad, columns, out, threads)
    })
    .map_err(to_python)
}

#[pyfunction]
fn bernoulli_log_prob_f64(
    py: Python<'_>,
    logits: Span,
    x: Span,
    columns: usize,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: as above.
    py.detach(|| unsafe { core::bernoulli_log_prob_f64(read(logits), read(x), columns, write(out), threads) })
        .map_err(to_python)
}

#[pyfunction]
fn bernoulli_log_prob_backward_f64(
    py: Python<'_>,
    logits: Span,
    x: Span,
    grad: Span,
    columns: usize,
    out: Span,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        // SAFETY: as above.
        let (logits, x, grad, out) = unsafe { (read(logits), read(x), read(grad), write(out)) };
        core::bernoulli_log_prob_backward_f64(logits, x, grad, columns, out, threads)
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(bernoulli_log_prob, module)?)?;
    module.add_function(wrap_pyfunction!(bernoulli_log_prob_backward, module)?)?;
    module.add_function(wrap_pyfunction!(bernoulli_log_prob_f64, module)?)?;
    module.add_function(wrap_pyfunction!(bernoulli_log_prob_backward_f64, module)?)
}
