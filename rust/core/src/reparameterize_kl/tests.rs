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
    backward(level, mean, logvar, Prior::STANDARD, draws(samples), Some(&dz), Some(&dkl), false, target, [None, None], threads).unwrap();
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
    assert!(backward(Level::Portable, mean, logvar, Prior::STANDARD, draws(1), None, None, false, target, [None, None], 1).is_err());
}
