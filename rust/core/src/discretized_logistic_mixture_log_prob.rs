//! `discretized_logistic_mixture_log_prob`: a mixture of logistics over RGB pixels, and its gradients.
//!
//! A pixel's likelihood under component m is the product of three masses (see [`crate::logistic`]): exp(linear) times a
//! ratio. The sum over components needs no logarithm of its own, and two a vector of pixels are left: those of the
//! products over its lanes of sum_m w_m exp(linear_m - max) ratio_m, times one over the sum of the w.

mod component;
mod float64;
mod gradients;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use float64::{discretized_logistic_mixture_log_prob_backward_f64, discretized_logistic_mixture_log_prob_f64};

use component::{Pixels, likelihood};
use gradients::Backward;

use crate::logistic::Levels;
use crate::simd::{self, Kernel, Lanes, Level, exp};
use crate::threads;
use crate::{Error, Result};

/// Pixels of one sum in `f64`: a multiple of every `COUNT`, so that threads change no bit.
const CHUNK: usize = 64;
/// Components of a pixel that are worth a thread: some 100 us of work.
const GRAIN: usize = 1 << 14;
/// Parameters that may lie in a second-level cache, where asking in advance is work for nothing: 1 MiB of `f32`.
const NEAR: usize = 1 << 18;
/// At least as many lanes as any level has.
const MOST_LANES: usize = 16;
/// Parameters of a component beside its logit.
const CHANNELS: usize = 3;

/// The numbers of all examples: N images of P pixels, M components.
#[derive(Debug, Clone, Copy)]
pub struct Mixture<'a, T> {
    /// (N, 3, P) in [-1, 1]; or fewer images, a divisor n of N: image i meets image i mod n.
    pub x: &'a [T],
    /// (N, M, P)
    pub logits: &'a [T],
    /// (N, 3, M, P)
    pub means: &'a [T],
    /// (N, 3, M, P)
    pub log_scales: &'a [T],
    /// (N, 3, M, P): green's mean grows by tanh of the first times red, blue's by the second times red and the third
    /// times green.
    pub coefficients: &'a [T],
    /// Images.
    pub images: usize,
    /// Components.
    pub components: usize,
    /// Pixels an image.
    pub pixels: usize,
    /// Levels, 2 to 65536.
    pub levels: usize,
    /// Logarithms of scales below it count as it, and get no gradient.
    pub floor: f64,
}

/// Where the gradients go, each as long as what it is the gradient in.
#[derive(Debug)]
pub struct MixtureGradients<'a, T> {
    /// In the logits.
    pub logits: &'a mut [T],
    /// In the means.
    pub means: &'a mut [T],
    /// In the logarithms of the scales.
    pub log_scales: &'a mut [T],
    /// In the coefficients.
    pub coefficients: &'a mut [T],
}

impl<T> Mixture<'_, T> {
    /// Whether the lengths agree.
    fn check(&self, rows: usize) -> Result<()> {
        let Self { images, components, pixels, levels, .. } = *self;
        let logits = components.checked_mul(pixels).and_then(|count| count.checked_mul(images));
        let others = logits.and_then(|count| count.checked_mul(CHANNELS));
        let image = CHANNELS * pixels;
        let whole = image > 0 && self.x.len().is_multiple_of(image) && images.is_multiple_of(self.x.len() / image);
        let given = [self.means.len(), self.log_scales.len(), self.coefficients.len()].map(Some);
        let fits = rows == images && Some(self.logits.len()) == logits && given == [others; CHANNELS];
        if fits && (whole && !self.x.is_empty() || logits == Some(0)) && (2..=1 << 16).contains(&levels) {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "discretized_logistic_mixture_log_prob: {} values of x, {} logits and {given:?} parameters do not make \
             {images} images of {pixels} pixels with {components} components and {levels} levels",
            self.x.len(),
            self.logits.len()
        )))
    }

    /// Where x begins for an image.
    fn x_start(&self, image: usize) -> usize {
        image * CHANNELS * self.pixels % self.x.len().max(1)
    }

    /// Whether they are more than a second-level cache may still hold.
    fn is_far(&self) -> bool {
        self.logits.len() * (1 + 3 * CHANNELS) > NEAR
    }

    /// Chunks of pixels an image is cut into.
    fn chunks(&self) -> usize {
        self.pixels.div_ceil(CHUNK)
    }

    /// Ranges of chunks, one a thread.
    fn pieces(&self, threads: usize) -> Vec<Range<usize>> {
        let chunks = if self.components == 0 { 0 } else { self.images * self.chunks() };
        threads::pieces(chunks, GRAIN.div_ceil(CHUNK * self.components.max(1)), threads)
    }
}

impl<T> MixtureGradients<'_, T> {
    fn check(&self, logits: usize) -> Result<()> {
        let room = [self.means.len(), self.log_scales.len(), self.coefficients.len()];
        if self.logits.len() == logits && room == [CHANNELS * logits; CHANNELS] {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "discretized_logistic_mixture_log_prob: room for {} and {room:?} gradients of {logits} logits",
            self.logits.len()
        )))
    }
}

/// Writes one log-likelihood an image.
pub fn discretized_logistic_mixture_log_prob(data: Mixture<f32>, out: &mut [f32], threads: usize) -> Result<()> {
    discretized_logistic_mixture_log_prob_at(simd::level(), data, out, threads)
}

/// [`discretized_logistic_mixture_log_prob`] at a level of one's own choice.
pub fn discretized_logistic_mixture_log_prob_at(
    level: Level,
    data: Mixture<f32>,
    out: &mut [f32],
    threads: usize,
) -> Result<()> {
    data.check(out.len())?;
    let tasks = data.pieces(threads).into_iter().map(|chunks| move || simd::run(level, Forward { data, chunks }));
    sum_chunks(&threads::run(tasks.collect()).concat(), data.chunks(), out, |sum| sum as f32);
    Ok(())
}

/// An image's sum is that of its chunks, in order.
fn sum_chunks<T>(sums: &[f64], chunks: usize, out: &mut [T], narrow: impl Fn(f64) -> T) {
    for (image, out) in out.iter_mut().enumerate() {
        let own = sums.get(image * chunks..(image + 1) * chunks).unwrap_or_default();
        *out = narrow(own.iter().sum::<f64>() + 0.0);
    }
}

/// Writes the derivatives in all parameters, times one number `grad` an image.
pub fn discretized_logistic_mixture_log_prob_backward(
    data: Mixture<f32>,
    grad: &[f32],
    out: MixtureGradients<f32>,
    threads: usize,
) -> Result<()> {
    discretized_logistic_mixture_log_prob_backward_at(simd::level(), data, grad, out, threads)
}

/// [`discretized_logistic_mixture_log_prob_backward`] at a level of one's own choice.
pub fn discretized_logistic_mixture_log_prob_backward_at(
    level: Level,
    data: Mixture<f32>,
    grad: &[f32],
    out: MixtureGradients<f32>,
    threads: usize,
) -> Result<()> {
    data.check(grad.len())?;
    out.check(data.logits.len())?;
    if data.logits.is_empty() {
        return Ok(());
    }
    let tasks = gradients::share(&data, out, threads)
        .into_iter()
        .map(|share| move || simd::run(level, Backward { data, grad, share }));
    threads::run(tasks.collect());
    Ok(())
}

struct Forward<'a> {
    data: Mixture<'a, f32>,
    chunks: Range<usize>,
}

impl Kernel for Forward<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f64> {
        let data = self.data;
        let levels = Levels::<V>::new(data.levels);
        let mut scores = vec![0.0; data.components * V::COUNT];
        let mut ratios = scores.clone();
        let mut sums = Vec::with_capacity(self.chunks.len());
        for chunk in self.chunks {
            let (image, first) = (chunk / data.chunks(), chunk % data.chunks() * CHUNK);
            let (mut sum, mut pixel) = (0.0, first);
            while pixel < data.pixels.min(first + CHUNK) {
                sum += if pixel + V::COUNT <= data.pixels {
                    of_pixels::<V, true>(&data, &levels, [image, pixel], &mut scores, &mut ratios)
                } else {
                    of_pixels::<V, false>(&data, &levels, [image, pixel], &mut scores, &mut ratios)
                };
                pixel += V::COUNT;
            }
            sums.push(sum);
        }
        sums
    }
}

/// The log-likelihood of a vector's pixels.
#[inline(always)]
fn of_pixels<V: Lanes, const WHOLE: bool>(
    data: &Mixture<f32>,
    levels: &Levels<V>,
    [image, pixel]: [usize; 2],
    scores: &mut [f32],
    ratios: &mut [f32],
) -> f64 {
    let (pixels, far) = (Pixels::<V, WHOLE>::new(data, levels, image, pixel), data.is_far());
    let (mut most_logit, mut most_score) = (V::splat(f32::MIN), V::splat(f32::MIN));
    let mut m = 0;
    while m < data.components {
        if far {
            pixels.expect_next(data, m);
        }
        let [logit, linear, ratio] = likelihood(data, levels, &pixels, m);
        let score = logit.add(linear);
        (most_logit, most_score) = (most_logit.at_least(logit), most_score.at_least(score));
        score.store(scores, m * V::COUNT);
        ratio.store(ratios, m * V::COUNT);
        m += 1;
    }
    summed(&pixels, scores, ratios, [most_logit, most_score], data)
}

/// The sum over a vector's pixels of log sum_m w_m p_m - log sum_m w_m.
#[inline(always)]
fn summed<V: Lanes, const WHOLE: bool>(
    pixels: &Pixels<V, WHOLE>,
    scores: &[f32],
    ratios: &[f32],
    most: [V; 2],
    data: &Mixture<f32>,
) -> f64 {
    let [mass, weight] = mixed(pixels, scores, ratios, most, data);
    let (mut masses, mut shifts) = ([0.0; MOST_LANES], [0.0; MOST_LANES]);
    mass.div(weight).store(&mut masses, 0);
    most[1].sub(most[0]).store(&mut shifts, 0);
    let (mut products, mut shift, mut lane) = ([1.0; 2], 0.0, 0);
    // A mass is from 1e-35 / M to 1e27 M, so that the product of 8 is far from the ends of `f64`.
    while lane < pixels.count {
        products[lane / 8] *= f64::from(masses[lane]);
        shift += f64::from(shifts[lane]);
        lane += 1;
    }
    shift + products[0].ln() + products[1].ln()
}

/// sum_m w_m p_m exp(-most score) and sum_m w_m exp(-most logit).
#[inline(always)]
fn mixed<V: Lanes, const WHOLE: bool>(
    pixels: &Pixels<V, WHOLE>,
    scores: &[f32],
    ratios: &[f32],
    [most_logit, most_score]: [V; 2],
    data: &Mixture<f32>,
) -> [V; 2] {
    let (mut mass, mut weight, mut m) = (V::splat(0.0), V::splat(0.0), 0);
    while m < data.components {
        let (score, ratio) = (V::load(scores, m * V::COUNT), V::load(ratios, m * V::COUNT));
        mass = exp(score.sub(most_score)).mul_add(ratio, mass);
        weight = weight.add(exp(pixels.logit(data, m).sub(most_logit)));
        m += 1;
    }
    [mass, weight]
}
