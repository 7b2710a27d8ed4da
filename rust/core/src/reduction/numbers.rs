//! Slices whose element type is known at run time, read and written as `f64` a block at a time.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Numbers to be computed with in `f64`.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// As they are.
    F64(&'a [f64]),
    /// Single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of an `f32`.
    Bf16(&'a [bf16]),
    /// Bytes; also booleans, as 0 and 1.
    U8(&'a [u8]),
    /// Counts.
    I64(&'a [i64]),
}

impl Numbers<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::U8(values) => values.len(),
            Self::I64(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values from `start` on, as many as there is room for in `to`.
    #[inline(always)]
    pub fn read(&self, start: usize, to: &mut [f64]) {
        let range = start..start + to.len();
        match self {
            Self::F64(values) => to.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f64_slice(to),
            Self::F32(values) => {
                let from = &values[range];
                let (mut at, to) = (0, &mut to[..from.len()]);
                while at < from.len() {
                    to[at] = f64::from(from[at]);
                    at += 1;
                }
            }
            Self::Bf16(values) => {
                let from = &values[range];
                let (mut at, to) = (0, &mut to[..from.len()]);
                while at < from.len() {
                    to[at] = f64::from(f32::from_bits(u32::from(from[at].to_bits()) << 16));
                    at += 1;
                }
            }
            Self::U8(values) => {
                let from = &values[range];
                let (mut at, to) = (0, &mut to[..from.len()]);
                while at < from.len() {
                    to[at] = f64::from(from[at]);
                    at += 1;
                }
            }
            Self::I64(values) => {
                let from = &values[range];
                let (mut at, to) = (0, &mut to[..from.len()]);
                while at < from.len() {
                    to[at] = from[at] as f64;
                    at += 1;
                }
            }
        }
    }

    /// One value.
    #[inline(always)]
    pub fn get(&self, at: usize) -> f64 {
        let mut one = [0.0];
        self.read(at, &mut one);
        one[0]
    }
}

/// Room for numbers computed in `f64`.
#[derive(Debug)]
pub enum NumbersMut<'a> {
    /// As they are.
    F64(&'a mut [f64]),
    /// Rounded to single precision.
    F32(&'a mut [f32]),
    /// Rounded to IEEE half precision.
    F16(&'a mut [f16]),
    /// Rounded to the upper half of an `f32`.
    Bf16(&'a mut [bf16]),
}

impl NumbersMut<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `block` from `start` on.
    #[inline(always)]
    pub fn write(&mut self, start: usize, block: &[f64]) {
        let range = start..start + block.len();
        match self {
            Self::F64(values) => values[range].copy_from_slice(block),
            Self::F32(values) => {
                let to = &mut values[range];
                let (mut at, block) = (0, &block[..to.len()]);
                while at < to.len() {
                    to[at] = block[at] as f32;
                    at += 1;
                }
            }
            Self::F16(values) => values[range].convert_from_f64_slice(block),
            Self::Bf16(values) => values[range].convert_from_f64_slice(block),
        }
    }

    /// Writes `values[i]` to `start + i + classes[i] * stride`.
    #[inline(always)]
    pub fn scatter(&mut self, start: usize, stride: usize, classes: &[usize], values: &[f64]) {
        match self {
            Self::F64(to) => put(to, start, stride, classes, values, |value| value),
            Self::F32(to) => put(to, start, stride, classes, values, |value| value as f32),
            Self::F16(to) => put(to, start, stride, classes, values, f16::from_f64),
            Self::Bf16(to) => put(to, start, stride, classes, values, bf16::from_f64),
        }
    }

    /// The first `count`, and the others.
    pub fn split_at_mut(self, count: usize) -> (Self, Self) {
        match self {
            Self::F64(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F64(head), Self::F64(tail))
            }
            Self::F32(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F32(head), Self::F32(tail))
            }
            Self::F16(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F16(head), Self::F16(tail))
            }
            Self::Bf16(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::Bf16(head), Self::Bf16(tail))
            }
        }
    }
}

#[inline(always)]
fn put<T>(to: &mut [T], start: usize, stride: usize, classes: &[usize], values: &[f64], convert: impl Fn(f64) -> T) {
    let values = &values[..classes.len()];
    let mut at = 0;
    while at < classes.len() {
        to[start + at + classes[at] * stride] = convert(values[at]);
        at += 1;
    }
}
