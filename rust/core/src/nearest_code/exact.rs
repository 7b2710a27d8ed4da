//! The meaning of `nearest_code`: metrics in float64, one dimension after the other, never fused.

use half::{bf16, f16};

use super::Metric;

/// What inputs are made of: exact in float64.
pub trait Real: Copy + Send + Sync {
    /// The value, unchanged.
    fn real(self) -> f64;
}

impl Real for f32 {
    fn real(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn real(self) -> f64 {
        self
    }
}

impl Real for bf16 {
    fn real(self) -> f64 {
        self.to_f64()
    }
}

impl Real for f16 {
    fn real(self) -> f64 {
        self.to_f64()
    }
}

/// Codes whose sums run side by side: each is a chain of dependent additions.
const SIDE_BY_SIDE: usize = 8;

/// What orders the codes for the row `x` [D]: |x - e|^2, -x.e / |e| or -x.e; NaN reads as infinitely far.
#[inline]
pub(super) fn scores<X: Real, E: Real, const G: usize>(metric: Metric, x: &[X], codes: [&[E]; G]) -> [f64; G] {
    let codes = codes.map(|code| &code[..x.len()]);
    let mut total = [0.0; G];
    if metric.is_euclidean() {
        for (d, value) in x.iter().enumerate() {
            for g in 0..G {
                let difference = value.real() - codes[g][d].real();
                total[g] += difference * difference;
            }
        }
    } else {
        for (d, value) in x.iter().enumerate() {
            for g in 0..G {
                total[g] -= value.real() * codes[g][d].real();
            }
        }
    }
    if metric == Metric::Cosine {
        for g in 0..G {
            let norm = length(codes[g]);
            total[g] /= if norm == 0.0 { 1.0 } else { norm };
        }
    }
    total.map(|score| if score.is_nan() { f64::INFINITY } else { score })
}

/// |v| in float64.
pub(super) fn length<T: Real>(v: &[T]) -> f64 {
    v.iter().fold(0.0, |sum, value| sum + value.real() * value.real()).sqrt()
}

/// Scores of the listed codes of `codebook` [K, D], in their order, handed to `take(score, code)`.
#[inline]
pub(super) fn for_each<X: Real, E: Real>(
    metric: Metric,
    x: &[X],
    codebook: &[E],
    mut list: impl Iterator<Item = usize>,
    mut take: impl FnMut(f64, usize),
) {
    let dims = x.len();
    let code = |k: usize| &codebook[k * dims..][..dims];
    while let Some(first) = list.next() {
        // An incomplete batch is filled with its first code.
        let mut batch = [first; SIDE_BY_SIDE];
        let mut size = 1;
        for (slot, k) in batch[1..].iter_mut().zip(list.by_ref()) {
            *slot = k;
            size += 1;
        }
        if size == 1 {
            take(scores(metric, x, [code(first)])[0], first);
        } else if size <= SIDE_BY_SIDE / 2 {
            let some: [_; SIDE_BY_SIDE / 2] = std::array::from_fn(|g| code(batch[g]));
            scores(metric, x, some).into_iter().zip(batch).take(size).for_each(|(score, k)| take(score, k));
        } else {
            scores(metric, x, batch.map(code)).into_iter().zip(batch).take(size).for_each(|(score, k)| take(score, k));
        }
    }
}

/// The nearest codes found so far, nearest first, ties to the lowest index; codes come in increasing order.
pub(super) struct Nearest {
    /// Score, code, and its float32 score in the fast pass.
    found: Vec<(f64, usize, f32)>,
    count: usize,
}

impl Nearest {
    pub fn new(count: usize) -> Self {
        Self { found: Vec::with_capacity(count + 1), count }
    }

    /// Takes the code if it is among the nearest.
    pub fn take(&mut self, score: f64, k: usize, fast: f32) {
        // Not `<=`: the earlier code stays ahead. -0.0 and 0.0 are a tie, and there is no NaN.
        let place = self.found.partition_point(|&(other, ..)| other <= score);
        if place < self.count {
            self.found.truncate(self.count - 1);
            self.found.insert(place, (score, k, fast));
        }
    }

    /// The largest fast score among them, once there are as many as wanted.
    pub fn farthest(&self) -> Option<f32> {
        let full = self.found.len() == self.count;
        full.then(|| self.found.iter().fold(f32::NEG_INFINITY, |most, &(_, _, fast)| most.max(fast)))
    }

    pub fn write(&self, out: &mut [i64]) {
        for (slot, &(_, k, _)) in out.iter_mut().zip(&self.found) {
            *slot = k as i64;
        }
    }
}

/// The `out.len()` nearest of the listed codes (in increasing order, at least that many).
pub(super) fn nearest_of<X: Real, E: Real>(
    metric: Metric,
    x: &[X],
    codebook: &[E],
    list: impl Iterator<Item = usize>,
    out: &mut [i64],
) {
    let mut nearest = Nearest::new(out.len());
    for_each(metric, x, codebook, list, |score, k| nearest.take(score, k, 0.0));
    nearest.write(out);
}
