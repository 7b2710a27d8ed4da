//! Filling one batch: examples, labels, indices and validity, into memory that somebody else owns.

use half::{bf16, f16};
use std::slice;

use super::keys::RowKey;
use super::order::Order;
use super::schedule::Part;
use super::transform::{Element, Transform};
use crate::simd::Level;
use crate::{Error, Result};

/// The examples, one after the other; their owner keeps them for as long as the plan lives.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// uint8
    U8(&'static [u8]),
    /// float16
    F16(&'static [f16]),
    /// bfloat16
    Bf16(&'static [bf16]),
    /// float32
    F32(&'static [f32]),
    /// float64
    F64(&'static [f64]),
}

impl Source {
    /// Elements in all.
    pub fn elements(&self) -> usize {
        match self {
            Self::U8(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F32(data) => data.len(),
            Self::F64(data) => data.len(),
        }
    }
}

/// How many rows ahead an example is asked for, and how much of it at most.
const PREFETCH_ROWS: usize = 3;
const PREFETCH_BYTES: usize = 4096;

/// Begins to load a slice into the cache.
fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..size_of_val(data).min(PREFETCH_BYTES)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing; every x86-64 has it, and the address is inside the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast::<i8>().add(offset)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// All that a batch is a function of, beside its place in the epoch.
#[derive(Debug)]
pub struct Plan {
    /// The dataset, as messages name it.
    pub name: String,
    /// The examples.
    pub source: Source,
    /// Elements of one example.
    pub width: usize,
    /// One label an example.
    pub labels: Option<&'static [i64]>,
    /// The epoch's order.
    pub order: Order,
    /// What is done to an example; without it the elements are copied.
    pub transform: Option<Transform>,
    /// The epoch's key of random transforms.
    pub draw_key: u64,
    /// The instruction set.
    pub level: Level,
}

/// Addresses of a batch's memory.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Rows x width elements: f32 with a transform, else the source's type.
    pub x: usize,
    /// i64, one a row.
    pub index: usize,
    /// i64, one a row; used when there are labels.
    pub label: usize,
    /// One byte a row, 0 or 1.
    pub valid: usize,
    /// Rows that fit.
    pub capacity: usize,
}

impl Plan {
    /// Examples in the dataset.
    pub fn len(&self) -> usize {
        self.source.elements() / self.width.max(1)
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks that labels and width fit the source.
    pub fn checked(self) -> Result<Self> {
        if self.width == 0 || !self.source.elements().is_multiple_of(self.width) {
            return Err(Error::Argument(format!("{}: examples of {} elements do not tile it", self.name, self.width)));
        }
        match self.labels {
            Some(labels) if labels.len() != self.len() => {
                Err(Error::Argument(format!("{}: {} labels for {} examples", self.name, labels.len(), self.len())))
            }
            _ => Ok(self),
        }
    }

    /// Writes the rows of `part`.
    ///
    /// # Safety
    /// The slot's memory is live, aligned and touched by nobody else until this returns.
    pub unsafe fn fill(&self, part: Part, slot: &Slot) -> Result<()> {
        if part.rows > slot.capacity {
            return Err(Error::Argument(format!("batch of {} rows for a slot of {}", part.rows, slot.capacity)));
        }
        // SAFETY: the caller's promise; the slot holds at least `rows` of each.
        let (indices, valid) = unsafe { (memory::<i64>(slot.index, part.rows), memory::<u8>(slot.valid, part.rows)) };
        for (row, (index, valid)) in indices.iter_mut().zip(valid).enumerate() {
            let own = row < part.valid;
            *index = self.order.index(if own { part.start + row } else { part.filler }) as i64;
            *valid = own.into();
        }
        if let Some(labels) = self.labels {
            // SAFETY: as above.
            let out = unsafe { memory::<i64>(slot.label, part.rows) };
            for (label, &index) in out.iter_mut().zip(&*indices) {
                *label = labels[index as usize];
            }
        }
        // SAFETY: as above.
        unsafe {
            match self.source {
                Source::U8(data) => self.rows(data, indices, slot.x),
                Source::F16(data) => self.rows(data, indices, slot.x),
                Source::Bf16(data) => self.rows(data, indices, slot.x),
                Source::F32(data) => self.rows(data, indices, slot.x),
                Source::F64(data) => self.rows(data, indices, slot.x),
            }
        }
    }

    /// # Safety
    /// As [`Self::fill`]; `x` is the address of `indices.len()` rows.
    unsafe fn rows<T: Element>(&self, data: &[T], indices: &[i64], x: usize) -> Result<()> {
        let width = self.width;
        let example = |index: i64| &data[index as usize * width..][..width];
        // Examples in random places are bound by latency: ask for them some rows ahead.
        let announce = |row: usize| {
            if let Some(&index) = indices.get(row + PREFETCH_ROWS) {
                prefetch(example(index));
            }
        };
        if let Some(transform) = &self.transform {
            // SAFETY: the caller's promise; transformed rows are f32.
            let out = unsafe { memory::<f32>(x, indices.len() * width) };
            for (row, (&index, out)) in indices.iter().zip(out.chunks_exact_mut(width)).enumerate() {
                announce(row);
                let source = example(index);
                self.check(source, index)?;
                T::transform(source, out, transform, RowKey::new(self.draw_key, index as u64), self.level);
            }
        } else {
            // SAFETY: the caller's promise; raw rows have the source's type.
            let out = unsafe { memory::<T>(x, indices.len() * width) };
            for (row, (&index, out)) in indices.iter().zip(out.chunks_exact_mut(width)).enumerate() {
                announce(row);
                let source = example(index);
                self.check(source, index)?;
                out.copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn check<T: Element>(&self, source: &[T], index: i64) -> Result<()> {
        // A fold has no early exit, so it vectorises.
        if source.iter().fold(true, |all, &value| all & value.is_finite()) {
            return Ok(());
        }
        let element = source.iter().position(|&value| !value.is_finite()).unwrap_or(0);
        Err(Error::Data(format!(
            "{}: example {index} holds a NaN or an infinity (element {element} of {}), expected finite numbers",
            self.name, self.width
        )))
    }
}

/// # Safety
/// `address` is that of `len` writable elements nobody else touches.
unsafe fn memory<'a, T>(address: usize, len: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(address as *mut T, len) }
}
