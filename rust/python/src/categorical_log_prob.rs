//! Binding of `categorical_log_prob`.

use ferrovae_core::categorical_log_prob::{self as core, Classes, Logits, Shape};
use ferrovae_core::reduction::{Numbers, NumbersMut};
use ferrovae_core::values::Values;
use ferrovae_core::{Error, Result};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::read;
use crate::reduction::{Typed, numbers, numbers_mut};

/// Classes and positions.
type Sizes = (usize, usize);

/// The classes of x.
///
/// # Safety
/// As [`read`], with the type that is named.
unsafe fn classes<'a>((address, length, dtype): Typed) -> Result<Classes<'a>> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "uint8" => Ok(Classes::U8(read(span))),
            "int64" => Ok(Classes::I64(read(span))),
            _ => Err(Error::Argument(format!("categorical_log_prob: classes are {dtype}"))),
        }
    }
}

/// Writes the log-likelihoods, or with `grad` the gradients.
fn run<S: Logits>(
    logits: S,
    x: Classes,
    (classes, positions): Sizes,
    grad: Option<Numbers>,
    out: NumbersMut,
    threads: usize,
) -> Result<()> {
    let shape = Shape { classes, positions };
    match grad {
        None => core::categorical_log_prob(logits, x, shape, out, threads),
        Some(grad) => core::categorical_log_prob_backward(logits, x, shape, grad, out, threads),
    }
}

/// # Safety
/// As [`read`] of all the tensors, and `out` is unread.
unsafe fn dispatch(
    (address, length, dtype): Typed,
    x: Typed,
    sizes: Sizes,
    grad: Option<Typed>,
    out: Typed,
    threads: usize,
) -> Result<()> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        let (x, out, grad) = (classes(x)?, numbers_mut(out)?, grad.map(|grad| numbers(grad)).transpose()?);
        match dtype.as_str() {
            "float64" => run(read::<f64>(span), x, sizes, grad, out, threads),
            "float32" => run(Values::F32(read::<f32>(span)), x, sizes, grad, out, threads),
            "float16" => run(Values::F16(read::<f16>(span)), x, sizes, grad, out, threads),
            "bfloat16" => run(Values::Bf16(read::<bf16>(span)), x, sizes, grad, out, threads),
            _ => Err(Error::Argument(format!("categorical_log_prob: logits are {dtype}"))),
        }
    }
}

#[pyfunction]
fn categorical_log_prob(
    py: Python<'_>,
    logits: Typed,
    x: Typed,
    sizes: Sizes,
    out: Typed,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the caller keeps the tensors alive and unwritten, and `out` unread, until this returns.
    py.detach(|| unsafe { dispatch(logits, x, sizes, None, out, threads) }).map_err(to_python)
}

#[pyfunction]
fn categorical_log_prob_backward(
    py: Python<'_>,
    logits: Typed,
    x: Typed,
    sizes: Sizes,
    grad: Typed,
    out: Typed,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: as above.
    py.detach(|| unsafe { dispatch(logits, x, sizes, Some(grad), out, threads) }).map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(categorical_log_prob, module)?)?;
    module.add_function(wrap_pyfunction!(categorical_log_prob_backward, module)?)
}
