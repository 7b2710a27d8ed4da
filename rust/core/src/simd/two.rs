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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, available, exp, run};

    /// Whether a function of every lane, of two vectors at once and of each alone, has the same bits.
    struct Same<'a>(&'a [f32]);

    #[inline(always)]
    fn function<V: Lanes>(x: V) -> V {
        let one = V::splat(1.0);
        let sum = exp(x).div(one.add(x.mul(x))).mul_add_exact(x.step(), one.copysign(x));
        sum.or_where_zero(x.at_least(V::splat(0.0)), x.negative_abs().sub(one)).where_nonzero(x.at_most(one))
    }

    impl Kernel for Same<'_> {
        type Output = bool;

        #[inline(always)]
        fn run<V: Lanes>(self) -> bool {
            let (mut together, mut apart) = (vec![f32::NAN; self.0.len()], vec![f32::NAN; self.0.len()]);
            let mut at = 0;
            while at < self.0.len() {
                function(Two::<V>::load(self.0, at)).store(&mut together, at);
                function(V::load(self.0, at)).store(&mut apart, at);
                function(V::load(self.0, at + V::COUNT)).store(&mut apart, at + V::COUNT);
                at += Two::<V>::COUNT;
            }
            together.iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits())
        }
    }

    #[test]
    fn halves_are_computed_as_they_are_alone() {
        let x: Vec<f32> = (-3200..3200).map(|i| i as f32 * 0.031_25).collect();
        for level in available() {
            assert!(run(level, Same(&x)), "{level:?}");
        }
    }

    /// `or_where_zero` of a condition that takes all its kinds of values.
    struct Choice<'a>(&'a mut [f32]);

    impl Kernel for Choice<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Lanes>(self) {
            let (one, two) = (V::splat(1.0), V::splat(2.0));
            one.or_where_zero(V::load(self.0, 0), two).store(self.0, 0);
        }
    }

    #[test]
    fn a_choice_is_the_other_at_zero_only() {
        for level in available() {
            let mut values = [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, 1e-40, f32::NEG_INFINITY].repeat(2);
            run(level, Choice(&mut values));
            assert_eq!(values[..4], [2.0, 2.0, 1.0, 1.0], "{level:?}");
        }
    }
}
