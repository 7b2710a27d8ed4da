//! Lanes in plain Rust: loops that compilers turn into whatever vectors the target's baseline has.

use super::Lanes;
use super::lanes::{chunk, chunk_mut};

const COUNT: usize = 8;

/// Eight lanes.
#[derive(Clone, Copy)]
pub struct Portable([f32; COUNT]);

impl Portable {
    #[inline(always)]
    fn map(mut self, function: impl Fn(f32) -> f32) -> Self {
        let mut lane = 0;
        while lane < COUNT {
            self.0[lane] = function(self.0[lane]);
            lane += 1;
        }
        self
    }

    #[inline(always)]
    fn zip(mut self, other: Self, function: impl Fn(f32, f32) -> f32) -> Self {
        let mut lane = 0;
        while lane < COUNT {
            self.0[lane] = function(self.0[lane], other.0[lane]);
            lane += 1;
        }
        self
    }
}

impl Lanes for Portable {
    const COUNT: usize = COUNT;
    const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; COUNT])
    }

    #[inline(always)]
    fn load(values: &[f32], at: usize) -> Self {
        Self(*chunk(values, at))
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], at: usize) {
        *chunk_mut(values, at) = self.0;
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
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        if Self::FUSED {
            let mut result = term;
            for ((r, a), b) in result.0.iter_mut().zip(self.0).zip(factor.0) {
                *r = a.mul_add(b, *r);
            }
            result
        } else {
            self.mul(factor).add(term)
        }
    }

    #[inline(always)]
    fn mul_add_exact(self, factor: Self, term: Self) -> Self {
        if Self::FUSED {
            return self.mul_add(factor, term);
        }
        let (mut result, mut lane) = (term, 0);
        while lane < COUNT {
            // The product of two f32 is exact in f64.
            let product = f64::from(self.0[lane]) * f64::from(factor.0[lane]);
            result.0[lane] = (product + f64::from(term.0[lane])) as f32;
            lane += 1;
        }
        result
    }

    #[inline(always)]
    fn at_least(self, floor: Self) -> Self {
        self.zip(floor, |a, floor| if a < floor { floor } else { a })
    }

    #[inline(always)]
    fn at_most(self, ceiling: Self) -> Self {
        self.zip(ceiling, |a, ceiling| if a > ceiling { ceiling } else { a })
    }

    #[inline(always)]
    fn negative_abs(self) -> Self {
        self.map(|a| -a.abs())
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        self.zip(sign, f32::copysign)
    }

    #[inline(always)]
    fn step(self) -> Self {
        self.map(|a| f32::from_bits(1f32.to_bits() & !((a.to_bits() as i32 >> 31) as u32)))
    }

    #[inline(always)]
    fn where_nonzero(self, condition: Self) -> Self {
        self.zip(condition, |a, condition| if condition == 0.0 { 0.0 } else { a })
    }

    #[inline(always)]
    fn or_where_zero(self, condition: Self, other: Self) -> Self {
        let (mut result, mut lane) = (self, 0);
        while lane < COUNT {
            result.0[lane] = if condition.0[lane] == 0.0 { other.0[lane] } else { self.0[lane] };
            lane += 1;
        }
        result
    }

    #[inline(always)]
    fn low_bits_to_exponent(self) -> Self {
        self.map(|a| f32::from_bits(a.to_bits() << 23))
    }
}
