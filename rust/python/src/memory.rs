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

/// As [`write()`], for results that may be large and not yet backed by memory: asks for huge pages, of which the first
/// write to each costs one fault instead of 512.
///
/// # Safety
/// As [`write()`].
pub unsafe fn write_new<'a, T>(span: Span) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    let values = unsafe { write(span) };
    ask_for_huge_pages(values);
    values
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(values: &mut [T]) {
    use std::ffi::{c_int, c_void};

    const HUGE_PAGE: usize = 1 << 21;
    /// Less than this comes from pages that the allocator has used before.
    const LEAST: usize = 2 * HUGE_PAGE;
    const MADV_HUGEPAGE: c_int = 14;

    unsafe extern "C" {
        fn madvise(start: *mut c_void, length: usize, advice: c_int) -> c_int;
    }

    let size = size_of_val(values);
    let before = values.as_mut_ptr().cast::<u8>().align_offset(HUGE_PAGE);
    if size < LEAST || before >= size {
        return;
    }
    let inner = (size - before) / HUGE_PAGE * HUGE_PAGE;
    // SAFETY: whole pages inside the slice. The advice changes no content and no mapping, only the size of pages to
    // come, and may be refused: it leaves the allocator that owns the memory everything it had.
    let _ = unsafe { madvise(values.as_mut_ptr().cast::<u8>().add(before).cast(), inner, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &mut [T]) {}
