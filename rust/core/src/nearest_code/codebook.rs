//! A codebook prepared for the scan, and how far a float32 score can be from the truth.

use super::exact::length;
use super::{GROUP, Metric};

/// Half the spacing of floats at 1.
const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// Codes, centred and scaled by a power of two, packed in panels; score(x, k) = bias[k] - x.code[k].
pub(crate) struct Prepared {
    /// [panels][D][GROUP * LANES], zeros at padding and at codes with a NaN or an infinity.
    pub panels: Vec<f32>,
    /// [panels][GROUP * LANES]: half the squared norm (Euclidean) or 0; +infinity where the panel is padded.
    pub bias: Vec<f32>,
    /// Subtracted from a row (Euclidean metrics; zeros otherwise: there it shifts every score of a row alike).
    centre: Vec<f32>,
    /// What codes were multiplied by, and what rows will be.
    scale: f32,
    row_scale: f32,
    metric: Metric,
    /// Largest norm of a packed code, and of a code as it came.
    largest: f64,
    largest_uncentred: f64,
}

impl Prepared {
    /// From `codebook` [K, D]; `None` when float32 scores could not be trusted at all: no finite code, an infinity
    /// that could win, or so many dimensions that rounding has no bound.
    pub fn new(metric: Metric, codebook: &[f32], dims: usize, lanes: usize) -> Option<Self> {
        let size = codebook.len() / dims;
        let width = GROUP * lanes;
        let panels = size.div_ceil(width);
        let usable: Vec<bool> = codebook.chunks_exact(dims).map(|code| code.iter().all(|v| v.is_finite())).collect();
        let infinite = metric == Metric::Dot && codebook.iter().any(|v| v.is_infinite());
        if infinite || dims > 1 << 20 || u32::try_from(panels).is_err() || !usable.contains(&true) {
            return None;
        }
        let divisor = |code: &[f32]| match metric {
            Metric::Cosine => Some(length(code)).filter(|&norm| norm > 0.0).unwrap_or(1.0),
            _ => 1.0,
        };
        let codes = || codebook.chunks_exact(dims).enumerate().filter(|&(k, _)| usable[k]);

        let mut mean = vec![0.0; dims];
        for (_, code) in codes() {
            let divisor = divisor(code);
            mean.iter_mut().zip(code).for_each(|(sum, &value)| *sum += f64::from(value) / divisor);
        }
        let count = codes().count() as f64;
        // Rounded to float32: what rows subtract must be what codes subtracted.
        let centre: Vec<f32> = mean.iter().map(|sum| (sum / count) as f32).collect();

        let centred = |code: &[f32], d: usize, divisor: f64| f64::from(code[d]) / divisor - f64::from(centre[d]);
        let peak = codes().fold(0.0_f64, |peak, (_, code)| {
            let divisor = divisor(code);
            (0..dims).fold(peak, |peak, d| peak.max(centred(code, d, divisor).abs()))
        });
        // Brings the largest element to [1, 2) (or near), so that nothing of weight underflows.
        let exponent = if peak > 0.0 { peak.log2().floor().clamp(-126.0, 126.0) as i32 } else { 0 };
        let scale = 2.0_f32.powi(-exponent);

        let mut prepared = Self {
            panels: vec![0.0; panels * dims * width],
            bias: vec![f32::INFINITY; panels * width],
            centre: vec![],
            scale,
            row_scale: if metric.is_euclidean() { scale } else { 1.0 },
            metric,
            largest: 0.0,
            largest_uncentred: 0.0,
        };
        for (k, code) in codes() {
            let (panel, column) = (k / width, k % width);
            let divisor = divisor(code);
            let mut square = 0.0;
            for d in 0..dims {
                let value = centred(code, d, divisor) * f64::from(scale);
                square += value * value;
                prepared.panels[(panel * dims + d) * width + column] = value as f32;
            }
            prepared.bias[k] = if metric.is_euclidean() { (square / 2.0) as f32 } else { 0.0 };
            prepared.largest = prepared.largest.max(square.sqrt());
            prepared.largest_uncentred = prepared.largest_uncentred.max(length(code) / divisor);
        }
        prepared.centre = if metric.is_euclidean() { centre } else { vec![0.0; dims] };
        Some(prepared)
    }

    /// Writes the row as the scan wants it, and returns how far its scores may be from the truth; `None` when they
    /// could overflow or the row is not finite.
    pub fn prepare(&self, row: &[f32], out: &mut [f32]) -> Option<f64> {
        let mut square = 0.0;
        for ((out, &value), &centre) in out.iter_mut().zip(row).zip(&self.centre) {
            *out = (value - centre) * self.row_scale;
            square += f64::from(*out) * f64::from(*out);
        }
        self.error(square.sqrt(), row.len() as f64)
    }

    /// Of a score: rounding of D fused or unfused products and sums (gamma_n, n = D + 1), of the two centred vectors
    /// and of the bias; then of the float64 evaluation that defines the answer; then of underflow.
    fn error(&self, norm: f64, dims: f64) -> Option<f64> {
        let rounding = (dims + 6.0) * UNIT;
        let gamma = 1.01 * rounding / (1.0 - rounding);
        let evaluation = (dims + 6.0) * 4.0 * f64::EPSILON;
        let product = norm * self.largest;
        let (magnitude, evaluated) = if self.metric.is_euclidean() {
            (product + self.largest * self.largest / 2.0, (norm + self.largest) * (norm + self.largest))
        } else {
            (product, norm * self.largest_uncentred * f64::from(self.scale))
        };
        let underflow = 4.0 * (dims + 2.0) * f64::from(f32::MIN_POSITIVE) * (1.0 + norm);
        // Also false for NaN.
        (magnitude < 1e37).then_some(gamma * magnitude + evaluation * evaluated + underflow)
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
