//! A vector of pixels, and what one component of the mixture makes of it.

use super::{CHANNELS, MOST_LANES, Mixture};
use crate::logistic::{Cell, Levels, Parts};
use crate::simd::{Lanes, exp_negative_abs, prefetch};

/// Neighbouring pixels of an image, one a lane; `WHOLE` where there are as many as lanes, for which the compiler then
/// needs no place in memory.
pub struct Pixels<V, const WHOLE: bool> {
    /// How many; lanes beyond hold zeros.
    pub count: usize,
    image: usize,
    pixel: usize,
    cells: [Cell<V>; CHANNELS],
}

/// A component at these pixels: log(weight times likelihood) is logit + linear - log(1 + growth), less what normalises
/// the weights.
pub struct Component<V> {
    pub logit: V,
    pub linear: V,
    pub growth: V,
    parts: [Parts<V>; CHANNELS],
    /// tanh of the coefficients.
    coefficients: [V; CHANNELS],
    /// 0 where the logarithm of a scale is above its floor, and has a gradient.
    floored: [V; CHANNELS],
}

/// Derivatives of a component's log-likelihood, three of each.
pub struct Slopes<V> {
    pub means: [V; CHANNELS],
    pub log_scales: [V; CHANNELS],
    pub coefficients: [V; CHANNELS],
}

impl<V: Lanes, const WHOLE: bool> Pixels<V, WHOLE> {
    #[inline(always)]
    pub fn new(data: &Mixture<f32>, levels: &Levels<V>, image: usize, pixel: usize) -> Self {
        let count = V::COUNT.min(data.pixels - pixel);
        let start = data.x_start(image) + pixel;
        let cells = [
            levels.cell(load::<V, WHOLE>(data.x, start, count)),
            levels.cell(load::<V, WHOLE>(data.x, start + data.pixels, count)),
            levels.cell(load::<V, WHOLE>(data.x, start + 2 * data.pixels, count)),
        ];
        Self { count, image, pixel, cells }
    }

    /// Asks for a component's parameters at the next pixels of the image. They lie a whole image apart from each other,
    /// more places than the processor follows by itself.
    #[inline(always)]
    pub fn expect_next(&self, data: &Mixture<f32>, m: usize) {
        let pixel = self.pixel + V::COUNT;
        if pixel >= data.pixels {
            return;
        }
        prefetch(&data.logits[(self.image * data.components + m) * data.pixels + pixel..][..1]);
        let mut channel = 0;
        while channel < CHANNELS {
            let at = ((self.image * CHANNELS + channel) * data.components + m) * data.pixels + pixel;
            prefetch(&data.means[at..][..1]);
            prefetch(&data.log_scales[at..][..1]);
            prefetch(&data.coefficients[at..][..1]);
            channel += 1;
        }
    }

    /// A component's logits.
    #[inline(always)]
    pub fn logit(&self, data: &Mixture<f32>, m: usize) -> V {
        load::<V, WHOLE>(data.logits, (self.image * data.components + m) * data.pixels + self.pixel, self.count)
    }

    /// A component's three means, logarithms of scales or coefficients.
    #[inline(always)]
    fn three(&self, data: &Mixture<f32>, values: &[f32], m: usize) -> [V; CHANNELS] {
        let start = (self.image * CHANNELS * data.components + m) * data.pixels + self.pixel;
        let apart = data.components * data.pixels;
        [
            load::<V, WHOLE>(values, start, self.count),
            load::<V, WHOLE>(values, start + apart, self.count),
            load::<V, WHOLE>(values, start + 2 * apart, self.count),
        ]
    }
}

/// `count` values, and zeros in the other lanes.
#[inline(always)]
fn load<V: Lanes, const WHOLE: bool>(values: &[f32], at: usize, count: usize) -> V {
    if WHOLE {
        return V::load(values, at);
    }
    let mut lanes = [0.0; MOST_LANES];
    lanes[..count].copy_from_slice(&values[at..at + count]);
    V::load(&lanes, 0)
}

/// A component's parameters, and how far its means are from the pixels, in half levels.
struct Placed<V> {
    distances: [V; CHANNELS],
    log_scales: [V; CHANNELS],
    floors: [V; CHANNELS],
    coefficients: [V; CHANNELS],
}

#[inline(always)]
fn placed<V: Lanes, const WHOLE: bool>(
    data: &Mixture<f32>,
    levels: &Levels<V>,
    pixels: &Pixels<V, WHOLE>,
    m: usize,
) -> Placed<V> {
    let means = pixels.three(data, data.means, m);
    let log_scales = pixels.three(data, data.log_scales, m);
    let coefficients = tanh(pixels.three(data, data.coefficients, m));
    let [red, green, blue] = &pixels.cells;
    let zero = V::splat(0.0);
    let of_green = zero.sub(coefficients[0]).mul_add(red.n, levels.distance(green.n, means[1]));
    let of_blue = zero.sub(coefficients[1]).mul_add(red.n, levels.distance(blue.n, means[2]));
    let of_blue = zero.sub(coefficients[2]).mul_add(green.n, of_blue);
    let floor = V::splat(data.floor as f32);
    Placed {
        distances: [levels.distance(red.n, means[0]), of_green, of_blue],
        log_scales,
        floors: [log_scales[0].at_least(floor), log_scales[1].at_least(floor), log_scales[2].at_least(floor)],
        coefficients,
    }
}

/// What component m makes of the pixels.
#[inline(always)]
pub fn component<V: Lanes, const WHOLE: bool>(
    data: &Mixture<f32>,
    levels: &Levels<V>,
    pixels: &Pixels<V, WHOLE>,
    m: usize,
) -> Component<V> {
    let Placed { distances, log_scales, floors, coefficients } = placed(data, levels, pixels, m);
    let parts = [
        around(levels, &pixels.cells[0], distances[0], floors[0]),
        around(levels, &pixels.cells[1], distances[1], floors[1]),
        around(levels, &pixels.cells[2], distances[2], floors[2]),
    ];
    Component {
        logit: pixels.logit(data, m),
        linear: parts[0].linear.add(parts[1].linear).add(parts[2].linear),
        growth: parts[2].grow(parts[1].grow(parts[0].grow(V::splat(0.0)))),
        parts,
        coefficients,
        floored: [floors[0].sub(log_scales[0]), floors[1].sub(log_scales[1]), floors[2].sub(log_scales[2])],
    }
}

/// Component m's logit, and its likelihood as exp of the second number times the third.
#[inline(always)]
pub fn likelihood<V: Lanes, const WHOLE: bool>(
    data: &Mixture<f32>,
    levels: &Levels<V>,
    pixels: &Pixels<V, WHOLE>,
    m: usize,
) -> [V; 3] {
    let Placed { distances, floors, .. } = placed(data, levels, pixels, m);
    let red = levels.quotient(&pixels.cells[0], distances[0], floors[0]);
    let green = levels.quotient(&pixels.cells[1], distances[1], floors[1]);
    let blue = levels.quotient(&pixels.cells[2], distances[2], floors[2]);
    let numerator = red.numerator.mul(green.numerator).mul(blue.numerator);
    let denominator = red.denominator.mul(green.denominator).mul(blue.denominator);
    [pixels.logit(data, m), red.linear.add(green.linear).add(blue.linear), numerator.div(denominator)]
}

/// The mass of a level that is `distance` half levels from the mean.
#[inline(always)]
fn around<V: Lanes>(levels: &Levels<V>, cell: &Cell<V>, distance: V, log_scale: V) -> Parts<V> {
    let one = V::splat(1.0);
    levels.parts(cell, distance.sub(one), distance.add(one), log_scale)
}

/// tanh of three, absolute error below 3e-7, by one division.
#[inline(always)]
fn tanh<V: Lanes>([a, b, c]: [V; 3]) -> [V; 3] {
    let one = V::splat(1.0);
    let (of_a, of_b, of_c) = (exp_negative_abs(a.add(a)), exp_negative_abs(b.add(b)), exp_negative_abs(c.add(c)));
    let (sum_a, sum_b, sum_c) = (one.add(of_a), one.add(of_b), one.add(of_c));
    let (bc, ac) = (sum_b.mul(sum_c), sum_a.mul(sum_c));
    let inverse = one.div(sum_a.mul(bc));
    [
        one.sub(of_a).mul(bc.mul(inverse)).copysign(a),
        one.sub(of_b).mul(ac.mul(inverse)).copysign(b),
        one.sub(of_c).mul(sum_a.mul(sum_b).mul(inverse)).copysign(c),
    ]
}

/// The derivative of tanh where it is `value`.
#[inline(always)]
fn inner<V: Lanes>(value: V) -> V {
    V::splat(1.0).sub(value.mul(value))
}

/// 0 where `floored` is not 0.
#[inline(always)]
fn kept<V: Lanes>(slope: V, floored: V) -> V {
    slope.sub(slope.where_nonzero(floored))
}

impl<V: Lanes> Component<V> {
    /// The derivatives of its log-likelihood.
    #[inline(always)]
    pub fn slopes<const WHOLE: bool>(&self, levels: &Levels<V>, pixels: &Pixels<V, WHOLE>) -> Slopes<V> {
        let [red, green, blue] = &pixels.cells;
        let of = [self.parts[0].slopes(red), self.parts[1].slopes(green), self.parts[2].slopes(blue)];
        let (red, green) = (levels.value(red), levels.value(green));
        let [c0, c1, c2] = self.coefficients;
        Slopes {
            means: [of[0].0, of[1].0, of[2].0],
            log_scales: [
                kept(of[0].1, self.floored[0]),
                kept(of[1].1, self.floored[1]),
                kept(of[2].1, self.floored[2]),
            ],
            coefficients: [
                of[1].0.mul(red).mul(inner(c0)),
                of[2].0.mul(red).mul(inner(c1)),
                of[2].0.mul(green).mul(inner(c2)),
            ],
        }
    }
}
