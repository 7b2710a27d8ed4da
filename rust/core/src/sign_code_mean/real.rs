//! The element types, `f32` and `f64`, and their vectors.

use std::ops::Mul;

use crate::simd::Lanes;

/// What is computed in.
pub trait Real: Copy + PartialOrd + Send + Sync + Mul<Output = Self> {
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// The product of two numbers as large is no subnormal, with which some processors take far longer.
    const TINY: Self;
    /// The vector that goes with the lanes of a level.
    type Vector<V: Lanes>: Vector<Scalar = Self>;
    /// Exactly.
    fn double(self) -> f64;
    /// Rounded.
    fn round(value: f64) -> Self;
    /// 0 where it is not above [`Self::TINY`]; NaN stays.
    #[must_use]
    #[inline(always)]
    fn flushed(self) -> Self {
        if self <= Self::TINY { Self::ZERO } else { self }
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const TINY: f32 = 1.0 / (1_u64 << 63) as f32;
    type Vector<V: Lanes> = V;

    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn round(value: f64) -> f32 {
        value as f32
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const TINY: f64 = f64::from_bits((1023 - 511) << 52);
    type Vector<V: Lanes> = Doubles;

    #[inline(always)]
    fn double(self) -> f64 {
        self
    }

    #[inline(always)]
    fn round(value: f64) -> f64 {
        value
    }
}

/// A vector of `COUNT` numbers; what [`Lanes`] says holds here too.
pub trait Vector: Copy {
    /// Of what.
    type Scalar: Real;
    /// How many.
    const COUNT: usize;
    /// The same number in every lane.
    fn splat(value: Self::Scalar) -> Self;
    /// `COUNT` numbers from `at` on.
    fn load(values: &[Self::Scalar], at: usize) -> Self;
    /// Writes `COUNT` numbers from `at` on.
    fn store(self, values: &mut [Self::Scalar], at: usize);
    /// `self + other`
    fn add(self, other: Self) -> Self;
    /// `self - other`
    fn sub(self, other: Self) -> Self;
    /// `self * other`
    fn mul(self, other: Self) -> Self;
    /// `self * factor + term`
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// As [`Real::flushed`].
    fn flushed(self) -> Self;
}

impl<V: Lanes> Vector for V {
    type Scalar = f32;
    const COUNT: usize = V::COUNT;

    #[inline(always)]
    fn splat(value: f32) -> V {
        <V as Lanes>::splat(value)
    }

    #[inline(always)]
    fn load(values: &[f32], at: usize) -> V {
        <V as Lanes>::load(values, at)
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], at: usize) {
        <V as Lanes>::store(self, values, at);
    }

    #[inline(always)]
    fn add(self, other: V) -> V {
        <V as Lanes>::add(self, other)
    }

    #[inline(always)]
    fn sub(self, other: V) -> V {
        <V as Lanes>::sub(self, other)
    }

    #[inline(always)]
    fn mul(self, other: V) -> V {
        <V as Lanes>::mul(self, other)
    }

    #[inline(always)]
    fn mul_add(self, factor: V, term: V) -> V {
        <V as Lanes>::mul_add(self, factor, term)
    }

    #[inline(always)]
    fn flushed(self) -> V {
        let tiny = <V as Lanes>::splat(f32::TINY);
        self.where_nonzero(self.at_least(tiny).sub(tiny))
    }
}

const WIDTH: usize = 8;

/// Eight `f64`, which the compiler puts into whatever registers there are.
#[derive(Clone, Copy)]
pub struct Doubles([f64; WIDTH]);

impl Doubles {
    #[inline(always)]
    fn zip(mut self, other: Self, function: impl Fn(f64, f64) -> f64) -> Self {
        let mut lane = 0;
        while lane < WIDTH {
            self.0[lane] = function(self.0[lane], other.0[lane]);
            lane += 1;
        }
        self
    }
}

impl Vector for Doubles {
    type Scalar = f64;
    const COUNT: usize = WIDTH;

    #[inline(always)]
    fn splat(value: f64) -> Self {
        Self([value; WIDTH])
    }

    #[inline(always)]
    fn load(values: &[f64], at: usize) -> Self {
        let Some(chunk) = values[at..].first_chunk() else { panic!("fewer than {WIDTH} values left") };
        Self(*chunk)
    }

    #[inline(always)]
    fn store(self, values: &mut [f64], at: usize) {
        let Some(chunk) = values[at..].first_chunk_mut() else { panic!("room for fewer than {WIDTH} values left") };
        *chunk = self.0;
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul(factor).add(term)
    }

    #[inline(always)]
    fn flushed(self) -> Self {
        self.zip(self, |a, _| a.flushed())
    }
}
