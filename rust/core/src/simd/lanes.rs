//! A vector of `f32` lanes: the few operations that kernels are written in.

/// Lanes of one instruction set. Values of it exist only inside [`super::run`], which has checked the processor;
/// methods are `#[inline(always)]`, so that they are compiled for that instruction set.
#[allow(clippy::return_self_not_must_use)]
pub trait Lanes: Copy {
    /// How many lanes.
    const COUNT: usize;
    /// Whether `mul_add` rounds once.
    const FUSED: bool;

    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// `COUNT` values from `at` on; panics when there are fewer.
    fn load(values: &[f32], at: usize) -> Self;
    /// Writes `COUNT` values from `at` on; panics when there is room for fewer.
    fn store(self, values: &mut [f32], at: usize);

    /// `self + other`
    fn add(self, other: Self) -> Self;
    /// `self - other`
    fn sub(self, other: Self) -> Self;
    /// `self * other`
    fn mul(self, other: Self) -> Self;
    /// `self / other`
    fn div(self, other: Self) -> Self;
    /// `self * factor + term`
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// `self * factor + term`, rounded once (or twice, the first time to `f64`) also where `mul_add` is not.
    fn mul_add_exact(self, factor: Self, term: Self) -> Self;
    /// The larger of the two; NaN when `self` is NaN.
    fn at_least(self, floor: Self) -> Self;
    /// The smaller of the two; NaN when `self` is NaN.
    fn at_most(self, ceiling: Self) -> Self;

    /// `-|self|`
    fn negative_abs(self) -> Self;
    /// `|self|` with the sign bits of `sign`.
    fn copysign(self, sign: Self) -> Self;
    /// 1 where the sign bit is clear, 0 where it is set.
    fn step(self) -> Self;
    /// `self` where `condition` is not 0 (NaN is not), else 0.
    fn where_nonzero(self, condition: Self) -> Self;
    /// `self` where `condition` is not 0 (NaN is not), else `other`.
    fn or_where_zero(self, condition: Self, other: Self) -> Self;
    /// The lanes whose bits are those of `self`, shifted left by 23: low mantissa bits become the exponent.
    fn low_bits_to_exponent(self) -> Self;
}

/// Work over lanes of any instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The work; implement it `#[inline(always)]`, its inner loops with `while` over indices: a closure or an iterator
    /// is compiled without the level's instructions unless the compiler happens to inline it.
    fn run<V: Lanes>(self) -> Self::Output;
}

/// `COUNT` values from `at` on; panics when there are fewer.
#[inline(always)]
pub(super) fn chunk<const COUNT: usize>(values: &[f32], at: usize) -> &[f32; COUNT] {
    let Some(chunk) = values[at..].first_chunk() else { panic!("fewer than {COUNT} values left") };
    chunk
}

/// As [`chunk`], to be written.
#[inline(always)]
pub(super) fn chunk_mut<const COUNT: usize>(values: &mut [f32], at: usize) -> &mut [f32; COUNT] {
    let Some(chunk) = values[at..].first_chunk_mut() else { panic!("room for fewer than {COUNT} values left") };
    chunk
}
