//! Logits in the precision they are computed in, and classes of two integer types.

use std::ops::Sub;

use half::{bf16, f16};

use crate::simd::special::exp;
use crate::simd::{Lanes, exp_negative_abs};
use crate::values::Values;

/// `f32` or `f64`.
pub trait Real: Copy + PartialOrd + Sub<Output = Self> + Into<f64> + Send + Sync {
    /// 0
    const ZERO: Self;
    /// `self - other`
    fn less(self, other: Self) -> Self;
    /// exp of values that are at most 0, in place; their number is a multiple of 16.
    fn exp_negative<V: Lanes>(values: &mut [Self]);
}

impl Real for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn less(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn exp_negative<V: Lanes>(values: &mut [Self]) {
        let mut at = 0;
        while at + V::COUNT <= values.len() {
            exp_negative_abs(V::load(values, at)).store(values, at);
            at += V::COUNT;
        }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn less(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn exp_negative<V: Lanes>(values: &mut [Self]) {
        let mut at = 0;
        while at < values.len() {
            values[at] = exp::<V>(values[at]);
            at += 1;
        }
    }
}

/// Where logits are read from.
pub trait Logits: Copy + Send + Sync {
    /// The precision they are computed in.
    type Number: Real;

    /// How many.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// `length` of them from `start` on, in `scratch` where they must be converted.
    fn block<'b>(&'b self, start: usize, length: usize, scratch: &'b mut [Self::Number]) -> &'b [Self::Number];
    /// One of them.
    fn get(&self, at: usize) -> Self::Number;

    /// For every position from `start` on the logit of its class, which lies `stride` numbers behind the last one's.
    fn gather(&self, start: usize, stride: usize, classes: &[usize], to: &mut [Self::Number]);

    /// Numbers `class`, `class + 1`, ... of those that lie `stride` apart from `first` on.
    #[inline(always)]
    fn strided<'b>(
        &'b self,
        first: usize,
        class: usize,
        length: usize,
        stride: usize,
        scratch: &'b mut [Self::Number],
    ) -> &'b [Self::Number] {
        if stride == 1 {
            return self.block(first + class, length, scratch);
        }
        let mut at = 0;
        while at < length {
            scratch[at] = self.get(first + (class + at) * stride);
            at += 1;
        }
        &scratch[..length]
    }
}

impl Logits for Values<'_> {
    type Number = f32;

    fn len(&self) -> usize {
        Values::len(self)
    }

    #[inline(always)]
    fn block<'b>(&'b self, start: usize, length: usize, scratch: &'b mut [f32]) -> &'b [f32] {
        Values::block(self, start, length, scratch)
    }

    #[inline(always)]
    fn get(&self, at: usize) -> f32 {
        match self {
            Values::F32(values) => values[at],
            Values::F16(values) => values[at].to_f32(),
            Values::Bf16(values) => values[at].to_f32(),
            Values::U8(values) => f32::from(values[at]),
        }
    }

    #[inline(always)]
    fn gather(&self, start: usize, stride: usize, classes: &[usize], to: &mut [f32]) {
        match self {
            Values::F32(values) => pick(values, start, stride, classes, to, |value| value),
            Values::F16(values) => pick(values, start, stride, classes, to, f16::to_f32),
            Values::Bf16(values) => pick(values, start, stride, classes, to, bf16::to_f32),
            Values::U8(values) => pick(values, start, stride, classes, to, f32::from),
        }
    }
}

/// `values[start + position + class * stride]` for every position.
#[inline(always)]
fn pick<T: Copy, R>(
    values: &[T],
    start: usize,
    stride: usize,
    classes: &[usize],
    to: &mut [R],
    convert: impl Fn(T) -> R,
) {
    let to = &mut to[..classes.len()];
    let mut at = 0;
    while at < classes.len() {
        to[at] = convert(values[start + at + classes[at] * stride]);
        at += 1;
    }
}

impl Logits for &[f64] {
    type Number = f64;

    fn len(&self) -> usize {
        <[f64]>::len(self)
    }

    #[inline(always)]
    fn block<'b>(&'b self, start: usize, length: usize, _: &'b mut [f64]) -> &'b [f64] {
        &self[start..start + length]
    }

    #[inline(always)]
    fn get(&self, at: usize) -> f64 {
        self[at]
    }

    #[inline(always)]
    fn gather(&self, start: usize, stride: usize, classes: &[usize], to: &mut [f64]) {
        pick(self, start, stride, classes, to, |value| value);
    }
}

/// x: which class.
#[derive(Debug, Clone, Copy)]
pub enum Classes<'a> {
    /// Up to 256 classes, as pixels are stored.
    U8(&'a [u8]),
    /// Any number of classes.
    I64(&'a [i64]),
}

impl Classes<'_> {
    /// How many.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I64(values) => values.len(),
        }
    }

    /// Those from `start` on, which [`Self::outside`] has found to be classes.
    #[inline(always)]
    pub fn read(&self, start: usize, to: &mut [usize]) {
        let range = start..start + to.len();
        match self {
            Self::U8(values) => {
                for (to, &class) in to.iter_mut().zip(&values[range]) {
                    *to = usize::from(class);
                }
            }
            Self::I64(values) => {
                for (to, &class) in to.iter_mut().zip(&values[range]) {
                    *to = class as usize;
                }
            }
        }
    }

    /// One that is none of so many classes.
    pub fn outside(&self, classes: usize) -> Option<i64> {
        match self {
            Self::U8(values) => values.iter().copied().max().map(i64::from).filter(|&most| most as usize >= classes),
            Self::I64(values) => values.iter().copied().find(|&value| value < 0 || value as usize >= classes),
        }
    }
}
