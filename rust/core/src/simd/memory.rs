//! How kernels meet memory: buffers of whole lines, asking in advance, writing past the caches.

/// Bytes of a line of the cache.
pub const LINE: usize = 64;

/// A buffer that begins where a vector of any level may: none of its vectors lies on two lines of the cache.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Aligned<T>(pub T);

/// Asks for a slice that will soon be read: the processor's own guesses end with every page.
#[inline(always)]
pub fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let (start, mut at) = (values.as_ptr().cast::<i8>(), 0);
        while at < size_of_val(values) {
            // SAFETY: inside the slice; a prefetch has no effect that could be seen.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.add(at)) };
            at += LINE;
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// Copies past the caches, for results that are too many to be found there later: their old content is not read first.
/// Whole lines go that way, what is left the usual one. [`streamed`] must follow before another thread reads them.
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn stream<T: Copy>(from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "copies from one length to another");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        if to.as_ptr().cast::<u8>().align_offset(LINE) == 0 && size_of_val(from).is_multiple_of(LINE) {
            let (count, from, to) =
                (size_of_val(from) / 16, from.as_ptr().cast::<__m128i>(), to.as_mut_ptr().cast::<__m128i>());
            let mut at = 0;
            while at < count {
                // SAFETY: `at` is inside both slices, `to` is aligned, and SSE2 is in the baseline.
                unsafe { _mm_stream_si128(to.add(at), _mm_loadu_si128(from.add(at))) };
                at += 1;
            }
            return;
        }
    }
    to.copy_from_slice(from);
}

/// Ends a thread's part of streaming: what it has written is in place for all others.
#[inline(always)]
pub fn streamed() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is in the baseline.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_copy_everything_and_nothing_else() {
        let from: Vec<u16> = (0..4096).collect();
        for start in [0, 1, 31, 32, 64] {
            for length in [0, 1, 8, 32, 33, 256, 1024] {
                let mut room = Aligned([u16::MAX; 2048]);
                stream(&from[start..start + length], &mut room.0[start..start + length]);
                streamed();
                let (before, rest) = room.0.split_at(start);
                let (written, after) = rest.split_at(length);
                assert_eq!(written, &from[start..start + length]);
                assert!(before.iter().chain(after).all(|&value| value == u16::MAX), "{start}, {length}");
            }
        }
    }
}
