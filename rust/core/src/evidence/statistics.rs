//! All statistics of `[rows, K]` log weights, fed in pieces of columns; a row is an example, a column a sample.

use super::log_mean_exp::LogSums;
use super::pareto;
use super::tail::Tail;
use crate::{Error, Result, threads};

/// The least number of weights worth a thread.
const GRAIN: usize = 1 << 14;

/// Rounding errors, as a multiple of the precision the weights were computed in, that still count as constant.
const CONSTANT: f64 = 128.0;

/// What is known of one row.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// `log(sum w / K)`.
    pub log_mean: f64,
    /// Its standard error; NaN where it is withheld, which is where the row is not `reliable`.
    pub standard_error: f64,
    /// Mean of the log weights, and its standard error.
    pub mean: f64,
    /// See [`LogSums::standard_error_of_mean`].
    pub mean_standard_error: f64,
    /// `(sum w)^2 / sum w^2`.
    pub effective_sample_size: f64,
    /// See [`pareto::khat`]; 0 where the weights are constant.
    pub khat: f64,
    /// The weights are constant up to rounding: `log_mean` has no Monte Carlo error.
    pub exact: bool,
    /// `khat` was fitted and is at most [`pareto::good_khat`].
    pub reliable: bool,
}

/// Accumulators of every row: memory O(rows sqrt K) for any K.
#[derive(Debug, Clone)]
pub struct LogWeights {
    samples: usize,
    rows: Vec<(LogSums, Tail)>,
}

impl LogWeights {
    /// Ready for `samples` log weights of each of `rows` rows.
    pub fn new(rows: usize, samples: usize) -> Result<Self> {
        if samples == 0 {
            return Err(Error::Argument("log weights: samples is 0, expected at least 1".into()));
        }
        let wanted = (pareto::tail_length(samples) + 1).min(samples);
        Ok(Self { samples, rows: vec![(LogSums::default(), Tail::new(wanted)); rows] })
    }

    /// Takes the next columns, `values` being `[rows, columns]`. Returns the place in `values` of the first NaN or
    /// +inf, which no average survives.
    pub fn add<T: Copy + Into<f64> + Sync>(&mut self, values: &[T], threads: usize) -> Result<Option<usize>> {
        let rows = self.rows.len();
        if rows == 0 || !values.len().is_multiple_of(rows) {
            return Err(Error::Argument(format!("log weights: {} values do not fill {rows} rows", values.len())));
        }
        let columns = values.len() / rows;
        let seen = self.rows[0].0.count() as usize;
        if columns > self.samples - seen {
            let (expected, found) = (self.samples, seen + columns);
            return Err(Error::Argument(format!("log weights: {found} samples a row, expected {expected}")));
        }
        if columns == 0 {
            return Ok(None);
        }
        let mut rest = self.rows.as_mut_slice();
        let mut tasks = Vec::new();
        for range in threads::pieces(rows, GRAIN / columns + 1, threads) {
            let (mine, others) = rest.split_at_mut(range.len());
            rest = others;
            let values = &values[range.start * columns..range.end * columns];
            tasks.push(move || {
                for ((sums, tail), row) in mine.iter_mut().zip(values.chunks_exact(columns)) {
                    sums.merge(&LogSums::of(row));
                    for &value in row {
                        tail.push(value.into());
                    }
                }
            });
        }
        threads::run(tasks);
        Ok(values.iter().map(|&value| value.into()).position(|value: f64| value.is_nan() || value == f64::INFINITY))
    }

    /// The summaries of all rows. `precision` is the machine epsilon of the type the weights were computed in.
    pub fn summaries(&self, precision: f64, threads: usize) -> Result<Vec<Summary>> {
        if let Some((sums, _)) = self.rows.iter().find(|row| row.0.count() != self.samples as u64) {
            let (expected, found) = (self.samples, sums.count());
            return Err(Error::Argument(format!("log weights: {found} samples a row, expected {expected}")));
        }
        let tasks = threads::pieces(self.rows.len(), 8, threads).into_iter().map(|range| {
            let rows = &self.rows[range];
            move || rows.iter().map(|row| self.summary(row, precision)).collect::<Vec<_>>()
        });
        Ok(threads::run(tasks.collect()).concat())
    }

    fn summary(&self, (sums, tail): &(LogSums, Tail), precision: f64) -> Summary {
        let exact = sums.constant(CONSTANT * precision);
        let khat = if exact { 0.0 } else { pareto::khat(&tail.ascending()) };
        let reliable = exact || khat <= pareto::good_khat(self.samples);
        Summary {
            log_mean: sums.log_mean_exp(),
            standard_error: if exact {
                0.0
            } else if reliable {
                sums.standard_error()
            } else {
                f64::NAN
            },
            mean: sums.mean(),
            mean_standard_error: sums.standard_error_of_mean(),
            effective_sample_size: sums.effective_sample_size(),
            khat,
            exact,
            reliable,
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    /// Log weights `[rows, columns]` with every kind of row: heavy tails, constant, some zero weights.
    fn matrix(rows: usize, columns: usize) -> Vec<f64> {
        let uniform = |i: usize| ((i as f64 * 0.618_033_988_749_895).fract() + 1e-9).min(1.0 - 1e-9);
        (0..rows * columns)
            .map(|i| match i / columns % 3 {
                0 => -0.8 * uniform(i).ln() - 300.0,
                1 => -42.0,
                _ if i % 5 == 0 => f64::NEG_INFINITY,
                _ => uniform(i),
            })
            .collect()
    }

    fn columns_of(values: &[f64], columns: usize, from: usize, to: usize) -> Vec<f64> {
        values.chunks_exact(columns).flat_map(|row| row[from..to].to_vec()).collect()
    }

    #[test]
    fn streaming_in_pieces_and_threads_equals_one_batch() {
        let (rows, columns) = (7, 3001);
        let values = matrix(rows, columns);
        let mut whole = LogWeights::new(rows, columns).unwrap();
        assert_eq!(whole.add(&values, 1).unwrap(), None);
        let mut streamed = LogWeights::new(rows, columns).unwrap();
        for (from, to) in [(0, 1), (1, 900), (900, 900), (900, 2999), (2999, 3001)] {
            assert_eq!(streamed.add(&columns_of(&values, columns, from, to), 3).unwrap(), None);
        }
        let both = whole.summaries(1e-16, 1).unwrap().into_iter().zip(streamed.summaries(1e-16, 4).unwrap());
        for (a, b) in both {
            assert!((a.log_mean - b.log_mean).abs() < 1e-12 * a.log_mean.abs());
            assert_eq!((a.khat, a.exact, a.reliable), (b.khat, b.exact, b.reliable));
        }
    }

    #[test]
    fn constant_rows_are_exact() {
        let mut weights = LogWeights::new(3, 2000).unwrap();
        weights.add(&matrix(3, 2000), 2).unwrap();
        let summaries = weights.summaries(1e-16, 1).unwrap();
        let constant = summaries[1];
        assert!(constant.exact && constant.reliable && constant.standard_error == 0.0 && constant.khat == 0.0);
        assert_eq!((constant.log_mean, constant.effective_sample_size), (-42.0, 2000.0));
        assert!(!summaries[0].exact && !summaries[0].reliable && summaries[0].standard_error.is_nan(), "k is 0.8");
        assert!(!summaries[2].exact && summaries[2].mean == f64::NEG_INFINITY);
    }

    #[test]
    fn bad_weights_and_wrong_counts_are_reported() {
        let mut weights = LogWeights::new(2, 3).unwrap();
        assert_eq!(weights.add(&[0f32, 1.0, f32::NAN, 0.0], 1).unwrap(), Some(2));
        assert_eq!(weights.add(&[f64::NEG_INFINITY, f64::INFINITY], 1).unwrap(), Some(1));
        assert!(weights.add(&[0.0, 0.0], 1).is_err() && weights.add(&[0.0], 1).is_err());
        assert!(LogWeights::new(2, 3).unwrap().summaries(0.0, 1).is_err() && LogWeights::new(2, 0).is_err());
    }

    #[test]
    fn few_samples_are_never_reliable() {
        for samples in 1..21 {
            let mut weights = LogWeights::new(1, samples).unwrap();
            let values: Vec<f64> = (0..samples).map(|i| i as f64 * 1e-3).collect();
            weights.add(&values, 1).unwrap();
            let summary = weights.summaries(1e-16, 1).unwrap()[0];
            assert!(!summary.reliable && summary.standard_error.is_nan() && summary.khat.is_nan(), "{samples}");
        }
    }
}
