//! Strided rows to read from, and memory that threads write disjoint parts of.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::number::Number;
use super::{UNIT, Unit};
use crate::simd::{LINE, prefetch, stream};
use crate::{Error, Result};

/// Bytes of a result beyond which it is not found in a cache later.
const STREAM: usize = 8 << 20;

/// Where the elements of `[examples, segments, inner]` lie; the elements of a segment lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// N.
    pub examples: usize,
    /// Segments of an example.
    pub segments: usize,
    /// Columns of a segment.
    pub inner: usize,
    /// Elements from one example to the next.
    pub example_stride: usize,
    /// Elements from one segment to the next.
    pub segment_stride: usize,
}

impl Layout {
    /// Columns of an example.
    pub fn columns(&self) -> usize {
        self.segments * self.inner
    }

    /// The same rows without gaps.
    #[must_use]
    pub fn contiguous(self) -> Self {
        Self { segments: 1, inner: self.columns(), example_stride: self.columns(), segment_stride: 0, ..self }
    }

    /// What must agree between tensors.
    pub fn shape(&self) -> [usize; 3] {
        [self.examples, self.segments, self.inner]
    }

    /// The elements from the first to the last, both included.
    fn extent(&self) -> usize {
        if self.examples * self.columns() == 0 {
            return 0;
        }
        (self.examples - 1) * self.example_stride + (self.segments - 1) * self.segment_stride + self.inner
    }

    /// Calls `run(offset in memory, offset in the unit's buffers, length)` for every stretch of the unit.
    #[inline(always)]
    fn stretches(&self, unit: &Unit, mut run: impl FnMut(usize, usize, usize)) {
        if self.segments == 1 && self.example_stride == unit.width && unit.columns.len() == unit.width {
            run(unit.examples.start * self.example_stride + unit.columns.start, 0, unit.size());
            return;
        }
        for (row, example) in unit.examples.clone().enumerate() {
            let mut column = unit.columns.start;
            while column < unit.columns.end {
                let (segment, place) =
                    if self.segments == 1 { (0, column) } else { (column / self.inner, column % self.inner) };
                let length = (self.inner - place).min(unit.columns.end - column);
                run(
                    example * self.example_stride + segment * self.segment_stride + place,
                    row * unit.width + column - unit.columns.start,
                    length,
                );
                column += length;
            }
        }
    }
}

/// A tensor to read.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, T> {
    values: &'a [T],
    layout: Layout,
}

impl<'a, T> Rows<'a, T> {
    /// An error when the layout reaches beyond the values.
    pub fn new(values: &'a [T], layout: Layout) -> Result<Self> {
        if values.len() < layout.extent() {
            return Err(Error::Argument(format!(
                "reparameterize_kl: {} elements, expected at least {} for {:?}",
                values.len(),
                layout.extent(),
                layout.shape()
            )));
        }
        Ok(Self { values, layout })
    }

    /// Rows without gaps; reading panics where values are missing.
    pub(super) fn part(values: &'a [T], like: Layout) -> Self {
        Self { values, layout: like.contiguous() }
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

impl<T: Number> Rows<'_, T> {
    /// Asks for what [`Self::read`] of this unit will read.
    #[inline(always)]
    pub(super) fn expect(&self, unit: &Unit) {
        self.layout.stretches(
            unit,
            #[inline(always)]
            |from, _, length| prefetch(&self.values[from..][..length]),
        );
    }

    /// Into a unit's buffer.
    #[inline(always)]
    pub(super) fn read(&self, unit: &Unit, buffer: &mut [T::Work; UNIT]) {
        self.layout.stretches(
            unit,
            #[inline(always)]
            |from, to, length| {
                let (from, to) = (&self.values[from..][..length], &mut buffer[to..][..length]);
                let mut at = 0;
                while at < length {
                    to[at] = from[at].work();
                    at += 1;
                }
            },
        );
    }
}

/// Contiguous room for the gradients of mean and logvar.
#[derive(Debug)]
pub enum Gradients<'a, T> {
    /// Two tensors `[examples, columns]`.
    Pair(&'a mut [T], &'a mut [T]),
    /// The moments' `[examples, segments, 2, inner]`.
    Moments(&'a mut [T]),
}

impl<'a, T: Number> Gradients<'a, T> {
    /// Where the gradients of mean and logvar go.
    pub(super) fn targets(self, like: Layout) -> Result<[Target<'a, T>; 2]> {
        let size = like.examples * like.columns();
        match self {
            Self::Pair(mean, logvar) => {
                super::expect("dmean", mean.len(), size)?;
                super::expect("dlogvar", logvar.len(), size)?;
                Ok([mean, logvar].map(|memory| Target::rows(Shared::new(memory), 0, like)))
            }
            Self::Moments(moments) => {
                super::expect("dmoments", moments.len(), 2 * size)?;
                let layout = Layout { example_stride: 2 * like.columns(), segment_stride: 2 * like.inner, ..like };
                let memory = Shared::new(moments);
                Ok([0, like.inner].map(|start| Target::new(memory, start, layout)))
            }
        }
    }
}

/// Strided memory to write.
#[derive(Clone, Copy)]
pub(super) struct Target<'a, T> {
    memory: Shared<'a, T>,
    start: usize,
    layout: Layout,
    /// Whether it is written past the caches.
    streams: bool,
}

impl<'a, T: Number> Target<'a, T> {
    fn new(memory: Shared<'a, T>, start: usize, layout: Layout) -> Self {
        let steps = [layout.inner, layout.example_stride, layout.segment_stride].map(|step| step * size_of::<T>());
        let lines = memory.start.align_offset(LINE) == 0
            && (start * size_of::<T>()).is_multiple_of(LINE)
            && steps.iter().all(|step| step.is_multiple_of(LINE));
        Self { memory, start, layout, streams: lines && memory.length * size_of::<T>() > STREAM }
    }

    /// Rows without gaps, from `start` on.
    pub(super) fn rows(memory: Shared<'a, T>, start: usize, like: Layout) -> Self {
        Self::new(memory, start, like.contiguous())
    }

    /// Asks for the memory that [`Self::write`] of this unit will write.
    #[inline(always)]
    pub(super) fn expect(&self, unit: &Unit) {
        if self.streams {
            return;
        }
        self.layout.stretches(
            unit,
            #[inline(always)]
            |to, _, length| self.memory.prefetch(self.start + to, length),
        );
    }

    /// A unit's buffer.
    ///
    /// # Safety
    /// Nobody else reads or writes the unit's elements at the same time.
    #[inline(always)]
    pub(super) unsafe fn write(&self, unit: &Unit, buffer: &[T; UNIT]) {
        self.layout.stretches(
            unit,
            #[inline(always)]
            |to, from, length| {
                // SAFETY: the caller's promise.
                let to = unsafe { self.memory.slice(self.start + to, length) };
                let from = &buffer[from..][..length];
                if self.streams {
                    stream(from, to);
                    return;
                }
                let mut at = 0;
                while at < length {
                    to[at] = from[at];
                    at += 1;
                }
            },
        );
    }
}

/// A slice that several threads write, each its own elements.
#[derive(Debug)]
pub(super) struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    owner: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: it hands out memory only through `slice`, whose callers promise to share no element.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(memory: &'a mut [T]) -> Self {
        Self { start: memory.as_mut_ptr(), length: memory.len(), owner: PhantomData }
    }

    /// Asks for `length` elements from `at` on.
    #[inline(always)]
    pub(super) fn prefetch(&self, at: usize, length: usize) {
        assert!(at <= self.length && length <= self.length - at, "elements beyond the end");
        // SAFETY: inside the memory; the slice is of bytes of which none is read.
        prefetch(unsafe { std::slice::from_raw_parts(self.start.add(at).cast::<MaybeUninit<T>>(), length) });
    }

    /// `length` elements from `at` on; panics when they are not all there.
    ///
    /// # Safety
    /// While the result is used, nobody else uses any of these elements.
    #[inline(always)]
    pub(super) unsafe fn slice(&self, at: usize, length: usize) -> &'a mut [T] {
        assert!(at <= self.length && length <= self.length - at, "elements beyond the end");
        // SAFETY: inside the memory, which is borrowed for 'a; the caller promises that the elements are its own.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), length) }
    }
}
