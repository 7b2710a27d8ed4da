//! The gradients of units.

use std::ops::Range;

use super::memory::{Layout, Rows, Shared, Target};
use super::number::{Number, Real};
use super::prior::{ParameterMut, Prior, divergence};
use super::{Plan, UNIT, Unit};
use crate::Result;
use crate::philox::Noise;
use crate::simd::{Aligned, Kernel, Lanes};

/// Where the gradient of a parameter of the prior goes.
#[derive(Clone, Copy)]
pub(super) enum PriorGradient<'a, T: Number> {
    /// Nowhere.
    Unwanted,
    /// A row for every example.
    Narrow(Target<'a, T>),
    /// The same, in the type that is computed in.
    Wide(Target<'a, T::Work>),
    /// One row: the sums of the columns of a slab, `[slabs, columns]`.
    Shared(Shared<'a, f64>),
}

impl<'a, T: Number> PriorGradient<'a, T> {
    pub(super) fn new(
        wanted: Option<&'a mut ParameterMut<'_, T>>,
        shared: bool,
        parts: &'a mut [f64],
        like: Layout,
    ) -> Result<Self> {
        let Some(wanted) = wanted else { return Ok(Self::Unwanted) };
        wanted.check(like.columns() * if shared { 1 } else { like.examples })?;
        Ok(match wanted {
            _ if shared => Self::Shared(Shared::new(parts)),
            ParameterMut::Narrow(values) => Self::Narrow(Target::rows(Shared::new(values), 0, like)),
            ParameterMut::Wide(values) => Self::Wide(Target::rows(Shared::new(values), 0, like)),
        })
    }

    /// Writes a unit's gradient, or adds it to the sums of its columns.
    ///
    /// # Safety
    /// Nobody else uses the unit's elements at the same time.
    #[inline(always)]
    unsafe fn add(&self, unit: &Unit, values: &[T::Work; UNIT], out: &mut [T; UNIT], sums: &mut [f64; UNIT]) {
        match self {
            Self::Unwanted => {}
            Self::Narrow(target) => {
                let mut at = 0;
                while at < unit.size() {
                    out[at] = T::round(values[at]);
                    at += 1;
                }
                // SAFETY: the caller's promise.
                unsafe { target.write(unit, out) };
            }
            // SAFETY: the caller's promise.
            Self::Wide(target) => unsafe { target.write(unit, values) },
            Self::Shared(_) => {
                let mut row = 0;
                while row < unit.examples.len() {
                    let values = &values[row * unit.width..][..unit.columns.len()];
                    let sums = &mut sums[..values.len()];
                    let mut at = 0;
                    while at < values.len() {
                        sums[at] += values[at].to_f64();
                        at += 1;
                    }
                    row += 1;
                }
            }
        }
    }

    /// Writes the sums of a job's columns, and clears them.
    ///
    /// # Safety
    /// Nobody else uses these columns of the slab at the same time.
    #[inline(always)]
    unsafe fn finish(&self, start: usize, columns: usize, sums: &mut [f64; UNIT]) {
        if let Self::Shared(parts) = self {
            // SAFETY: the caller's promise.
            unsafe { parts.slice(start, columns) }.copy_from_slice(&sums[..columns]);
            sums.fill(0.0);
        }
    }
}

pub(super) struct Backward<'a, T: Number> {
    pub plan: Plan<'a>,
    pub jobs: Range<usize>,
    pub mean: Rows<'a, T>,
    pub logvar: Rows<'a, T>,
    pub prior: Prior<'a, T>,
    pub dz: Option<&'a [T]>,
    pub dkl: Option<&'a [T::Work]>,
    pub elementwise: bool,
    pub dmean: Target<'a, T>,
    pub dlogvar: Target<'a, T>,
    pub of_prior: [PriorGradient<'a, T>; 2],
}

impl<T: Number> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let [mut mean, mut logvar, mut prior_mean, mut prior_logvar] = [Aligned([T::Work::ZERO; UNIT]); 4];
        let [mut weight, mut of_noise, mut grad] = [Aligned([T::Work::ZERO; UNIT]); 3];
        let [mut of_mean, mut of_logvar] = [Aligned([T::zero(); UNIT]); 2];
        let (mean, logvar, weight) = (&mut mean.0, &mut logvar.0, &mut weight.0);
        let (prior_mean, prior_logvar) = (&mut prior_mean.0, &mut prior_logvar.0);
        let (of_noise, grad, of_mean, of_logvar) = (&mut of_noise.0, &mut grad.0, &mut of_mean.0, &mut of_logvar.0);
        let mut sums = [[0.0; UNIT]; 2];
        let mut noise = Noise::new();
        for job in self.jobs.clone() {
            for block in self.plan.job(job) {
                let unit = self.plan.unit(job, block);
                let (steps, next) = (unit.steps(), self.plan.after(job, block, self.jobs.end));
                self.logvar.read(&unit, logvar);
                // What is asked for a part at a time arrives while the processor computes.
                if let Some(next) = &next {
                    self.logvar.expect(next);
                }
                self.noise(&unit, next.as_ref(), &mut noise, grad, of_noise);
                if let Some(next) = &next {
                    self.dmean.expect(next);
                    self.dlogvar.expect(next);
                }
                if self.dkl.is_some() {
                    self.mean.read(&unit, mean);
                    if let Some(next) = &next {
                        self.mean.expect(next);
                    }
                    self.weights(&unit, weight);
                }
                let drawn = self.dz.is_some();
                let mut at = 0;
                if self.dkl.is_none() {
                    while at < steps {
                        of_mean[at] = T::round(grad[at]);
                        of_logvar[at] = T::round(T::Work::HALF * of_noise[at] * logvar[at].deviation_and_excess().0);
                        at += 1;
                    }
                } else if self.prior.is_given() {
                    self.prior.read(&unit, prior_mean, prior_logvar);
                    while at < steps {
                        let (distance, inverse, _, excess) =
                            divergence(mean[at], logvar[at], prior_mean[at], prior_logvar[at]);
                        let deviation = logvar[at].deviation_and_excess().0;
                        let noise = if drawn { of_noise[at] * deviation } else { T::Work::ZERO };
                        let pull = weight[at] * distance * inverse;
                        of_mean[at] = T::round(grad[at] + pull);
                        of_logvar[at] = T::round(T::Work::HALF * (noise + weight[at] * excess));
                        mean[at] = T::Work::ZERO - pull;
                        weight[at] = T::Work::ZERO - T::Work::HALF * weight[at] * (distance * distance + excess);
                        at += 1;
                    }
                } else {
                    while at < steps {
                        let (deviation, excess) = logvar[at].deviation_and_excess();
                        let noise = if drawn { of_noise[at] * deviation } else { T::Work::ZERO };
                        of_mean[at] = T::round(grad[at] + weight[at] * mean[at]);
                        of_logvar[at] = T::round(T::Work::HALF * (noise + weight[at] * excess));
                        at += 1;
                    }
                }
                // SAFETY: this unit alone has these columns of these examples.
                unsafe {
                    self.dmean.write(&unit, of_mean);
                    self.dlogvar.write(&unit, of_logvar);
                }
                // SAFETY: as above.
                unsafe {
                    self.of_prior[0].add(&unit, mean, of_mean, &mut sums[0]);
                    self.of_prior[1].add(&unit, weight, of_mean, &mut sums[1]);
                }
            }
            let piece = job % self.plan.pieces * UNIT;
            let (start, columns) = (job / self.plan.pieces * self.plan.columns + piece, self.plan.columns - piece);
            // SAFETY: this job alone has these columns of the slab.
            unsafe {
                self.of_prior[0].finish(start, columns.min(UNIT), &mut sums[0]);
                self.of_prior[1].finish(start, columns.min(UNIT), &mut sums[1]);
            }
        }
    }
}

impl<T: Number> Backward<'_, T> {
    /// The sums over the samples of dz and of dz eps.
    #[inline(always)]
    fn noise(
        &self,
        unit: &Unit,
        next: Option<&Unit>,
        noise: &mut Noise,
        grad: &mut [T::Work; UNIT],
        of_noise: &mut [T::Work; UNIT],
    ) {
        let steps = unit.steps();
        let Some(dz) = self.dz else {
            grad[..steps].fill(T::Work::ZERO);
            of_noise[..steps].fill(T::Work::ZERO);
            return;
        };
        let (layout, size) = (self.mean.layout(), self.plan.examples * self.plan.columns);
        let mut eps = Aligned([0.0; UNIT]);
        let eps = &mut eps.0;
        self.plan.place(noise, unit);
        if self.plan.draws.samples == 1 {
            Rows::part(dz, layout).read(unit, grad);
            if let Some(next) = next {
                Rows::part(dz, layout).expect(next);
            }
            self.plan.normals(noise, 0, eps);
            let mut at = 0;
            while at < steps {
                of_noise[at] = grad[at] * T::Work::from_f32(eps[at]);
                at += 1;
            }
            return;
        }
        let mut sums = [[0.0; UNIT]; 2];
        for sample in 0..self.plan.draws.samples {
            Rows::part(&dz[sample * size..], layout).read(unit, grad);
            self.plan.normals(noise, sample, eps);
            let mut at = 0;
            while at < steps {
                sums[0][at] += grad[at].to_f64();
                sums[1][at] += grad[at].to_f64() * f64::from(eps[at]);
                at += 1;
            }
        }
        let mut at = 0;
        while at < steps {
            grad[at] = T::Work::from_f64(sums[0][at]);
            of_noise[at] = T::Work::from_f64(sums[1][at]);
            at += 1;
        }
    }

    /// The gradient of kl, at every element.
    #[inline(always)]
    fn weights(&self, unit: &Unit, weight: &mut [T::Work; UNIT]) {
        let Some(dkl) = self.dkl else { return };
        if self.elementwise {
            Rows::part(dkl, self.mean.layout()).read(unit, weight);
            return;
        }
        for (row, example) in unit.examples.clone().enumerate() {
            weight[row * unit.width..][..unit.width].fill(dkl[example]);
        }
    }
}
