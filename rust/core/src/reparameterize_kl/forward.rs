//! z and the KL of units.

use std::ops::Range;

use super::memory::{Rows, Shared, Target};
use super::number::{Number, Real};
use super::prior::{Prior, divergence};
use super::{Plan, UNIT};
use crate::philox::Noise;
use crate::simd::{Aligned, Kernel, Lanes};

/// Sums that run side by side, in the same way at every level.
const CHAINS: usize = 8;

pub(super) struct Forward<'a, T: Number> {
    pub plan: Plan<'a>,
    pub jobs: Range<usize>,
    pub mean: Rows<'a, T>,
    pub logvar: Rows<'a, T>,
    pub prior: Prior<'a, T>,
    pub z: Shared<'a, T>,
    pub kl: Shared<'a, T::Work>,
    pub parts: Shared<'a, f64>,
    pub elementwise: bool,
}

impl<T: Number> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let [mut mean, mut std, mut prior_mean, mut prior_logvar, mut terms] = [Aligned([T::Work::ZERO; UNIT]); 5];
        let (mut eps, mut z) = (Aligned([0.0; UNIT]), Aligned([T::zero(); UNIT]));
        let (mean, std, terms, eps, z) = (&mut mean.0, &mut std.0, &mut terms.0, &mut eps.0, &mut z.0);
        let (prior_mean, prior_logvar) = (&mut prior_mean.0, &mut prior_logvar.0);
        let (layout, size) = (self.mean.layout(), self.plan.examples * self.plan.columns);
        let mut noise = Noise::new();
        let end = self.jobs.end;
        for job in self.jobs {
            for block in self.plan.job(job) {
                let unit = self.plan.unit(job, block);
                let (steps, next) = (unit.steps(), self.plan.after(job, block, end));
                self.mean.read(&unit, mean);
                self.logvar.read(&unit, std);
                // What is asked for a part at a time arrives while the processor computes.
                if let Some(next) = &next {
                    self.mean.expect(next);
                }
                let mut at = 0;
                if self.prior.is_given() {
                    self.prior.read(&unit, prior_mean, prior_logvar);
                    while at < steps {
                        let (distance, _, ratio, excess) =
                            divergence(mean[at], std[at], prior_mean[at], prior_logvar[at]);
                        terms[at] = T::Work::HALF * (distance * distance + (excess - ratio));
                        std[at] = std[at].deviation_and_excess().0;
                        at += 1;
                    }
                } else {
                    while at < steps {
                        let (deviation, excess) = std[at].deviation_and_excess();
                        terms[at] = T::Work::HALF * (mean[at] * mean[at] + (excess - std[at]));
                        std[at] = deviation;
                        at += 1;
                    }
                }
                // SAFETY: this unit alone has these columns of these examples.
                unsafe {
                    if self.elementwise {
                        Target::rows(self.kl, 0, layout).write(&unit, terms);
                    } else {
                        let piece = unit.columns.start / UNIT;
                        for (row, example) in unit.examples.clone().enumerate() {
                            let terms = &terms[row * unit.width..][..unit.columns.len()];
                            self.parts.slice(example * self.plan.pieces + piece, 1)[0] = sum(terms);
                        }
                    }
                }
                if let Some(next) = &next {
                    self.logvar.expect(next);
                }
                self.plan.place(&mut noise, &unit);
                for sample in 0..self.plan.draws.samples {
                    self.plan.normals(&mut noise, sample, eps);
                    if let Some(next) = &next {
                        Target::rows(self.z, sample * size, layout).expect(next);
                    }
                    let mut at = 0;
                    while at < steps {
                        z[at] = T::round(mean[at] + std[at] * T::Work::from_f32(eps[at]));
                        at += 1;
                    }
                    // SAFETY: as above.
                    unsafe { Target::rows(self.z, sample * size, layout).write(&unit, z) };
                }
            }
        }
    }
}

/// The sum of a row's terms, in an order of its own that no level changes.
#[inline(always)]
fn sum<R: Real>(terms: &[R]) -> f64 {
    let mut chains = [0.0; CHAINS];
    let (chunks, rest) = terms.as_chunks::<CHAINS>();
    for chunk in chunks {
        let mut chain = 0;
        while chain < CHAINS {
            chains[chain] += chunk[chain].to_f64();
            chain += 1;
        }
    }
    for (chain, term) in chains.iter_mut().zip(rest) {
        *chain += term.to_f64();
    }
    let pairs = [chains[0] + chains[4], chains[1] + chains[5], chains[2] + chains[6], chains[3] + chains[7]];
    (pairs[0] + pairs[2]) + (pairs[1] + pairs[3])
}
