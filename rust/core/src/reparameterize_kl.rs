//! `reparameterize_kl`: z = mean + std eps and KL(N(mean, std^2) || N(0, 1)), and the gradient, which draws eps again.
//!
//! Work is cut into units of a fixed size: some short rows, or a piece of a long one. A unit's result depends on nothing
//! but its place, and the units of a row are added in order, so results are the same for any number of threads.

mod memory;
mod number;
#[cfg(test)]
mod tests;

use std::ops::Range;

use memory::Shared;
pub use memory::{Gradients, Layout, Rows};
pub use number::{Number, Real};

use crate::philox::{BATCH, normals};
use crate::simd::{self, Kernel, Lanes, Level};
use crate::{Error, Result, threads};

/// Columns, padded to whole counters, that a unit holds: its buffers stay in the first-level cache.
const UNIT: usize = 1024;
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

    /// The unit's noise for one sample; returns how much of `eps` is used.
    #[inline(always)]
    fn noise(&self, unit: &Unit, sample: usize, eps: &mut [f32; UNIT + BATCH]) -> usize {
        let ids = self.draws.example_ids;
        let start = unit.examples.start;
        let used = unit.size();
        normals(
            self.draws.seed as u64,
            self.draws.first.wrapping_add(sample as u32),
            unit.examples.len(),
            #[inline(always)]
            |row| ids.map_or((start + row) as u64, |ids| ids[start + row] as u64),
            unit.columns.start / 4,
            unit.width / 4,
            &mut eps[..used.next_multiple_of(BATCH)],
        );
        used
    }

    /// Where a row of the unit begins in `[samples, examples, columns]`.
    #[inline(always)]
    fn place(&self, sample: usize, example: usize, unit: &Unit) -> usize {
        (sample * self.examples + example) * self.columns + unit.columns.start
    }
}

impl Unit {
    #[inline(always)]
    fn size(&self) -> usize {
        self.examples.len() * self.width
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
        let zero = T::Work::from_f64(0.0);
        let (mut mean, mut std, mut terms) = ([zero; UNIT], [zero; UNIT], [zero; UNIT]);
        let mut eps = [0.0; UNIT + BATCH];
        for number in self.units {
            let unit = self.plan.unit(number);
            self.mean.read(&unit, &mut mean);
            self.logvar.read(&unit, &mut std);
            let mut at = 0;
            while at < unit.size() {
                let (deviation, excess) = std[at].deviation_and_excess();
                terms[at] = T::Work::HALF * (mean[at] * mean[at] + (excess - std[at]));
                std[at] = deviation;
                at += 1;
            }
            for (row, example) in unit.examples.clone().enumerate() {
                let terms = &terms[row * unit.width..][..unit.columns.len()];
                // SAFETY: this unit alone has these columns of this example.
                unsafe {
                    if self.elementwise {
                        self.kl.slice(self.plan.place(0, example, &unit), terms.len()).copy_from_slice(terms);
                    } else {
                        let piece = unit.columns.start / UNIT;
                        self.parts.slice(example * self.plan.pieces + piece, 1)[0] = sum(terms);
                    }
                }
            }
            for sample in 0..self.plan.draws.samples {
                self.plan.noise(&unit, sample, &mut eps);
                for (row, example) in unit.examples.clone().enumerate() {
                    let start = row * unit.width;
                    // SAFETY: as above.
                    let z = unsafe { self.z.slice(self.plan.place(sample, example, &unit), unit.columns.len()) };
                    let mean = &mean[start..][..z.len()];
                    let std = &std[start..][..z.len()];
                    let eps = &eps[start..][..z.len()];
                    let mut at = 0;
                    while at < z.len() {
                        z[at] = T::round(mean[at] + std[at] * T::Work::from_f32(eps[at]));
                        at += 1;
                    }
                }
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
    dmean: memory::Target<'a, T>,
    dlogvar: memory::Target<'a, T>,
}

impl<T: Number> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let zero = T::Work::from_f64(0.0);
        let (mut mean, mut std, mut excess) = ([zero; UNIT], [zero; UNIT], [zero; UNIT]);
        let (mut of_mean, mut of_std) = ([0.0; UNIT], [0.0; UNIT]);
        let mut eps = [0.0; UNIT + BATCH];
        for number in self.units {
            let unit = self.plan.unit(number);
            let size = unit.size();
            self.logvar.read(&unit, &mut std);
            let mut at = 0;
            while at < size {
                (std[at], excess[at]) = std[at].deviation_and_excess();
                at += 1;
            }
            of_mean[..size].fill(0.0);
            of_std[..size].fill(0.0);
            if let Some(dz) = self.dz {
                for sample in 0..self.plan.draws.samples {
                    self.plan.noise(&unit, sample, &mut eps);
                    for (row, example) in unit.examples.clone().enumerate() {
                        let start = row * unit.width;
                        let dz = &dz[self.plan.place(sample, example, &unit)..][..unit.columns.len()];
                        let eps = &eps[start..][..dz.len()];
                        let of_mean = &mut of_mean[start..][..dz.len()];
                        let of_std = &mut of_std[start..][..dz.len()];
                        let mut at = 0;
                        while at < dz.len() {
                            let grad = dz[at].work().to_f64();
                            of_mean[at] += grad;
                            of_std[at] += grad * f64::from(eps[at]);
                            at += 1;
                        }
                    }
                }
            }
            let mut at = 0;
            while at < size {
                of_std[at] *= std[at].to_f64();
                at += 1;
            }
            if let Some(dkl) = self.dkl {
                self.mean.read(&unit, &mut mean);
                for (row, example) in unit.examples.clone().enumerate() {
                    let start = row * unit.width;
                    let count = unit.columns.len();
                    let mean = &mean[start..][..count];
                    let excess = &excess[start..][..count];
                    let of_mean = &mut of_mean[start..][..count];
                    let of_std = &mut of_std[start..][..count];
                    let place = if self.elementwise { self.plan.place(0, example, &unit) } else { example };
                    let weights = &dkl[place..][..if self.elementwise { count } else { 1 }];
                    let mut at = 0;
                    while at < count {
                        let weight = weights[if self.elementwise { at } else { 0 }].to_f64();
                        of_mean[at] += weight * mean[at].to_f64();
                        of_std[at] += weight * excess[at].to_f64();
                        at += 1;
                    }
                }
            }
            // SAFETY: this unit alone has these columns of these examples.
            unsafe {
                self.dmean.write(&unit, &of_mean, 1.0);
                self.dlogvar.write(&unit, &of_std, 0.5);
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
