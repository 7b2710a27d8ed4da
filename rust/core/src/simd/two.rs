//! Two vectors side by side, instruction by instruction: a processor whose window is too short for the chains of two
//! long iterations of a loop finds both in one.

use super::Lanes;

/// The lanes of the first, then those of the second.
#[derive(Clone, Copy)]
pub struct Two<V>(V, V);

impl<V: Lanes> Lanes for Two<V> {
    const COUNT: usize = 2 * V::COUNT;
    const FUSED: bool = V::FUSED;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(V::splat(value), V::splat(value))
    }

    #[inline(always)]
    fn load(values: &[f32], at: usize) -> Self {
        Self(V::load(values, at), V::load(values, at + V::COUNT))
    }

    #[inline(always)]
    fn store(self, values: &mut [f32], at: usize) {
        self.0.store(values, at);
        self.1.store(values, at + V::COUNT);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0.add(other.0), self.1.add(other.1))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0.sub(other.0), self.1.sub(other.1))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0.mul(other.0), self.1.mul(other.1))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(self.0.div(other.0), self.1.div(other.1))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(self.0.mul_add(factor.0, term.0), self.1.mul_add(factor.1, term.1))
    }

    #[inline(always)]
    fn mul_add_exact(self, factor: Self, term: Self) -> Self {
        Self(self.0.mul_add_exact(factor.0, term.0), self.1.mul_add_exact(factor.1, term.1))
    }

    #[inline(always)]
    fn at_least(self, floor: Self) -> Self {
        Self(self.0.at_least(floor.0), self.1.at_least(floor.1))
    }

    #[inline(always)]
    fn at_most(self, ceiling: Self) -> Self {
        Self(self.0.at_most(ceiling.0), self.1.at_most(ceiling.1))
    }

    #[inline(always)]
    fn negative_abs(self) -> Self {
        Self(self.0.negative_abs(), self.1.negative_abs())
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        Self(self.0.copysign(sign.0), self.1.copysign(sign.1))
    }

    #[inline(always)]
    fn step(self) -> Self {
        Self(self.0.step(), self.1.step())
    }

    #[inline(always)]
    fn where_nonzero(self, condition: Self) -> Self {
        Self(self.0.where_nonzero(condition.0), self.1.where_nonzero(condition.1))
    }

    #[inline(always)]
    fn or_where_zero(self, condition: Self, other: Self) -> Self {
        Self(self.0.or_where_zero(condition.0, other.0), self.1.or_where_zero(condition.1, other.1))
    }

    #[inline(always)]
    fn low_bits_to_exponent(self) -> Self {
        Self(self.0.low_bits_to_exponent(), self.1.low_bits_to_exponent())
    }
}
