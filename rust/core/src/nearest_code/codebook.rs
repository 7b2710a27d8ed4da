//! A codebook prepared for the scan, and how far a float32 score can be from the truth.

use super::Metric;
use super::exact::length;
use super::integer::IntegerCodes;
use super::scan::{MOST_ROWS, SPAN};
use super::vector::Floats;
use crate::simd::{self, Kernel, Lanes};

/// Half the spacing of floats at 1.
const UNIT: f64 = 1.0 / (1 << 24) as f64;
/// Dimensions packed at a time.
const BAND: usize = 32;
/// Squared norms below this are summed again in float64.
const TINY: f64 = 1e-25;

/// How far a float32 score may be from the truth, by the row's norm.
pub(super) struct Bound {
    constant: f64,
    linear: f64,
    square: f64,
    largest: f64,
}

impl Bound {
    /// Of scores against panels of codes (see [`super::few`]) less `centre`, of which the largest has the squared norm
    /// `square`, with factors up to `factor`.
    pub fn of_panels(metric: Metric, centre: &[f32], square: f32, factor: f32) -> Self {
        let dims = centre.len() as f64;
        let gamma = |terms: f64| 1.01 * terms * UNIT / (1.0 - terms * UNIT);
        let smallest = f64::from(f32::MIN_POSITIVE);
        let evaluation = (dims + 6.0) * 4.0 * f64::EPSILON;
        let underflow = 4.0 * (dims + 2.0) * smallest;
        // In spite of rounding and underflow. Squares are summed in four chains.
        let (product, square_sum) = (gamma(dims + 8.0), gamma(dims / 4.0 + 12.0));
        let largest = (f64::from(square) * (1.0 + 2.0 * square_sum) + underflow).sqrt();
        match metric {
            Metric::Euclidean | Metric::SquaredEuclidean => {
                let constant = (square_sum / 2.0 + evaluation) * largest * largest + underflow;
                let linear = (product + 2.0 * evaluation) * largest + underflow;
                Self { constant, linear, square: evaluation, largest }
            }
            Metric::Dot => {
                let uncentred = largest + length(centre);
                let linear = product * largest + evaluation * uncentred + underflow;
                Self { constant: underflow, linear, square: 0.0, largest }
            }
            Metric::Cosine => {
                let underflow = underflow * f64::from(factor).max(1.0);
                let linear = product + square_sum + evaluation + underflow;
                Self { constant: underflow, linear, square: 0.0, largest }
            }
        }
    }

    /// Infinity where scores could overflow or the row is not finite.
    #[inline(always)]
    pub fn error(&self, norm: f64) -> f64 {
        let error = self.constant + norm * (self.linear + norm * self.square);
        // Also false for NaN.
        if (norm + self.largest) * self.largest < 1e37 { error } else { f64::INFINITY }
    }
}

/// Codes, centred and scaled by a power of two, packed in groups; score(x, k) = bias[k] - x.code[k].
pub(crate) struct Prepared {
    /// [groups][D][GROUP], zeros at padding and at codes with a NaN or an infinity.
    pub(super) codes: Vec<f32>,
    /// [groups][GROUP]: half the squared norm (Euclidean) or 0; +infinity for padding and for those codes.
    pub(super) bias: Vec<f32>,
    /// Subtracted from a row (Euclidean metrics; zeros otherwise: there it shifts every score of a row alike).
    pub(super) centre: Vec<f32>,
    /// What codes were multiplied by, and what rows will be.
    scale: f32,
    pub(super) row_scale: f32,
    metric: Metric,
    /// Largest norm of a packed code, and of a code as it came.
    pub(super) largest: f64,
    largest_uncentred: f64,
    /// For the pass in integers, where there is one.
    pub(super) integers: Option<IntegerCodes>,
}

impl Prepared {
    /// From `codebook` [K, D], in groups of `group` codes; `None` when float32 scores could not be trusted at all: no
    /// finite code, an infinity that could win, or so many dimensions that rounding has no bound.
    pub fn new(metric: Metric, codebook: &[f32], dims: usize, group: usize) -> Option<Self> {
        simd::run(simd::level(), Packing { metric, codebook, dims, group })
    }

    /// Writes rows [n, D], at most a tile of them, as the scan wants them: centred, scaled, negated, [D, SPAN * LANES].
    /// Returns their norms, rounded up: not finite where a row is not.
    ///
    /// # Safety
    /// As [`super::vector::Vector`].
    #[inline(always)]
    pub(super) unsafe fn pack<T: Floats>(&self, x: &[f32], tile: &mut [f32]) -> [f64; MOST_ROWS] {
        let (dims, width) = (self.centre.len(), SPAN * T::LANES);
        let tile = &mut tile[..dims * width];
        if x.len() < tile.len() {
            tile.fill(0.0);
        }
        // Some dimensions of all rows at a time: a column of a wide tile does not fit the cache's sets.
        let mut start = 0;
        while start < dims {
            let end = (start + BAND).min(dims);
            let mut row = 0;
            while row * dims < x.len() {
                let values = &x[row * dims + start..row * dims + end];
                let centre = &self.centre[start..end];
                let column = &mut tile[start * width + row..];
                let mut d = 0;
                while d < values.len() {
                    column[d * width] = (centre[d] - values[d]) * self.row_scale;
                    d += 1;
                }
                row += 1;
            }
            start = end;
        }
        let mut squares = [0.0_f32; MOST_ROWS];
        // SAFETY: the caller's promise; `tile` has rows of SPAN vectors and `squares` room for them.
        unsafe {
            let mut sums = [T::splat(0.0); SPAN];
            for row in tile.chunks_exact(width) {
                for (v, sum) in sums.iter_mut().enumerate() {
                    let value = T::load(row.as_ptr().add(v * T::LANES));
                    *sum = sum.plus_product(value, value);
                }
            }
            for (v, sum) in sums.iter().enumerate() {
                sum.store(squares.as_mut_ptr().add(v * T::LANES));
            }
        }
        // Above the truth in spite of rounding.
        let inflation = 1.0 + 4.0 * (dims as f64 + 2.0) * UNIT;
        let mut norms = [0.0; MOST_ROWS];
        let (mut row, mut tiny) = (0, false);
        while row < MOST_ROWS {
            let square = f64::from(squares[row]) * inflation;
            tiny |= square < TINY;
            norms[row] = square.sqrt();
            row += 1;
        }
        if tiny {
            // Squares may have underflowed.
            for row in (0..width).filter(|&row| f64::from(squares[row]) * inflation < TINY) {
                let column = tile.iter().skip(row).step_by(width);
                let square = column.fold(0.0, |sum, &value| sum + f64::from(value) * f64::from(value));
                norms[row] = square.sqrt();
            }
        }
        norms
    }

    /// How far the scores of rows of these norms may be from the truth: infinity where they could overflow or the row
    /// is not finite.
    #[inline(always)]
    pub(super) fn errors(&self, norms: &[f64; MOST_ROWS]) -> [f64; MOST_ROWS] {
        let bound = self.bound(self.centre.len() as f64);
        norms.map(|norm| bound.error(norm))
    }

    /// Whether codes have biases.
    pub(super) fn has_bias(&self) -> bool {
        self.metric.is_euclidean()
    }

    /// Of a score: rounding of D fused or unfused products and sums (gamma_n, n = D + 1), of the two centred vectors
    /// and of the bias; then of the float64 evaluation that defines the answer; then of underflow.
    #[inline(always)]
    fn bound(&self, dims: f64) -> Bound {
        let rounding = (dims + 6.0) * UNIT;
        let gamma = 1.01 * rounding / (1.0 - rounding);
        let evaluation = (dims + 6.0) * 4.0 * f64::EPSILON;
        let underflow = 4.0 * (dims + 2.0) * f64::from(f32::MIN_POSITIVE);
        let largest = self.largest;
        // evaluation (norm + largest)^2, multiplied out.
        let (constant, linear, square) = if self.metric.is_euclidean() {
            let evaluated = evaluation * largest * largest;
            (gamma * largest * largest / 2.0 + evaluated, (gamma + 2.0 * evaluation) * largest, evaluation)
        } else {
            (0.0, gamma * largest + evaluation * self.largest_uncentred * f64::from(self.scale), 0.0)
        };
        Bound { constant: constant + underflow, linear: linear + underflow, square, largest }
    }

    /// The scores of [`super::exact`] in the scale of the packed ones, apart from what all codes have in common.
    #[cfg(test)]
    pub fn truth(&self, row: &[f32], codebook: &[f32]) -> Vec<f64> {
        let half = if self.metric.is_euclidean() { 0.5 } else { 1.0 };
        let factor = f64::from(self.scale) * f64::from(self.row_scale) * half;
        let codes = codebook.chunks_exact(row.len());
        codes.map(|code| super::exact::scores(self.metric, row, [code])[0] * factor).collect()
    }
}

/// [`Prepared::new`], compiled for the level's instruction set; the values are the same at every level.
struct Packing<'a> {
    metric: Metric,
    codebook: &'a [f32],
    dims: usize,
    group: usize,
}

impl Kernel for Packing<'_> {
    type Output = Option<Prepared>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Option<Prepared> {
        let Self { metric, codebook, dims, group } = self;
        let size = codebook.len() / dims;
        let groups = size.div_ceil(group);
        let infinite = metric == Metric::Dot && codebook.iter().any(|v| v.is_infinite());
        if infinite || dims > 1 << 20 || u32::try_from(groups).is_err() {
            return None;
        }
        // By what a code is divided; 0 where it has a NaN or an infinity.
        let mut divisors = vec![1.0; size];
        for (divisor, code) in divisors.iter_mut().zip(codebook.chunks_exact(dims)) {
            if !code.iter().fold(true, |finite, value| finite & value.is_finite()) {
                *divisor = 0.0;
            } else if metric == Metric::Cosine {
                *divisor = Some(length(code)).filter(|&norm| norm > 0.0).unwrap_or(1.0);
            }
        }
        let count = divisors.iter().filter(|&&divisor| divisor > 0.0).count();
        if count == 0 {
            return None;
        }
        let mut mean = vec![0.0; dims];
        for (code, &divisor) in codebook.chunks_exact(dims).zip(&divisors).filter(|(_, divisor)| **divisor > 0.0) {
            let factor = 1.0 / divisor;
            mean.iter_mut().zip(code).for_each(|(sum, &value)| *sum += f64::from(value) * factor);
        }
        // Rounded to float32: what rows subtract must be what codes subtracted.
        let centre: Vec<f32> = mean.iter().map(|sum| (sum / count as f64) as f32).collect();
        // Eight maxima side by side: one would be a chain of dependent comparisons.
        let mut peaks = [0.0_f64; 8];
        for (code, &divisor) in codebook.chunks_exact(dims).zip(&divisors).filter(|(_, divisor)| **divisor > 0.0) {
            let ((eights, rest), (centres, last)) = (code.as_chunks::<8>(), centre.as_chunks::<8>());
            for (values, centres) in eights.iter().zip(centres) {
                raise(&mut peaks, centred(values, centres, divisor, metric).1);
            }
            for ((value, centre), peak) in rest.iter().zip(last).zip(&mut peaks) {
                raise(std::array::from_mut(peak), centred(&[*value], &[*centre], divisor, metric).1);
            }
        }
        let peak = peaks.into_iter().fold(0.0, f64::max);
        // Brings the largest element to [1, 2) (or near), so that nothing of weight underflows.
        let exponent = if peak > 0.0 { peak.log2().floor().clamp(-126.0, 126.0) as i32 } else { 0 };
        let scale = 2.0_f32.powi(-exponent);

        let mut codes = vec![0.0; groups * dims * group];
        let mut bias = vec![f32::INFINITY; groups * group];
        let (mut largest, mut largest_uncentred) = (0.0_f64, 0.0_f64);
        for (k, (code, &divisor)) in codebook.chunks_exact(dims).zip(&divisors).enumerate() {
            if divisor == 0.0 {
                continue;
            }
            let (mut square, mut uncentred) = ([0.0; 8], [0.0; 8]);
            let out = &mut codes[k / group * dims * group + k % group..];
            let ((eights, rest), (centres, last)) = (code.as_chunks::<8>(), centre.as_chunks::<8>());
            for ((values, centres), out) in eights.iter().zip(centres).zip(out.chunks_mut(8 * group)) {
                let (value, mut away) = centred(values, centres, divisor, metric);
                let mut moved = [0.0_f32; 8];
                let mut lane = 0;
                while lane < 8 {
                    away[lane] *= f64::from(scale);
                    moved[lane] = away[lane] as f32;
                    square[lane] += away[lane] * away[lane];
                    uncentred[lane] += value[lane] * value[lane];
                    lane += 1;
                }
                out.iter_mut().step_by(group).zip(moved).for_each(|(slot, value)| *slot = value);
            }
            let first = (dims - rest.len()) * group;
            let mut lane = 0;
            while lane < rest.len() {
                let ([value], [away]) = centred(&[rest[lane]], &[last[lane]], divisor, metric);
                let away = away * f64::from(scale);
                out[first + lane * group] = away as f32;
                square[lane] += away * away;
                uncentred[lane] += value * value;
                lane += 1;
            }
            let square: f64 = square.iter().sum();
            bias[k] = if metric.is_euclidean() { (square / 2.0) as f32 } else { 0.0 };
            largest = largest.max(square.sqrt());
            largest_uncentred = largest_uncentred.max(uncentred.iter().sum::<f64>().sqrt());
        }
        let (centre, row_scale) = if metric.is_euclidean() { (centre, scale) } else { (vec![0.0; dims], 1.0) };
        Some(Prepared { codes, bias, centre, scale, row_scale, metric, largest, largest_uncentred, integers: None })
    }
}

/// Values of a code before and after the centre is taken away.
#[inline(always)]
fn centred<const W: usize>(
    values: &[f32; W],
    centres: &[f32; W],
    divisor: f64,
    metric: Metric,
) -> ([f64; W], [f64; W]) {
    let (mut before, mut after) = ([0.0; W], [0.0; W]);
    let mut lane = 0;
    while lane < W {
        let value = f64::from(values[lane]);
        before[lane] = if metric == Metric::Cosine { value / divisor } else { value };
        after[lane] = before[lane] - f64::from(centres[lane]);
        lane += 1;
    }
    (before, after)
}

/// The larger of each and the magnitude of the other.
#[inline(always)]
fn raise<const W: usize>(peaks: &mut [f64; W], values: [f64; W]) {
    let mut lane = 0;
    while lane < W {
        let value = values[lane].abs();
        peaks[lane] = if value > peaks[lane] { value } else { peaks[lane] };
        lane += 1;
    }
}
