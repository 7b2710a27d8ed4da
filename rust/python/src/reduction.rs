//! What the bindings of the log-likelihoods share: typed tensors, and the two functions of one [`Density`].

use ferrovae_core::reduction::{self as core, Density, Numbers, NumbersMut, Operand, Operands};
use ferrovae_core::{Error, Result};
use half::{bf16, f16};

use crate::memory::{read, write};

/// Address, number of elements, and the element type's name in torch.
pub type Typed = (usize, usize, String);
/// The same, and the numbers in a row.
pub type Rows = (usize, usize, String, usize);

/// The tensor's numbers.
///
/// # Safety
/// As [`read`], with the type that is named.
pub unsafe fn numbers<'a>((address, length, dtype): Typed) -> Result<Numbers<'a>> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float64" => Ok(Numbers::F64(read::<f64>(span))),
            "float32" => Ok(Numbers::F32(read::<f32>(span))),
            "float16" => Ok(Numbers::F16(read::<f16>(span))),
            "bfloat16" => Ok(Numbers::Bf16(read::<bf16>(span))),
            "uint8" => Ok(Numbers::U8(read::<u8>(span))),
            "int64" => Ok(Numbers::I64(read::<i64>(span))),
            _ => Err(Error::Argument(format!("log_prob: numbers are {dtype}"))),
        }
    }
}

/// Room for numbers.
///
/// # Safety
/// As [`write`], with the type that is named.
pub unsafe fn numbers_mut<'a>((address, length, dtype): Typed) -> Result<NumbersMut<'a>> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float64" => Ok(NumbersMut::F64(write::<f64>(span))),
            "float32" => Ok(NumbersMut::F32(write::<f32>(span))),
            "float16" => Ok(NumbersMut::F16(write::<f16>(span))),
            "bfloat16" => Ok(NumbersMut::Bf16(write::<bf16>(span))),
            _ => Err(Error::Argument(format!("log_prob: results are {dtype}"))),
        }
    }
}

/// # Safety
/// As [`numbers`].
unsafe fn operands<'a>(x: Rows, first: Rows, second: Option<Rows>, columns: usize) -> Result<Operands<'a>> {
    let operand = |(address, length, dtype, width): Rows| -> Result<Operand<'a>> {
        // SAFETY: the caller's promise.
        Ok(Operand { numbers: unsafe { numbers((address, length, dtype)) }?, width })
    };
    let second = second.map_or(Ok(Operand::NONE), operand)?;
    Ok(Operands { x: operand(x)?, first: operand(first)?, second, columns })
}

/// Runs [`core::log_prob`].
///
/// # Safety
/// The spans are those of live tensors of the named types, the inputs unwritten and `out` unread until this returns.
pub unsafe fn log_prob<D: Density>(
    x: Rows,
    first: Rows,
    second: Option<Rows>,
    columns: usize,
    out: Typed,
    threads: usize,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (operands, out) = unsafe { (operands(x, first, second, columns)?, numbers_mut(out)?) };
    core::log_prob::<D>(operands, out, threads)
}

/// Runs [`core::gradients`].
///
/// # Safety
/// As [`log_prob`].
pub unsafe fn gradients<D: Density>(
    x: Rows,
    first: Rows,
    second: Option<Rows>,
    columns: usize,
    grad: Typed,
    d_first: Option<Typed>,
    d_second: Option<Typed>,
    threads: usize,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let (operands, grad) = unsafe { (operands(x, first, second, columns)?, numbers(grad)?) };
    // SAFETY: as above.
    let room = |typed| unsafe { numbers_mut(typed) };
    let (d_first, d_second) = (d_first.map(room).transpose()?, d_second.map(room).transpose()?);
    core::gradients::<D>(operands, grad, d_first, d_second, threads)
}

/// Declares `$name`, `$backward` and `register` for one density; the parameter it does not have is None.
macro_rules! bind_density {
    ($name:ident, $backward:ident, $density:ty) => {
        use pyo3::prelude::*;

        use crate::errors::to_python;
        use crate::reduction::{Rows, Typed, gradients, log_prob};

        #[pyfunction]
        fn $name(
            py: Python<'_>,
            x: Rows,
            first: Rows,
            second: Option<Rows>,
            columns: usize,
            out: Typed,
            threads: usize,
        ) -> PyResult<()> {
            // SAFETY: the caller keeps the tensors alive and unwritten, and `out` unread, until this returns.
            py.detach(|| unsafe { log_prob::<$density>(x, first, second, columns, out, threads) }).map_err(to_python)
        }

        #[pyfunction]
        fn $backward(
            py: Python<'_>,
            x: Rows,
            first: Rows,
            second: Option<Rows>,
            columns: usize,
            grad: Typed,
            d_first: Option<Typed>,
            d_second: Option<Typed>,
            threads: usize,
        ) -> PyResult<()> {
            py.detach(|| {
                // SAFETY: as above.
                unsafe { gradients::<$density>(x, first, second, columns, grad, d_first, d_second, threads) }
            })
            .map_err(to_python)
        }

        pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
            module.add_function(wrap_pyfunction!($name, module)?)?;
            module.add_function(wrap_pyfunction!($backward, module)?)
        }
    };
}
pub(crate) use bind_density;
