//! The gradients: each component's derivatives, times its share of the likelihood.

use std::ops::Range;

use super::component::{Pixels, Slopes, component};
use super::{CHANNELS, CHUNK, GRAIN, MOST_LANES, Mixture, MixtureGradients, mixed};
use crate::logistic::Levels;
use crate::simd::{Kernel, Lanes, exp};
use crate::threads;

/// Derivatives of one component: its logit's, and three each of means, logarithms of scales and coefficients.
const PARAMETERS: usize = 1 + 3 * CHANNELS;

/// What one thread writes: some images, and some pixels of each.
pub struct Share<'a> {
    images: Range<usize>,
    pixels: Range<usize>,
    /// One slice of those pixels a row (image, component), or (image, channel, component).
    logits: Vec<&'a mut [f32]>,
    others: [Vec<&'a mut [f32]>; 3],
}

/// Cuts the work by images, and where there are fewer images than threads, by pixels too.
pub fn share<'a>(data: &Mixture<f32>, out: MixtureGradients<'a, f32>, threads: usize) -> Vec<Share<'a>> {
    let each = data.components * data.pixels;
    let images = threads::pieces(data.images, GRAIN.div_ceil(each), threads);
    let grain = GRAIN.div_ceil(CHUNK * data.components);
    let parts = if images.len() < data.images { 1 } else { threads / data.images };
    let parts = threads::pieces(data.chunks(), grain, parts);
    let mut shares = Vec::new();
    for images in &images {
        for chunks in &parts {
            shares.push(Share {
                images: images.clone(),
                pixels: chunks.start * CHUNK..data.pixels.min(chunks.end * CHUNK),
                logits: Vec::new(),
                others: [Vec::new(), Vec::new(), Vec::new()],
            });
        }
    }
    cut(data, out.logits, data.components, &mut shares, |share| &mut share.logits);
    for (which, values) in [out.means, out.log_scales, out.coefficients].into_iter().enumerate() {
        cut(data, values, CHANNELS * data.components, &mut shares, |share| &mut share.others[which]);
    }
    shares
}

/// Hands every row of pixels out to the shares of its image.
fn cut<'a>(
    data: &Mixture<f32>,
    values: &'a mut [f32],
    rows: usize,
    shares: &mut [Share<'a>],
    own: impl for<'b> Fn(&'b mut Share<'a>) -> &'b mut Vec<&'a mut [f32]>,
) {
    for (row, mut pixels) in values.chunks_mut(data.pixels).enumerate() {
        for share in shares.iter_mut().filter(|share| share.images.contains(&(row / rows))) {
            let (head, tail) = pixels.split_at_mut(share.pixels.len());
            own(share).push(head);
            pixels = tail;
        }
    }
}

pub struct Backward<'a> {
    pub data: Mixture<'a, f32>,
    pub grad: &'a [f32],
    pub share: Share<'a>,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (data, levels) = (self.data, Levels::<V>::new(self.data.levels));
        let scores = vec![0.0; data.components * V::COUNT];
        let slopes = vec![0.0; data.components * PARAMETERS * V::COUNT];
        let mut room = Room { ratios: scores.clone(), scores, slopes };
        for image in self.share.images.clone() {
            let mut pixel = self.share.pixels.start;
            while pixel < self.share.pixels.end {
                if pixel + V::COUNT <= data.pixels {
                    self.of_pixels::<V, true>(&levels, [image, pixel], &mut room);
                } else {
                    self.of_pixels::<V, false>(&levels, [image, pixel], &mut room);
                }
                pixel += V::COUNT;
            }
        }
    }
}

/// What is kept of every component of a vector's pixels.
struct Room {
    scores: Vec<f32>,
    ratios: Vec<f32>,
    slopes: Vec<f32>,
}

/// Stores a component's derivatives behind the place of its logit's.
#[inline(always)]
fn keep<V: Lanes>(slopes: &Slopes<V>, values: &mut [f32]) {
    let mut channel = 0;
    while channel < CHANNELS {
        slopes.means[channel].store(values, (1 + channel) * V::COUNT);
        slopes.log_scales[channel].store(values, (1 + CHANNELS + channel) * V::COUNT);
        slopes.coefficients[channel].store(values, (1 + 2 * CHANNELS + channel) * V::COUNT);
        channel += 1;
    }
}

impl Backward<'_> {
    /// Writes the derivatives of all components of a vector's pixels.
    #[inline(always)]
    fn of_pixels<V: Lanes, const WHOLE: bool>(
        &mut self,
        levels: &Levels<V>,
        [image, pixel]: [usize; 2],
        Room { scores, ratios, slopes }: &mut Room,
    ) {
        let data = self.data;
        let (pixels, far) = (Pixels::<V, WHOLE>::new(&data, levels, image, pixel), data.is_far());
        let mut most = [V::splat(f32::MIN); 2];
        let mut m = 0;
        while m < data.components {
            if far {
                pixels.expect_next(&data, m);
            }
            let one = component(&data, levels, &pixels, m);
            let score = one.logit.add(one.linear);
            most = [most[0].at_least(one.logit), most[1].at_least(score)];
            score.store(scores, m * V::COUNT);
            V::splat(1.0).div(one.growth.add(V::splat(1.0))).store(ratios, m * V::COUNT);
            keep(&one.slopes(levels, &pixels), &mut slopes[m * PARAMETERS * V::COUNT..]);
            m += 1;
        }
        let sums = mixed(&pixels, scores, ratios, most, &data);
        let grad = V::splat(self.grad[image]);
        let mut m = 0;
        while m < data.components {
            let own = V::load(scores, m * V::COUNT).sub(most[1]);
            let ratio = V::load(ratios, m * V::COUNT);
            let share = exp(own).mul(ratio).div(sums[0]);
            let weight = exp(pixels.logit(&data, m).sub(most[0])).div(sums[1]);
            let values = &mut slopes[m * PARAMETERS * V::COUNT..(m + 1) * PARAMETERS * V::COUNT];
            share.sub(weight).store(values, 0);
            self.write::<V>([grad, share], values, [image, pixel, m], pixels.count);
            m += 1;
        }
    }

    /// The derivatives of component m, times `grad`, and all but the logit's times the component's share.
    #[inline(always)]
    fn write<V: Lanes>(&mut self, [grad, share]: [V; 2], values: &[f32], [image, pixel, m]: [usize; 3], count: usize) {
        let (components, at) = (self.data.components, pixel - self.share.pixels.start);
        let image = image - self.share.images.start;
        store(grad.mul(V::load(values, 0)), self.share.logits[image * components + m], at, count);
        let scale = grad.mul(share);
        let mut which = 0;
        while which < 3 {
            let mut channel = 0;
            while channel < CHANNELS {
                let value = V::load(values, (1 + which * CHANNELS + channel) * V::COUNT);
                let row = (image * CHANNELS + channel) * components + m;
                // A component without a share has no gradient, also where its own derivatives are infinite.
                store(scale.mul(value).where_nonzero(share), self.share.others[which][row], at, count);
                channel += 1;
            }
            which += 1;
        }
    }
}

/// Writes `count` lanes.
#[inline(always)]
fn store<V: Lanes>(lanes: V, values: &mut [f32], at: usize, count: usize) {
    if count == V::COUNT {
        lanes.store(values, at);
        return;
    }
    let mut whole = [0.0; MOST_LANES];
    lanes.store(&mut whole, 0);
    values[at..at + count].copy_from_slice(&whole[..count]);
}
