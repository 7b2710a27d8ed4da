//! `reparameterize_kl`: z = mean + std eps and KL(N(mean, std^2) || N(0, 1)), and the gradient, which draws eps again.
//!
//! Work is cut into units of a fixed size: some short rows, or a piece of a long one. A unit's result depends on nothing
//! but its place, and the units of a row are added in order, so results are the same for any number of threads.

mod memory;
mod number;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use memory::{Gradients, Layout, Rows};
use memory::{Shared, Target};
pub use number::{Number, Real};

use crate::philox::{GROUPS, Noise, STEP};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::{Error, Result, threads};

/// Columns, padded to whole counters, that a unit holds: its buffers stay in the first-level cache.
const UNIT: usize = 4 * GROUPS;
/// Normals that are worth a thread.
const GRAIN: usize = 1 << 15;
/// Sums that run side by side, in the same way at every level.
const CHAINS: usize = 8;

/// What decides the noise.
#[derive(Debug, Clone, Copy)]
pub struct Draws<'a> {
    /// The key.
    pub seed: i64,
    /// The stream of each example; its position without.
    pub example_ids: Option<&'a [i64]>,
    /// How many samples an example gets.
    pub samples: usize,
    /// The number of the first.
    pub first: u32,
}

/// Writes z `[samples, examples, columns]` and kl, `[examples]` or, as long as mean, one an element.
pub fn forward<T: Number>(
    level: Level,
    mean: Rows<T>,
    logvar: Rows<T>,
    draws: Draws,
    z: &mut [T],
    kl: &mut [T::Work],
    elementwise: bool,
    threads: usize,
) -> Result<()> {
    let plan = Plan::new(&mean, &logvar, draws)?;
    expect("z", z.len(), draws.samples * plan.examples * plan.columns)?;
    expect("kl", kl.len(), plan.examples * if elementwise { plan.columns } else { 1 })?;
    let mut parts = vec![0.0; if elementwise { 0 } else { plan.examples * plan.pieces }];
    {
        let (z, kl, parts) = (Shared::new(z), Shared::new(&mut *kl), Shared::new(&mut parts));
        plan.run(threads, |units| {
            simd::run(level, Forward { plan, units, mean, logvar, z, kl, parts, elementwise });
        });
    }
    if !elementwise {
        for (example, kl) in kl.iter_mut().enumerate() {
            *kl = T::Work::from_f64(parts[example * plan.pieces..][..plan.pieces].iter().sum());
        }
    }
    Ok(())
}

/// Writes the gradients of mean and logvar from those of z (as long as z) and kl (as in [`forward`]).
pub fn backward<T: Number>(
    level: Level,
    mean: Rows<T>,
    logvar: Rows<T>,
    draws: Draws,
    dz: Option<&[T]>,
    dkl: Option<&[T::Work]>,
    elementwise: bool,
    gradients: Gradients<T>,
    threads: usize,
) -> Result<()> {
    let plan = Plan::new(&mean, &logvar, draws)?;
    if let Some(dz) = dz {
        expect("dz", dz.len(), draws.samples * plan.examples * plan.columns)?;
    }
    if let Some(dkl) = dkl {
        expect("dkl", dkl.len(), plan.examples * if elementwise { plan.columns } else { 1 })?;
    }
    let [dmean, dlogvar] = gradients.targets(mean.layout())?;
    plan.run(threads, |units| {
        simd::run(level, Backward { plan, units, mean, logvar, dz, dkl, elementwise, dmean, dlogvar });
    });
    Ok(())
}

fn expect(name: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Argument(format!("reparameterize_kl: {name} has {found} elements, expected {expected}")))
}

/// How the work is cut.
#[derive(Clone, Copy)]
struct Plan<'a> {
    draws: Draws<'a>,
    examples: usize,
    columns: usize,
    /// Units in a row, when it is long; else 1.
    pieces: usize,
    /// Rows of a unit: more than 1 only when rows are short.
    rows: usize,
}

/// The part of the matrix that a unit holds; its buffers hold row r from `r * width` on.
struct Unit {
    examples: Range<usize>,
    columns: Range<usize>,
    width: usize,
}

impl<'a> Plan<'a> {
    fn new<T>(mean: &Rows<T>, logvar: &Rows<T>, draws: Draws<'a>) -> Result<Self> {
        let (examples, columns) = (mean.layout().examples, mean.layout().columns());
        if logvar.layout().shape() != mean.layout().shape() {
            return Err(Error::Argument("reparameterize_kl: mean and logvar have different shapes".to_owned()));
        }
        if let Some(ids) = draws.example_ids {
            expect("example_ids", ids.len(), examples)?;
        }
        let pieces = columns.div_ceil(UNIT);
        let rows = if pieces == 1 { UNIT / columns.next_multiple_of(4) } else { 1 };
        Ok(Self { draws, examples, columns, pieces, rows })
    }

    fn run(&self, threads: usize, work: impl Fn(Range<usize>) + Sync) {
        let units = self.examples.div_ceil(self.rows) * self.pieces;
        let size = self.rows * self.columns.min(UNIT) * self.draws.samples;
        let work = &work;
        let ranges = threads::pieces(units, GRAIN.div_ceil(size.max(1)), threads);
        threads::run(ranges.into_iter().map(|range| move || work(range)).collect());
    }

    #[inline(always)]
    fn unit(&self, number: usize) -> Unit {
        let (block, piece) = (number / self.pieces, number % self.pieces);
        let examples = block * self.rows..self.examples.min((block + 1) * self.rows);
        let columns = piece * UNIT..self.columns.min((piece + 1) * UNIT);
        let width = columns.len().next_multiple_of(4);
        Unit { examples, columns, width }
    }

    #[inline(always)]
    fn place(&self, noise: &mut Noise, unit: &Unit) {
        let (ids, start) = (self.draws.example_ids, unit.examples.start);
        noise.place(
            unit.examples.len(),
            #[inline(always)]
            |row| ids.map_or((start + row) as u64, |ids| ids[start + row] as u64),
            unit.columns.start / 4,
            unit.width / 4,
        );
    }

    #[inline(always)]
    fn normals(&self, noise: &mut Noise, sample: usize, eps: &mut [f32; UNIT]) {
        noise.normals(self.draws.seed as u64, self.draws.first.wrapping_add(sample as u32), eps);
    }
}

impl Unit {
    #[inline(always)]
    fn size(&self) -> usize {
        self.examples.len() * self.width
    }

    /// The size in whole steps: what loops run over.
    #[inline(always)]
    fn steps(&self) -> usize {
        self.size().next_multiple_of(STEP).min(UNIT)
    }
}

struct Forward<'a, T: Number> {
    plan: Plan<'a>,
    units: Range<usize>,
    mean: Rows<'a, T>,
    logvar: Rows<'a, T>,
    z: Shared<'a, T>,
    kl: Shared<'a, T::Work>,
    parts: Shared<'a, f64>,
    elementwise: bool,
}

impl<T: Number> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (mut mean, mut std) = ([T::Work::ZERO; UNIT], [T::Work::ZERO; UNIT]);
        let (mut terms, mut eps, mut z) = ([T::Work::ZERO; UNIT], [0.0; UNIT], [T::zero(); UNIT]);
        let (layout, size) = (self.mean.layout(), self.plan.examples * self.plan.columns);
        let mut noise = Noise::new();
        for number in self.units {
            let unit = self.plan.unit(number);
            let steps = unit.steps();
            self.mean.read(&unit, &mut mean);
            self.logvar.read(&unit, &mut std);
            let mut at = 0;
            while at < steps {
                let (deviation, excess) = std[at].deviation_and_excess();
                terms[at] = T::Work::HALF * (mean[at] * mean[at] + (excess - std[at]));
                std[at] = deviation;
                at += 1;
            }
            // SAFETY: this unit alone has these columns of these examples.
            unsafe {
                if self.elementwise {
                    Target::rows(self.kl, 0, layout).write(&unit, &terms);
                } else {
                    let piece = unit.columns.start / UNIT;
                    for (row, example) in unit.examples.clone().enumerate() {
                        let terms = &terms[row * unit.width..][..unit.columns.len()];
                        self.parts.slice(example * self.plan.pieces + piece, 1)[0] = sum(terms);
                    }
                }
            }
            self.plan.place(&mut noise, &unit);
            for sample in 0..self.plan.draws.samples {
                self.plan.normals(&mut noise, sample, &mut eps);
                let mut at = 0;
                while at < steps {
                    z[at] = T::round(mean[at] + std[at] * T::Work::from_f32(eps[at]));
                    at += 1;
                }
                // SAFETY: as above.
                unsafe { Target::rows(self.z, sample * size, layout).write(&unit, &z) };
            }
        }
    }
}

struct Backward<'a, T: Number> {
    plan: Plan<'a>,
    units: Range<usize>,
    mean: Rows<'a, T>,
    logvar: Rows<'a, T>,
    dz: Option<&'a [T]>,
    dkl: Option<&'a [T::Work]>,
    elementwise: bool,
    dmean: Target<'a, T>,
    dlogvar: Target<'a, T>,
}

impl<T: Number> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (mut value, mut grad) = ([T::Work::ZERO; UNIT], [T::Work::ZERO; UNIT]);
        let (mut std, mut excess) = ([T::Work::ZERO; UNIT], [T::Work::ZERO; UNIT]);
        let (mut of_mean, mut of_logvar) = ([0.0; UNIT], [0.0; UNIT]);
        let (mut eps, mut out) = ([0.0; UNIT], [T::zero(); UNIT]);
        let (layout, size) = (self.mean.layout(), self.plan.examples * self.plan.columns);
        let mut noise = Noise::new();
        for number in self.units {
            let unit = self.plan.unit(number);
            let steps = unit.steps();
            self.logvar.read(&unit, &mut value);
            let mut at = 0;
            while at < steps {
                (std[at], excess[at]) = value[at].deviation_and_excess();
                at += 1;
            }
            of_mean[..steps].fill(0.0);
            of_logvar[..steps].fill(0.0);
            if let Some(dz) = self.dz {
                self.plan.place(&mut noise, &unit);
                for sample in 0..self.plan.draws.samples {
                    Rows::part(&dz[sample * size..], layout).read(&unit, &mut grad);
                    self.plan.normals(&mut noise, sample, &mut eps);
                    let mut at = 0;
                    while at < steps {
                        of_mean[at] += grad[at].to_f64();
                        of_logvar[at] += grad[at].to_f64() * f64::from(eps[at]);
                        at += 1;
                    }
                }
                let mut at = 0;
                while at < steps {
                    of_logvar[at] *= std[at].to_f64();
                    at += 1;
                }
            }
            if let Some(dkl) = self.dkl {
                self.mean.read(&unit, &mut value);
                if self.elementwise {
                    Rows::part(dkl, layout).read(&unit, &mut grad);
                } else {
                    for (row, example) in unit.examples.clone().enumerate() {
                        grad[row * unit.width..][..unit.width].fill(dkl[example]);
                    }
                }
                let mut at = 0;
                while at < steps {
                    let weight = grad[at].to_f64();
                    of_mean[at] += weight * value[at].to_f64();
                    of_logvar[at] += weight * excess[at].to_f64();
                    at += 1;
                }
            }
            for (target, of, factor) in [(self.dmean, &of_mean, 1.0), (self.dlogvar, &of_logvar, 0.5)] {
                let mut at = 0;
                while at < steps {
                    out[at] = T::round(T::Work::from_f64(of[at] * factor));
                    at += 1;
                }
                // SAFETY: this unit alone has these columns of these examples.
                unsafe { target.write(&unit, &out) };
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
