//! Borrowing the memory of torch tensors: Python passes `(address, length)` of a contiguous tensor it keeps alive.

use std::slice;

/// `(tensor.data_ptr(), number of elements)`.
pub type Span = (usize, usize);

/// The tensor's elements.
///
/// # Safety
/// The span must be the whole of live, initialised, contiguous memory of `T` that nothing writes during the call.
pub unsafe fn read<'a, T>((address, length): Span) -> &'a [T] {
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller's promise; torch aligns its allocations and views to the element size.
    unsafe { slice::from_raw_parts(address as *const T, length) }
}

/// The tensor's elements, to be written.
///
/// # Safety
/// As [`read`], and nothing else reads or writes the memory during the call.
pub unsafe fn write<'a, T>((address, length): Span) -> &'a mut [T] {
    if length == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise; torch aligns its allocations and views to the element size.
    unsafe { slice::from_raw_parts_mut(address as *mut T, length) }
}
