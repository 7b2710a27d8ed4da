//! The same in double precision: one pixel at a time.

use super::{CHANNELS, CHUNK, Mixture, MixtureGradients, sum_chunks};
use crate::logistic::{Mass, level, mass};
use crate::{Result, threads};

/// A component at a pixel: log of its weight before normalisation, its masses, and tanh of its coefficients.
struct Component {
    logit: f64,
    masses: [Mass; CHANNELS],
    coefficients: [f64; CHANNELS],
}

impl Component {
    fn score(&self) -> f64 {
        self.logit + self.masses[0].log + self.masses[1].log + self.masses[2].log
    }
}

impl Mixture<'_, f64> {
    /// Where the m-th component's numbers of a channel stand.
    fn at(&self, image: usize, pixel: usize, channel: usize, m: usize) -> usize {
        ((image * CHANNELS + channel) * self.components + m) * self.pixels + pixel
    }

    fn logit_at(&self, image: usize, pixel: usize, m: usize) -> usize {
        (image * self.components + m) * self.pixels + pixel
    }

    /// A pixel's n, three levels times 2 minus the highest.
    fn n(&self, image: usize, pixel: usize) -> [f64; CHANNELS] {
        let (start, top) = (self.x_start(image) + pixel, self.levels as f64 - 1.0);
        [0, 1, 2].map(|channel| 2.0 * level(self.x[start + channel * self.pixels], top) - top)
    }

    fn component(&self, image: usize, pixel: usize, n: [f64; CHANNELS], m: usize) -> Component {
        let (at, top) = (|channel| self.at(image, pixel, channel, m), self.levels as f64 - 1.0);
        let coefficients = [0, 1, 2].map(|which| self.coefficients[at(which)].tanh());
        let before = [0.0, coefficients[0] * n[0], coefficients[1] * n[0] + coefficients[2] * n[1]];
        let masses = [0, 1, 2].map(|channel| {
            let distance = (-self.means[at(channel)]).mul_add(top, n[channel]) - before[channel];
            let log_scale = self.log_scales[at(channel)];
            let log_scale = if log_scale < self.floor { self.floor } else { log_scale };
            mass(f64::midpoint(n[channel], top), top, distance - 1.0, distance + 1.0, log_scale)
        });
        Component { logit: self.logits[self.logit_at(image, pixel, m)], masses, coefficients }
    }

    fn all(&self, image: usize, pixel: usize) -> (Vec<Component>, f64, f64) {
        let n = self.n(image, pixel);
        let all: Vec<_> = (0..self.components).map(|m| self.component(image, pixel, n, m)).collect();
        let total = log_sum_exp(all.iter().map(Component::score));
        let weights = log_sum_exp(all.iter().map(|one| one.logit));
        (all, total, weights)
    }
}

/// -inf where all are.
fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let most = values.clone().fold(f64::MIN, f64::max);
    most + values.map(|value| (value - most).exp()).sum::<f64>().ln()
}

/// [`super::discretized_logistic_mixture_log_prob`] in double precision.
pub fn discretized_logistic_mixture_log_prob_f64(data: Mixture<f64>, out: &mut [f64], threads: usize) -> Result<()> {
    data.check(out.len())?;
    let tasks = data.pieces(threads).into_iter().map(|chunks| {
        move || {
            let sum = |chunk: usize| {
                let (image, first) = (chunk / data.chunks(), chunk % data.chunks() * CHUNK);
                (first..data.pixels.min(first + CHUNK))
                    .map(|pixel| {
                        let (_, total, weights) = data.all(image, pixel);
                        total - weights
                    })
                    .sum()
            };
            chunks.map(sum).collect::<Vec<f64>>()
        }
    });
    sum_chunks(&threads::run(tasks.collect()).concat(), data.chunks(), out, |sum| sum);
    Ok(())
}

/// [`super::discretized_logistic_mixture_log_prob_backward`] in double precision, on the calling thread.
pub fn discretized_logistic_mixture_log_prob_backward_f64(
    data: Mixture<f64>,
    grad: &[f64],
    out: MixtureGradients<f64>,
) -> Result<()> {
    data.check(grad.len())?;
    out.check(data.logits.len())?;
    let top = data.levels as f64 - 1.0;
    for (image, &grad) in grad.iter().enumerate() {
        for pixel in 0..if data.components == 0 { 0 } else { data.pixels } {
            let n = data.n(image, pixel);
            let (all, total, weights) = data.all(image, pixel);
            for (m, one) in all.iter().enumerate() {
                let share = (one.score() - total).exp();
                let at = |channel| data.at(image, pixel, channel, m);
                out.logits[data.logit_at(image, pixel, m)] = grad * (share - (one.logit - weights).exp());
                // A component without a share has no gradient, also where its own derivatives are infinite.
                let scaled = |slope: f64| if share == 0.0 { 0.0 } else { grad * share * slope };
                for (channel, mass) in one.masses.iter().enumerate() {
                    out.means[at(channel)] = scaled(mass.d_mean);
                    let floored = data.log_scales[at(channel)] < data.floor;
                    out.log_scales[at(channel)] = if floored { 0.0 } else { scaled(mass.d_log_scale) };
                }
                for (which, (channel, source)) in [(1, 0), (2, 0), (2, 1)].into_iter().enumerate() {
                    let inner = 1.0 - one.coefficients[which] * one.coefficients[which];
                    out.coefficients[at(which)] = scaled(one.masses[channel].d_mean * n[source] / top * inner);
                }
            }
        }
    }
    Ok(())
}
