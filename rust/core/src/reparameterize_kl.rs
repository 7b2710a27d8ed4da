//! `reparameterize_kl`: z = mean + std eps and KL(N(mean, std^2) || prior), and the gradient, which draws eps again.
//!
//! Work is cut into units of a fixed size: some short rows, or a piece of a long one. A unit's result depends on nothing
//! but its place, and the units of a row are added in order, so results are the same for any number of threads. The
//! gradient of a prior that all examples share is summed over slabs of rows, as many for any number of threads.

mod backward;
mod forward;
mod memory;
mod number;
mod prior;
#[cfg(test)]
mod tests;

use std::ops::Range;

use backward::{Backward, PriorGradient};
use forward::Forward;
use memory::Shared;
pub use memory::{Gradients, Layout, Rows};
pub use number::{Number, Real};
pub use prior::{Parameter, ParameterMut, Prior};

use crate::philox::{GROUPS, Noise, STEP};
use crate::simd::{self, Level};
use crate::{Error, Result, threads};

/// Columns, padded to whole counters, that a unit holds: its buffers stay in the first-level cache.
const UNIT: usize = 4 * GROUPS;
/// Normals that are worth a thread.
const GRAIN: usize = 1 << 15;
/// Partial sums, at most, of the gradient of a prior that all examples share.
const SLABS: usize = 32;
/// Units, at least, behind one of them.
const DEPTH: usize = 8;

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
    prior: Prior<T>,
    draws: Draws,
    z: &mut [T],
    kl: &mut [T::Work],
    elementwise: bool,
    threads: usize,
) -> Result<()> {
    let plan = Plan::new(&mean, &logvar, &prior, draws)?;
    expect("z", z.len(), draws.samples * plan.examples * plan.columns)?;
    expect("kl", kl.len(), plan.examples * if elementwise { plan.columns } else { 1 })?;
    let mut parts = vec![0.0; if elementwise { 0 } else { plan.examples * plan.pieces }];
    {
        let (z, kl, parts) = (Shared::new(z), Shared::new(&mut *kl), Shared::new(&mut parts));
        plan.run(threads, |jobs| {
            simd::run(level, Forward { plan, jobs, mean, logvar, prior, z, kl, parts, elementwise });
        });
    }
    if !elementwise {
        for (example, kl) in kl.iter_mut().enumerate() {
            *kl = T::Work::from_f64(parts[example * plan.pieces..][..plan.pieces].iter().sum());
        }
    }
    Ok(())
}

/// Writes the gradients of mean and logvar from those of z (as long as z) and kl (as in [`forward`]), and those of the
/// prior's parameters that are asked for: as long as mean, or of one row and summed over the examples.
pub fn backward<T: Number>(
    level: Level,
    mean: Rows<T>,
    logvar: Rows<T>,
    prior: Prior<T>,
    draws: Draws,
    dz: Option<&[T]>,
    dkl: Option<&[T::Work]>,
    elementwise: bool,
    gradients: Gradients<T>,
    prior_gradients: [Option<ParameterMut<T>>; 2],
    threads: usize,
) -> Result<()> {
    let mut plan = Plan::new(&mean, &logvar, &prior, draws)?;
    if let Some(dz) = dz {
        expect("dz", dz.len(), draws.samples * plan.examples * plan.columns)?;
    }
    if let Some(dkl) = dkl {
        expect("dkl", dkl.len(), plan.examples * if elementwise { plan.columns } else { 1 })?;
    }
    let [dmean, dlogvar] = gradients.targets(mean.layout())?;
    let shared = [&prior.mean, &prior.logvar].map(|parameter| parameter.as_ref().is_some_and(Parameter::is_shared));
    if shared.contains(&true) {
        plan.deepen();
    }
    let [mut of_mean, mut of_logvar] = prior_gradients;
    let mut parts = [&of_mean, &of_logvar].map(|wanted| vec![0.0; if wanted.is_some() { plan.parts() } else { 0 }]);
    {
        let [first, second] = &mut parts;
        let of_prior = [
            PriorGradient::new(of_mean.as_mut(), shared[0], first, mean.layout())?,
            PriorGradient::new(of_logvar.as_mut(), shared[1], second, mean.layout())?,
        ];
        plan.run(threads, |jobs| {
            let work = Backward { plan, jobs, mean, logvar, prior, dz, dkl, elementwise, dmean, dlogvar, of_prior };
            simd::run(level, work);
        });
    }
    for ((gradient, parts), shared) in [of_mean, of_logvar].into_iter().zip(&parts).zip(shared) {
        if let (Some(gradient), true) = (gradient, shared) {
            gradient.add_up(parts);
        }
    }
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
    /// Units below each other that make a job, done in order.
    depth: usize,
}

/// The part of the matrix that a unit holds; its buffers hold row r from `r * width` on.
struct Unit {
    examples: Range<usize>,
    columns: Range<usize>,
    width: usize,
}

impl<'a> Plan<'a> {
    fn new<T: Number>(mean: &Rows<T>, logvar: &Rows<T>, prior: &Prior<T>, draws: Draws<'a>) -> Result<Self> {
        let (examples, columns) = (mean.layout().examples, mean.layout().columns());
        if logvar.layout().shape() != mean.layout().shape() {
            return Err(Error::Argument("reparameterize_kl: mean and logvar have different shapes".to_owned()));
        }
        prior.check(mean.layout())?;
        if let Some(ids) = draws.example_ids {
            expect("example_ids", ids.len(), examples)?;
        }
        let pieces = columns.div_ceil(UNIT);
        let rows = if pieces == 1 { UNIT / columns.next_multiple_of(4) } else { 1 };
        Ok(Self { draws, examples, columns, pieces, rows, depth: 1 })
    }

    /// Jobs of many units, [`DEPTH`] at least, at most [`SLABS`] below each other.
    fn deepen(&mut self) {
        self.depth = self.blocks().div_ceil(SLABS).max(DEPTH);
    }

    fn blocks(&self) -> usize {
        self.examples.div_ceil(self.rows)
    }

    fn slabs(&self) -> usize {
        self.blocks().div_ceil(self.depth)
    }

    /// Partial sums of columns.
    fn parts(&self) -> usize {
        self.slabs() * self.columns
    }

    fn run(&self, threads: usize, work: impl Fn(Range<usize>) + Sync) {
        let size = self.rows * self.depth * self.columns.min(UNIT) * self.draws.samples;
        let work = &work;
        let ranges = threads::pieces(self.slabs() * self.pieces, GRAIN.div_ceil(size.max(1)), threads);
        let tasks = ranges.into_iter().map(|range| {
            move || {
                work(range);
                simd::streamed();
            }
        });
        threads::run(tasks.collect());
    }

    /// The blocks of rows of a job.
    #[inline(always)]
    fn job(&self, job: usize) -> Range<usize> {
        let slab = job / self.pieces;
        slab * self.depth..self.blocks().min((slab + 1) * self.depth)
    }

    /// The unit after this one, of jobs before `end`.
    #[inline(always)]
    fn after(&self, job: usize, block: usize, end: usize) -> Option<Unit> {
        if block + 1 < self.job(job).end {
            return Some(self.unit(job, block + 1));
        }
        (job + 1 < end).then(|| self.unit(job + 1, self.job(job + 1).start))
    }

    #[inline(always)]
    fn unit(&self, job: usize, block: usize) -> Unit {
        let piece = job % self.pieces;
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
