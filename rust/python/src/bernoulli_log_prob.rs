//! Binding of `bernoulli_log_prob`.

use ferrovae_core::values::{Values, ValuesMut};
use ferrovae_core::{Error, bernoulli_log_prob as core};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write};

/// Address, number of elements, and the element type's name in torch.
type Typed = (usize, usize, String);

/// The tensor's numbers.
///
/// # Safety
/// As [`read`], with the type that is named.
unsafe fn values<'a>((address, length, dtype): Typed) -> Result<Values<'a>, Error> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float32" => Ok(Values::F32(read(span))),
            "float16" => Ok(Values::F16(read(span))),
            "bfloat16" => Ok(Values::Bf16(read(span))),
            "uint8" => Ok(Values::U8(read(span))),
            _ => Err(Error::Argument(format!("bernoulli_log_prob: numbers are {dtype}"))),
        }
    }
}

/// Room for numbers.
///
/// # Safety
/// As [`write`], with the type that is named.
unsafe fn values_mut<'a>((address, length, dtype): Typed) -> Result<ValuesMut<'a>, Error> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float32" => Ok(ValuesMut::F32(write(span))),
            "float16" => Ok(ValuesMut::F16(write(span))),
            "bfloat16" => Ok(ValuesMut::Bf16(write(span))),
            _ => Err(Error::Argument(format!("bernoulli_log_prob: results are {dtype}"))),
        }
    }
}

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
