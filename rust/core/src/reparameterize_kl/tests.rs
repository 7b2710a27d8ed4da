use super::*;
use crate::simd::available;

const SHAPES: [(usize, usize, usize); 9] =
    [(0, 1, 3), (3, 1, 0), (1, 1, 1), (5, 1, 3), (300, 1, 2), (2, 1, 1024), (3, 1, 2500), (4, 7, 5), (2, 3, 900)];

fn draws(samples: usize) -> Draws<'static> {
    Draws { seed: -5, example_ids: None, samples, first: 3 }
}

fn values(count: usize, salt: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i.wrapping_mul(2_654_435_769) ^ salt) >> 16) as f32 / 2f32.powi(15) - 1.0).collect()
}

fn moments(examples: usize, segments: usize, inner: usize) -> Layout {
    Layout { examples, segments, inner, example_stride: 2 * segments * inner, segment_stride: 2 * inner }
}

/// z, kl and the gradient of one seeded objective.
fn all(level: Level, values_of: &[f32], layout: Layout, samples: usize, threads: usize) -> [Vec<f32>; 3] {
    let size = layout.examples * layout.columns();
    let rows = |start: usize| Rows::new(&values_of[start.min(values_of.len())..], layout).unwrap();
    let (mean, logvar) = (rows(0), rows(layout.inner));
    let (mut z, mut kl) = (vec![f32::NAN; samples * size], vec![f32::NAN; layout.examples]);
    forward(level, mean, logvar, Prior::STANDARD, draws(samples), &mut z, &mut kl, false, threads).unwrap();
    let (dz, dkl) = (values(z.len(), 77), values(kl.len(), 78));
    let mut gradient = vec![f32::NAN; 2 * size];
    let target = Gradients::Moments(&mut gradient);
    backward(
        level,
        mean,
        logvar,
        Prior::STANDARD,
        draws(samples),
        Some(&dz),
        Some(&dkl),
        false,
        target,
        [None, None],
        threads,
    )
    .unwrap();
    [z, kl, gradient]
}

#[test]
fn levels_and_threads_change_no_bit() {
    for (examples, segments, inner) in SHAPES {
        let layout = moments(examples, segments, inner);
        let values = values(2 * examples * layout.columns(), 1);
        let one = all(Level::Portable, &values, layout, 2, 1);
        assert!(one.iter().flatten().all(|value| value.is_finite()));
        for level in available() {
            for threads in [1, 2, 3, 7] {
                assert_eq!(all(level, &values, layout, 2, threads), one, "{level:?} {threads} {:?}", layout.shape());
            }
        }
    }
}

#[test]
fn values_are_those_of_the_definition() {
    let mut noise = Noise::new();
    for (examples, segments, inner) in SHAPES {
        let layout = moments(examples, segments, inner);
        let values = values(2 * examples * layout.columns(), 2);
        let [z, kl, _] = all(simd::level(), &values, layout, 1, 2);
        for (example, &kl) in kl.iter().enumerate() {
            let mut total = 0.0;
            for column in 0..layout.columns() {
                let at = 2 * example * layout.columns() + column / inner * 2 * inner + column % inner;
                let (mean, logvar) = (f64::from(values[at]), f64::from(values[at + inner]));
                let mut eps = [0.0; UNIT];
                noise.place(1, |_| example as u64, column / 4, 1);
                noise.normals(-5_i64 as u64, 3, &mut eps);
                let expected = mean + (logvar / 2.0).exp() * f64::from(eps[column % 4]);
                assert!((f64::from(z[example * layout.columns() + column]) - expected).abs() < 1e-6);
                total += 0.5 * (mean * mean + logvar.exp_m1() - logvar);
            }
            assert!((f64::from(kl) - total).abs() <= 1e-7 + 4e-7 * total, "{kl} {total}");
        }
    }
}

/// kl, the gradient of the moments and both of the prior, whose mean all examples share and whose logvar none do.
fn learned(level: Level, layout: Layout, threads: usize) -> [Vec<f32>; 4] {
    let (examples, columns) = (layout.examples, layout.columns());
    let (moments, prior) = (values(2 * examples * columns, 5), values((examples + 1) * columns, 6));
    let rows = |start: usize| Rows::new(&moments[start.min(moments.len())..], layout).unwrap();
    let (mean, logvar) = (rows(0), rows(layout.inner));
    let one = Layout { example_stride: 0, ..layout.contiguous() };
    let prior = Prior {
        mean: Some(Parameter::Narrow(Rows::new(&prior[..columns], one).unwrap())),
        logvar: Some(Parameter::Wide(Rows::new(&prior[columns..], layout.contiguous()).unwrap())),
    };
    let (mut z, mut kl) = (vec![f32::NAN; examples * columns], vec![f32::NAN; examples]);
    forward(level, mean, logvar, prior, draws(1), &mut z, &mut kl, false, threads).unwrap();
    let dkl = values(examples, 9);
    let mut gradient = vec![f32::NAN; 2 * examples * columns];
    let (mut first, mut second) = (vec![f32::NAN; columns], vec![f32::NAN; examples * columns]);
    let target = Gradients::Moments(&mut gradient);
    let wanted = [Some(ParameterMut::Narrow(&mut first)), Some(ParameterMut::Wide(&mut second))];
    backward(level, mean, logvar, prior, draws(1), None, Some(&dkl), false, target, wanted, threads).unwrap();
    [kl, gradient, first, second]
}

#[test]
fn levels_and_threads_change_no_bit_with_a_prior() {
    for (examples, segments, inner) in SHAPES.into_iter().chain([(9000, 1, 3)]) {
        let layout = moments(examples, segments, inner);
        let one = learned(Level::Portable, layout, 1);
        for level in available() {
            for threads in [1, 2, 5] {
                assert_eq!(learned(level, layout, threads), one, "{level:?} {threads} {:?}", layout.shape());
            }
        }
    }
}

#[test]
fn a_prior_is_that_of_the_definition() {
    for (examples, segments, inner) in SHAPES.into_iter().chain([(9000, 1, 3)]) {
        let layout = moments(examples, segments, inner);
        let columns = layout.columns();
        let (moments, prior) = (values(2 * examples * columns, 5), values((examples + 1) * columns, 6));
        let [kl, gradient, first, second] = learned(simd::level(), layout, 3);
        let (dkl, mut sums) = (values(examples, 9), vec![0.0; columns]);
        for example in 0..examples {
            let (weight, mut total) = (f64::from(dkl[example]), 0.0);
            for column in 0..columns {
                let at = 2 * example * columns + column / inner * 2 * inner + column % inner;
                let [m, v, pm, pv] =
                    [moments[at], moments[at + inner], prior[column], prior[(example + 1) * columns + column]]
                        .map(f64::from);
                let excess = (v - pv).exp_m1();
                let pull = (m - pm) * (-pv).exp();
                total += 0.5 * ((m - pm) * pull + excess - (v - pv));
                sums[column] -= weight * pull;
                let near = |found: f32, due: f64| assert!((f64::from(found) - due).abs() < 1e-6, "{found} {due}");
                near(gradient[at], weight * pull);
                near(gradient[at + inner], 0.5 * weight * excess);
                near(second[example * columns + column], -0.5 * weight * ((m - pm) * pull + excess));
            }
            assert!((f64::from(kl[example]) - total).abs() <= 1e-6 + 1e-6 * total, "{} {total}", kl[example]);
        }
        for (&found, due) in first.iter().zip(sums) {
            assert!((f64::from(found) - due).abs() < 1e-6 + 1e-6 * due.abs() + 1e-7 * examples as f64, "{found} {due}");
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let layout = moments(2, 1, 3);
    let values = values(12, 3);
    assert!(Rows::new(&values[..8], layout).is_err());
    let (mean, logvar) = (Rows::new(&values, layout).unwrap(), Rows::new(&values[3..], layout).unwrap());
    let (mut z, mut kl) = ([0.0; 6], [0.0; 2]);
    assert!(forward(Level::Portable, mean, logvar, Prior::STANDARD, draws(1), &mut z[..5], &mut kl, false, 1).is_err());
    assert!(forward(Level::Portable, mean, logvar, Prior::STANDARD, draws(1), &mut z, &mut kl, true, 1).is_err());
    let ids = Draws { example_ids: Some(&[1]), ..draws(1) };
    assert!(forward(Level::Portable, mean, logvar, Prior::STANDARD, ids, &mut z, &mut kl, false, 1).is_err());
    let target = Gradients::Pair(&mut z, &mut kl);
    assert!(
        backward(Level::Portable, mean, logvar, Prior::STANDARD, draws(1), None, None, false, target, [None, None], 1)
            .is_err()
    );
}
