//! The logistic's mass on one of L even levels of [-1, 1], in lanes: what the discretised likelihoods share.
//!
//! Level v = 0 .. T, T = L - 1, stands for x = n / T with n = 2 v - T. With the distances of a level's ends from the
//! mean, `upper` = n + 1 - T mean and `lower` = n - 1 - T mean, with a = upper / (T s), b = lower / (T s) and the width
//! t = a - b, the mass within is
//!
//!   F(a) - F(b) = (1 - exp(-t)) / ((1 + exp(-a)) (1 + exp(b))),
//!
//! without the factor of b at the lowest level, of a at the highest, of t at both. Its logarithm is kept in two parts
//! that have one sign, so that nothing cancels: sums of min(a, 0), min(-b, 0) and min(log t, 0), and the product of
//! factors 1 + growth that remain: exp(-|a|), exp(-|b|) and, of the width, at most 0.582.

mod float64;

pub use float64::{Mass, level, mass};

use crate::simd::{Lanes, exp, exp_m1_negative_abs, exp_negative_abs};

/// The product of a level's factors is below 2^2.67: so many of them fit an `f32`, and so many an `f64`.
pub const PER_LANE: usize = 47;
/// See [`PER_LANE`].
pub const IN_ALL: usize = 383;
/// Adding and subtracting it rounds to an integer.
const ROUND: f32 = 12_582_912.0;
/// Scales beyond the nearer end, within a level, at which its mass is 1.
const DEEPEST: f32 = -20.0;
/// Logarithm of a scale from which on the mass shrinks in proportion to 1 / s.
const WIDEST: f32 = 20.0;
const RATE_OF_WIDEST: f32 = 2.061_153_6e-9;
/// (t / (1 - exp(-t)) - 1 - t / 2) / t^2 = C0 + C1 t^2 + ...: the Bernoulli numbers; off by 2e-8 at t = 1.
const C: [f32; 4] = [1.0 / 12.0, -1.0 / 720.0, 1.0 / 30_240.0, -1.0 / 1_209_600.0];
/// (1 - (1 - exp(-t)) / t) / t = C0 + C1 t + ...: fitted from 0 to 1, off by 2e-8 of what is multiplied by t.
const MISSING: [f32; 6] = [0.5, -0.166_666_05, 0.041_659_348, -0.008_301_426, 0.001_325_109_3, -1.375_404_4e-4];
/// Below this e and q exp(-u) are too small to count.
const TINY: f32 = 1e-30;

/// What the number of levels decides.
#[derive(Clone, Copy)]
pub struct Levels<V> {
    top: V,
    half_top: V,
    inverse_top: V,
    /// log(2 / T), of the width of a level.
    log_gap: V,
}

impl<V: Lanes> Levels<V> {
    /// For that many levels, at least 2 and at most 2^16.
    #[inline(always)]
    pub fn new(levels: usize) -> Self {
        let top = levels as f64 - 1.0;
        Self {
            top: V::splat(top as f32),
            half_top: V::splat((top / 2.0) as f32),
            inverse_top: V::splat((1.0 / top) as f32),
            log_gap: V::splat((2.0 / top).ln() as f32),
        }
    }

    /// The level nearest to x; the lowest or the highest beyond the ends.
    #[inline(always)]
    pub fn cell(&self, x: V) -> Cell<V> {
        let level = x.mul_add(self.half_top, self.half_top).at_least(V::splat(0.0)).at_most(self.top);
        let level = level.add(V::splat(ROUND)).sub(V::splat(ROUND));
        let (beneath, one) = (level.sub(self.top), V::splat(1.0));
        let inside = level.mul(beneath);
        let (not_lowest, not_highest) = (one.where_nonzero(level), one.where_nonzero(beneath));
        Cell {
            n: level.add(beneath),
            above_lowest: level,
            below_highest: beneath,
            inside,
            edge: one.sub(one.where_nonzero(inside)),
            signs: [not_lowest.add(not_lowest).sub(one), one.sub(not_highest.add(not_highest))],
        }
    }

    /// x of a cell.
    #[inline(always)]
    pub fn value(&self, cell: &Cell<V>) -> V {
        cell.n.mul(self.inverse_top)
    }

    /// n - T mean, rounded once.
    #[inline(always)]
    pub fn distance(&self, n: V, mean: V) -> V {
        V::splat(0.0).sub(mean).mul_add_exact(self.top, n)
    }

    /// The mass of a level that is `distance` half levels from the mean: to 1e-6 of itself rather than of its
    /// logarithm, for a quarter less work than [`Levels::parts`].
    ///
    /// With u the distance of the nearer end from the mean in scales, negative when the mean is within, and e =
    /// exp(-|u|), the mass is e (1 - exp(-t)) / ((1 + e) (1 + e exp(-t))), or where u is negative
    /// e (1 - exp(-t)) / ((1 + e) (e + exp(-t))); at an edge it is 1 / (1 + exp(u)).
    #[inline(always)]
    pub fn quotient(&self, cell: &Cell<V>, distance: V, log_scale: V) -> Quotient<V> {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        let scaled = exp(zero.sub(log_scale)).mul(self.inverse_top);
        let size = distance.mul(cell.signs[0]).at_least(distance.mul(cell.signs[1]));
        let near = size.sub(one).mul(scaled);
        // Deeper within, the mass is 1 to rounding.
        let depth = near.at_least(V::splat(DEEPEST));
        let e = exp_negative_abs(depth);
        let narrowest = scaled.at_least(self.inverse_top.mul(V::splat(RATE_OF_WIDEST)));
        let missing = exp_m1_negative_abs(narrowest.add(narrowest));
        let beyond = log_scale.sub(V::splat(WIDEST)).at_least(zero);
        let outside = near.step();
        let rest = missing.add(one).mul_add(e.at_least(one.sub(outside)), e.at_least(outside));
        Quotient {
            linear: depth.at_most(zero).sub(beyond).where_nonzero(cell.inside).sub(near.at_least(zero)),
            numerator: zero.sub(missing).where_nonzero(cell.inside).add(cell.edge),
            denominator: e.add(one).mul(rest.where_nonzero(cell.inside).add(cell.edge)),
        }
    }

    /// The mass within the cell, in the two parts of [`Levels::parts`] but all factors as one; for fewer exponentials.
    ///
    /// With u the distance of the nearer end from the mean in scales, negative when the mean is within, and q =
    /// exp(-t), the factors are 1 + exp(-|u|), 1 + q exp(-u) and 1 / (1 - s), s = q for a width t from 1 on.
    #[inline(always)]
    pub fn factor(&self, cell: &Cell<V>, mean: V, log_scale: V) -> Factor<V> {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        let scaled = exp(zero.sub(log_scale)).mul(self.inverse_top);
        let width = scaled.add(scaled);
        // Each end rounded once: close to the mean nothing else is left of it.
        let lower = self.distance(cell.n.sub(one), mean);
        let upper = zero.sub(self.distance(cell.n.add(one), mean));
        let near =
            lower.or_where_zero(cell.above_lowest, upper).at_least(upper.or_where_zero(cell.below_highest, lower));
        let near = near.mul(scaled);
        let e = exp_negative_abs(near);
        let q = exp_negative_abs(width).where_nonzero(cell.inside);
        let shrink = missing_of_width(width).at_most(q);
        // exp(-u) is `above` / `below`.
        let outside = near.step();
        let above = e.at_least(one.sub(outside));
        let below = e.at_least(outside.at_least(V::splat(TINY)));
        let log_width = self.log_gap.sub(log_scale).at_most(zero);
        let numerator = e.add(shrink).mul(below).add(q.mul(above).mul(e.add(one)));
        Factor {
            linear: log_width.where_nonzero(cell.inside).sub(near.at_least(zero)),
            growth: numerator.div(below.sub(below.mul(shrink))),
        }
    }

    /// The parts of the mass within the cell, of which `lower` and `upper` are the ends.
    #[inline(always)]
    pub fn parts(&self, cell: &Cell<V>, lower: V, upper: V, log_scale: V) -> Parts<V> {
        let zero = V::splat(0.0);
        let rate = exp(zero.sub(log_scale));
        let scaled = rate.mul(self.inverse_top);
        let (a, b, width) = (upper.mul(scaled), lower.mul(scaled), scaled.add(scaled));
        let log_width = self.log_gap.sub(log_scale).at_most(zero);
        let linear = a.at_most(zero).where_nonzero(cell.below_highest);
        let linear = linear.add(zero.sub(b).at_most(zero).where_nonzero(cell.above_lowest));
        Parts {
            linear: linear.add(log_width.where_nonzero(cell.inside)),
            of_a: exp_negative_abs(a).where_nonzero(cell.below_highest),
            of_b: exp_negative_abs(b).where_nonzero(cell.above_lowest),
            of_width: width_growth(width).where_nonzero(cell.inside),
            a,
            b,
            width,
            rate,
        }
    }
}

/// 1 - (1 - exp(-t)) / t up to a width t of 1; from there on 1 / e, which is more than exp(-t).
#[inline(always)]
fn missing_of_width<V: Lanes>(width: V) -> V {
    let width = width.at_most(V::splat(1.0));
    let mut p = V::splat(MISSING[5]);
    p = p.mul_add(width, V::splat(MISSING[4]));
    p = p.mul_add(width, V::splat(MISSING[3]));
    p = p.mul_add(width, V::splat(MISSING[2]));
    p = p.mul_add(width, V::splat(MISSING[1]));
    p = p.mul_add(width, V::splat(MISSING[0]));
    p.mul(width)
}

/// t / (1 - exp(-t)) - 1 for a width t below 1, 1 / (1 - exp(-t)) - 1 from there on.
#[inline(always)]
fn width_growth<V: Lanes>(width: V) -> V {
    let one = V::splat(1.0);
    let large = width.sub(one).step();
    let square = width.mul(width);
    let mut p = V::splat(C[3]);
    p = p.mul_add(square, V::splat(C[2]));
    p = p.mul_add(square, V::splat(C[1]));
    p = p.mul_add(square, V::splat(C[0]));
    let series = p.mul_add(square, width.mul(V::splat(0.5))).where_nonzero(one.sub(large));
    let factor = exp_negative_abs(width);
    series.add(factor.div(one.sub(factor)).where_nonzero(large))
}

/// A level: its n, and numbers that are 0 where a part of the mass does not count.
#[derive(Clone, Copy)]
pub struct Cell<V> {
    /// 2 v - T.
    pub n: V,
    above_lowest: V,
    below_highest: V,
    inside: V,
    /// 1 at the lowest and the highest level, else 0.
    edge: V,
    /// The larger product of the distance with these is its size, but the distance that counts at the edges.
    signs: [V; 2],
}

/// A mass as a quotient: mass = exp(`linear`) `numerator` / `denominator`.
///
/// Three of them fit an `f32` each: numerators are from 1e-11 to 1, denominators from 1e-9 to 4.
#[derive(Clone, Copy)]
pub struct Quotient<V> {
    /// From -infinity to 0.
    pub linear: V,
    /// 1 - exp(-t), or what is left of it beyond `WIDEST`.
    pub numerator: V,
    /// See [`Levels::quotient`].
    pub denominator: V,
}

/// A mass as log mass = `linear` - log(1 + `growth`).
#[derive(Clone, Copy)]
pub struct Factor<V> {
    /// From -infinity to 0.
    pub linear: V,
    /// From 0 to 5.4.
    pub growth: V,
}

/// A mass in parts: log mass = linear - log((1 + `of_a`) (1 + `of_b`) (1 + `of_width`)).
#[derive(Clone, Copy)]
pub struct Parts<V> {
    /// What is summed.
    pub linear: V,
    of_a: V,
    of_b: V,
    of_width: V,
    a: V,
    b: V,
    width: V,
    rate: V,
}

impl<V: Lanes> Parts<V> {
    /// (1 + growth) times this mass's factors, minus 1: loses nothing when all are tiny.
    #[inline(always)]
    pub fn grow(&self, growth: V) -> V {
        let growth = self.of_a.mul_add(growth, growth.add(self.of_a));
        let growth = self.of_b.mul_add(growth, growth.add(self.of_b));
        self.of_width.mul_add(growth, growth.add(self.of_width))
    }

    /// The derivatives of log mass in the mean and in the logarithm of the scale.
    #[inline(always)]
    pub fn slopes(&self, cell: &Cell<V>) -> (V, V) {
        let one = V::splat(1.0);
        let (rest_a, rest_b) = (self.of_a.div(one.add(self.of_a)), self.of_b.div(one.add(self.of_b)));
        // F(-a) and F(b)
        let of_a = one.sub(self.a.step()).add(rest_a.copysign(self.a)).where_nonzero(cell.below_highest);
        let of_b = self.b.step().sub(rest_b.copysign(self.b)).where_nonzero(cell.above_lowest);
        // t / (exp(t) - 1)
        let large = self.width.sub(one).step();
        let narrow = one.add(self.of_width).sub(self.width).where_nonzero(one.sub(large));
        let wide = self.width.mul(self.of_width).where_nonzero(large);
        let of_width = narrow.add(wide).where_nonzero(cell.inside);
        let (a, b) = (self.a.mul(of_a).where_nonzero(of_a), self.b.mul(of_b).where_nonzero(of_b));
        (self.rate.mul(of_b.sub(of_a)), b.sub(a).sub(of_width))
    }
}
