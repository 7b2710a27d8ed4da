//! k-hat: the shape of the generalised Pareto distribution fitted to the largest importance weights.
//!
//! Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (JMLR 2024), with the fit of Zhang
//! and Stephens (Technometrics 2009) and its shrinkage towards 1/2, as in stan-dev/loo. Moments of the weights below
//! order `1 / k` exist: from `k = 1/2` on the variance does not, from `k = 1` on the mean does not.

/// The fewest excesses a shape is fitted to.
const FEWEST: usize = 5;

/// How many of `samples` weights count as the tail: `ceil(min(0.2 K, 3 sqrt K))`.
pub fn tail_length(samples: usize) -> usize {
    samples.div_ceil(5).min((9.0 * samples as f64).sqrt().ceil() as usize)
}

/// The largest k-hat at which an average of `samples` weights is to be trusted: `min(1 - 1 / log10 K, 0.7)`.
pub fn good_khat(samples: usize) -> f64 {
    (1.0 - 1.0 / (samples as f64).log10()).min(0.7)
}

/// k-hat from the `M + 1` largest log weights, ascending: the first is the threshold, the others exceed it.
///
/// Ties with the threshold are no excesses. Without any excess the largest weight was drawn more than M times: the
/// weights end in an atom, and k-hat is 0, the largest shape all of whose moments exist. NaN when 1 to 4 excesses
/// are too few to fit, or a log weight is NaN or +inf.
pub fn khat(largest: &[f64]) -> f64 {
    let (Some((&threshold, tail)), Some(&max)) = (largest.split_first(), largest.last()) else { return f64::NAN };
    if tail.len() < FEWEST || !max.is_finite() {
        return f64::NAN;
    }
    // exp(l) - exp(threshold), relative to the largest weight and without cancellation; kept from underflowing to 0.
    let excesses: Vec<f64> = tail
        .iter()
        .filter(|&&log_weight| log_weight > threshold)
        .map(|&log_weight| ((log_weight - max).exp() * -(threshold - log_weight).exp_m1()).max(1e-300))
        .collect();
    match excesses.len() {
        0 => 0.0,
        count if count < FEWEST => f64::NAN,
        _ => shape(&excesses),
    }
}

/// Zhang and Stephens' estimate from positive excesses, ascending, shrunk by ten pseudo-observations at 1/2.
fn shape(excesses: &[f64]) -> f64 {
    let count = excesses.len() as f64;
    let quartile = excesses[(count / 4.0 + 0.5).floor() as usize - 1];
    let largest = excesses[excesses.len() - 1];
    let points = 30.0 + count.sqrt().floor();
    let profile = |b: f64| excesses.iter().map(|t| (-b * t).ln_1p()).sum::<f64>() / count;
    let grid: Vec<(f64, f64)> = (0..points as usize)
        .map(|i| {
            let b = 1.0 / largest + (1.0 - (points / (i as f64 + 0.5)).sqrt()) / (3.0 * quartile);
            let k = profile(b);
            (b, count * ((-b / k).ln() - k - 1.0))
        })
        .filter(|(_, log_likelihood)| log_likelihood.is_finite())
        .collect();
    let best = grid.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    let (weighted, total) = grid.iter().fold((0.0, 0.0), |(weighted, total), (b, log_likelihood)| {
        let weight = (log_likelihood - best).exp();
        (weighted + b * weight, total + weight)
    });
    (profile(weighted / total) * count + 5.0) / (count + 10.0)
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    /// Log weights at the mid-rank quantiles of a generalised Pareto tail above 1, and the threshold.
    fn tail(shape: f64, count: usize) -> Vec<f64> {
        let quantile = |i: usize| {
            let survival = 1.0 - (i as f64 + 0.5) / count as f64;
            if shape == 0.0 { -survival.ln() } else { (survival.powf(-shape) - 1.0) / shape }
        };
        std::iter::once(0.0).chain((0..count).map(|i| quantile(i).ln_1p())).collect()
    }

    #[test]
    fn recovers_the_shape_of_exact_tails() {
        for shape in [-0.5, 0.0, 0.3, 0.7, 1.2] {
            let count = 2000.0;
            let expected = (shape * count + 5.0) / (count + 10.0);
            assert!((khat(&tail(shape, 2000)) - expected).abs() < 0.02, "{shape}");
        }
    }

    #[test]
    fn does_not_depend_on_the_scale_of_the_weights() {
        let base = tail(0.6, 100);
        for shift in [-1e4, -300.0, 300.0, 1e4] {
            let moved: Vec<f64> = base.iter().map(|value| value + shift).collect();
            assert!((khat(&moved) - khat(&base)).abs() < 1e-8);
        }
    }

    #[test]
    fn ties_few_excesses_and_extremes_give_no_surprise() {
        assert_eq!(khat(&[2.0; 20]), 0.0, "an atom at the top");
        assert!(khat(&[f64::NEG_INFINITY; 20]).is_nan());
        assert!(khat(&[]).is_nan() && khat(&[0.0, 1.0, 2.0, 3.0, 4.0]).is_nan(), "four excesses");
        let mut tied = vec![0.0; 40];
        tied.extend(tail(0.3, 60).into_iter().skip(1));
        assert_eq!(khat(&tied), khat(&tail(0.3, 60)), "ties with the threshold are no excesses");
        let runaway: Vec<f64> = (0..20).map(|i| 400.0 * f64::from(i)).collect();
        assert!(khat(&runaway).is_finite() && khat(&runaway) > 1.0);
        let mut infinite = tail(0.3, 20);
        infinite[20] = f64::INFINITY;
        assert!(khat(&infinite).is_nan());
        assert!(khat(&[[f64::NEG_INFINITY; 10].as_slice(), &tail(0.3, 60)].concat()).is_finite());
    }

    #[test]
    fn tail_length_rounds_up() {
        assert_eq!([1, 5, 20, 21, 225, 5000, 10_000].map(tail_length), [1, 1, 4, 5, 45, 213, 300]);
        assert_eq!(good_khat(10), 0.0);
        assert_eq!(good_khat(100), 0.5);
        assert_eq!(good_khat(1_000_000), 0.7);
    }
}
