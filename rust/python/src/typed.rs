//! Borrowing tensors whose element type is known at run time only.

use ferrovae_core::Error;
use ferrovae_core::values::{Values, ValuesMut};

use crate::memory::{read, write};

/// Address, number of elements, and the element type's name in torch.
pub type Typed = (usize, usize, String);

/// The tensor's numbers.
///
/// # Safety
/// As [`read`], with the type that is named.
pub unsafe fn values<'a>((address, length, dtype): Typed) -> Result<Values<'a>, Error> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float32" => Ok(Values::F32(read(span))),
            "float16" => Ok(Values::F16(read(span))),
            "bfloat16" => Ok(Values::Bf16(read(span))),
            "uint8" => Ok(Values::U8(read(span))),
            _ => Err(Error::Argument(format!("numbers are {dtype}"))),
        }
    }
}

/// Room for numbers.
///
/// # Safety
/// As [`write`], with the type that is named.
pub unsafe fn values_mut<'a>((address, length, dtype): Typed) -> Result<ValuesMut<'a>, Error> {
    let span = (address, length);
    // SAFETY: the caller's promise.
    unsafe {
        match dtype.as_str() {
            "float32" => Ok(ValuesMut::F32(write(span))),
            "float16" => Ok(ValuesMut::F16(write(span))),
            "bfloat16" => Ok(ValuesMut::Bf16(write(span))),
            _ => Err(Error::Argument(format!("results are {dtype}"))),
        }
    }
}
