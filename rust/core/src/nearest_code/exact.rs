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
pub(super) fn for_each<X: Real, E: Real>(
    metric: Metric,
    x: &[X],
    codebook: &[E],
    mut list: impl Iterator<Item = usize>,
    mut take: impl FnMut(f64, usize),
) {
    let dims = x.len();
    let code = |k: usize| &codebook[k * dims..][..dims];
    loop {
        let mut batch = [0; SIDE_BY_SIDE];
        let mut size = 0;
        for (slot, k) in batch.iter_mut().zip(list.by_ref()) {
            *slot = k;
            size += 1;
        }
        if size == SIDE_BY_SIDE {
            for (score, k) in scores(metric, x, batch.map(code)).into_iter().zip(batch) {
                take(score, k);
            }
        } else {
            for &k in &batch[..size] {
                take(scores(metric, x, [code(k)])[0], k);
            }
            return;
        }
    }
}

/// The `out.len()` nearest of the listed codes (in increasing order, at least that many), nearest first, ties to the
/// lowest index.
pub(super) fn nearest_of<X: Real, E: Real>(
    metric: Metric,
    x: &[X],
    codebook: &[E],
    list: impl Iterator<Item = usize>,
    out: &mut [i64],
) {
    if let [winner] = out {
        let mut best: Option<f64> = None;
        for_each(metric, x, codebook, list, |score, k| {
            if best.is_none_or(|best| score < best) {
                best = Some(score);
                *winner = k as i64;
            }
        });
        return;
    }
    let mut found = Vec::new();
    for_each(metric, x, codebook, list, |score, k| found.push((score, k)));
    // `partial_cmp`, because -0.0 and 0.0 are a tie; there is no NaN.
    found.sort_unstable_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(std::cmp::Ordering::Equal).then(a.1.cmp(&b.1)));
    for (slot, (_, k)) in out.iter_mut().zip(found) {
        *slot = k as i64;
    }
}
