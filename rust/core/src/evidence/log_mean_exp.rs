//! The mean of exponentials and the effective sample size, from a stream of log weights.
//!
//! Everything is relative to the largest log weight seen, so nothing overflows, and two streams merge into the
//! accumulator of their union. Sums are float64 whatever the weights came as.

/// What is kept of log weights `l_1 .. l_K`, `w = exp l`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSums {
    count: u64,
    /// The largest and smallest log weight; both NaN once a NaN was seen.
    max: f64,
    min: f64,
    /// Sums of `exp(l - max)` and of its square, over the finite log weights.
    sum: f64,
    sum_of_squares: f64,
    /// Mean of `l` and sum of squared deviations from it (Chan, Golub and LeVeque's merge).
    mean: f64,
    deviations: f64,
}

impl Default for LogSums {
    fn default() -> Self {
        Self {
            count: 0,
            max: f64::NEG_INFINITY,
            min: f64::INFINITY,
            sum: 0.0,
            sum_of_squares: 0.0,
            mean: 0.0,
            deviations: 0.0,
        }
    }
}

impl LogSums {
    /// The accumulator of `values`.
    pub fn of<T: Copy + Into<f64>>(values: &[T]) -> Self {
        let values = || values.iter().map(|&value| value.into());
        let mut sums = Self { count: values().len() as u64, ..Self::default() };
        let mut total = 0.0;
        for value in values() {
            sums.max = nan_or(sums.max, value, f64::max);
            sums.min = nan_or(sums.min, value, f64::min);
            total += value;
        }
        if sums.count > 0 {
            sums.mean = total / sums.count as f64;
        }
        if sums.max.is_finite() {
            for value in values() {
                let weight = (value - sums.max).exp();
                sums.sum += weight;
                sums.sum_of_squares += weight * weight;
                sums.deviations += (value - sums.mean).powi(2);
            }
        }
        sums
    }

    /// Adds what another stream saw.
    pub fn merge(&mut self, other: &Self) {
        if self.count == 0 || other.count == 0 {
            if self.count == 0 {
                *self = *other;
            }
            return;
        }
        let max = nan_or(self.max, other.max, f64::max);
        let scaled = |part: &Self| {
            // A part without finite weights has empty sums, and its maximum may give inf - inf.
            let scale = if part.max.is_finite() { (part.max - max).exp() } else { 0.0 };
            (part.sum * scale, part.sum_of_squares * scale * scale)
        };
        let ((sum, squares), (other_sum, other_squares)) = (scaled(self), scaled(other));
        let (left, right) = (self.count as f64, other.count as f64);
        let shift = other.mean - self.mean;
        self.deviations += other.deviations + shift * shift * (left * right / (left + right));
        // Not `mean + shift * share`, which is NaN where both means are -inf.
        self.mean = self.mean * (left / (left + right)) + other.mean * (right / (left + right));
        self.count += other.count;
        self.max = max;
        self.min = nan_or(self.min, other.min, f64::min);
        self.sum = sum + other_sum;
        self.sum_of_squares = squares + other_squares;
    }

    /// Log weights seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// `log(sum w / K)`: -inf when all weights are 0 (or there are none), +inf when one is infinite, NaN when one is NaN.
    pub fn log_mean_exp(&self) -> f64 {
        if self.max.is_finite() { self.max + (self.sum / self.count as f64).ln() } else { self.max }
    }

    /// Mean of the log weights.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Standard error of [`mean`](Self::mean); NaN for fewer than two log weights or an infinite one.
    pub fn standard_error_of_mean(&self) -> f64 {
        let count = self.count as f64;
        if self.count < 2 || !self.max.is_finite() {
            f64::NAN
        } else {
            (self.deviations / (count - 1.0) / count).sqrt()
        }
    }

    /// `(sum w)^2 / sum w^2`, between 1 and K; 0 when all weights are 0, NaN when one is infinite or NaN.
    pub fn effective_sample_size(&self) -> f64 {
        if self.max == f64::NEG_INFINITY {
            return 0.0;
        }
        if !self.max.is_finite() {
            return f64::NAN;
        }
        (self.sum * self.sum / self.sum_of_squares).clamp(1.0, self.count as f64)
    }

    /// The delta method's standard error of [`log_mean_exp`](Self::log_mean_exp): `sqrt(1 / ESS - 1 / K)`.
    pub fn standard_error(&self) -> f64 {
        (1.0 / self.effective_sample_size() - 1.0 / self.count as f64).max(0.0).sqrt()
    }

    /// Whether at least two log weights were seen and all agree within `tolerance * max(1, |l|)`.
    pub fn constant(&self, tolerance: f64) -> bool {
        let spread = self.max - self.min;
        self.count >= 2 && self.max.is_finite() && spread <= tolerance * self.max.abs().max(1.0)
    }
}

/// `choose(a, b)`, NaN when either is: `f64::max` and `f64::min` would drop it.
fn nan_or(a: f64, b: f64, choose: fn(f64, f64) -> f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { choose(a, b) }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f64, b: f64) -> bool {
        a == b || (a - b).abs() <= 1e-12 * a.abs().max(b.abs()).max(1.0)
    }

    fn weights() -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec(prop_oneof![9 => -900.0..900.0, 1 => Just(f64::NEG_INFINITY)], 1..60)
    }

    fn merged(pieces: &[&[f64]]) -> LogSums {
        let mut all = LogSums::default();
        for piece in pieces {
            all.merge(&LogSums::of(piece));
        }
        all
    }

    fn agree(a: &LogSums, b: &LogSums) -> bool {
        a.count() == b.count()
            && close(a.log_mean_exp(), b.log_mean_exp())
            && close(a.effective_sample_size(), b.effective_sample_size())
            && close(a.mean(), b.mean())
            && (!a.standard_error_of_mean().is_finite()
                || close(a.standard_error_of_mean(), b.standard_error_of_mean()))
            && (a.max, a.min) == (b.max, b.min)
    }

    proptest! {
        #[test]
        fn merging_any_cut_in_any_order_equals_the_whole(values in weights(), cut in 0usize..60, second in 0usize..60) {
            let whole = LogSums::of(&values);
            let (low, high) = (cut.min(second).min(values.len()), cut.max(second).min(values.len()));
            let pieces = [&values[..low], &values[low..high], &values[high..]];
            prop_assert!(agree(&whole, &merged(&pieces)));
            prop_assert!(agree(&whole, &merged(&[pieces[2], pieces[0], pieces[1]])));
            let mut right = LogSums::of(pieces[1]);
            right.merge(&LogSums::of(pieces[2]));
            let mut left = LogSums::of(pieces[0]);
            left.merge(&right);
            prop_assert!(agree(&whole, &left));
        }

        #[test]
        fn mean_lies_between_the_extremes_and_follows_a_shift(values in weights(), shift in -1e5..1e5) {
            let sums = LogSums::of(&values);
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            prop_assume!(largest.is_finite());
            prop_assert!(sums.log_mean_exp() <= largest + 1e-12 * largest.abs());
            prop_assert!(sums.log_mean_exp() >= largest - (values.len() as f64).ln() - 1e-12 * largest.abs());
            prop_assert!(sums.log_mean_exp() >= sums.mean() - 1e-9, "Jensen");
            let moved: Vec<f64> = values.iter().map(|value| value + shift).collect();
            let moved = LogSums::of(&moved);
            prop_assert!(close(moved.log_mean_exp(), sums.log_mean_exp() + shift));
            prop_assert!((moved.effective_sample_size() - sums.effective_sample_size()).abs() < 1e-7 * 60.0);
        }
    }

    #[test]
    fn extremes_are_told_apart() {
        let log_mean = |values: &[f64]| LogSums::of(values).log_mean_exp();
        assert_eq!(log_mean(&[f64::NEG_INFINITY; 3]), f64::NEG_INFINITY);
        assert_eq!(merged(&[&[f64::NEG_INFINITY; 3], &[f64::NEG_INFINITY; 2]]).log_mean_exp(), f64::NEG_INFINITY);
        assert_eq!(log_mean(&[]), f64::NEG_INFINITY);
        assert_eq!(log_mean(&[0.0, f64::INFINITY]), f64::INFINITY);
        assert!(log_mean(&[0.0, f64::NAN, 1.0]).is_nan());
        assert!(merged(&[&[0.0], &[f64::NAN], &[1.0]]).log_mean_exp().is_nan());
        assert!(merged(&[&[f64::NAN], &[1.0]]).effective_sample_size().is_nan());
        assert!(close(log_mean(&[1e6, f64::NEG_INFINITY]), 1e6 - 2f64.ln()));
        assert!(close(merged(&[&[-1e6], &[1e6]]).log_mean_exp(), 1e6 - 2f64.ln()));
        assert_eq!(LogSums::of(&[f64::NEG_INFINITY; 3]).effective_sample_size(), 0.0);
    }

    #[test]
    fn effective_sample_size_has_its_closed_forms() {
        assert_eq!(LogSums::of(&[-700.0; 8]).effective_sample_size(), 8.0);
        assert_eq!(LogSums::of(&[-700.0; 8]).standard_error(), 0.0);
        // m equal weights among zeros count for m; weights 1 and 2 for (1 + 2)^2 / 5.
        let some = [3.0, f64::NEG_INFINITY, 3.0, 3.0, f64::NEG_INFINITY];
        assert!(close(LogSums::of(&some).effective_sample_size(), 3.0));
        assert!(close(LogSums::of(&[0.0, 2f64.ln()]).effective_sample_size(), 1.8));
        assert!(close(LogSums::of(&[0.0, 2f64.ln()]).standard_error(), (1f64 / 1.8 - 0.5).sqrt()));
    }

    #[test]
    fn one_weight_is_never_called_constant() {
        assert!(!LogSums::of(&[1.0]).constant(1e-9));
        assert!(LogSums::of(&[-500.0, -500.0 + 1e-8]).constant(1e-9));
        assert!(!LogSums::of(&[-500.0, -500.0 + 1e-6]).constant(1e-9));
        assert!(!LogSums::of(&[f64::NEG_INFINITY; 2]).constant(1e-9));
    }
}
