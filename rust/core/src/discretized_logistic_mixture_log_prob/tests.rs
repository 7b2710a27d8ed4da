//! Every level against float64, values and gradients; thread counts; ends of the range.

#![allow(clippy::float_cmp)]

use super::*;
use crate::simd::available;

/// Numbers in [-1, 1) that look random.
fn noise(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / 2_147_483_648.0 - 1.0
        })
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// Data and parameters of some images: x, logits, means, logarithms of scales, coefficients.
struct Owned<T>([Vec<T>; 5], [usize; 3], f64);

impl<T> Owned<T> {
    fn view(&self) -> Mixture<'_, T> {
        let [x, logits, means, log_scales, coefficients] = &self.0;
        let [images, components, pixels] = self.1;
        Mixture { x, logits, means, log_scales, coefficients, images, components, pixels, levels: 256, floor: self.2 }
    }
}

fn random(sizes: [usize; 3], log_scale: f32) -> Owned<f32> {
    let [images, components, pixels] = sizes;
    let count = images * CHANNELS * components * pixels;
    let level = |x: &f32| (2.0 * ((x * 1.1 + 1.0) * 127.5).round().clamp(0.0, 255.0) - 255.0) / 255.0;
    let values = [
        noise(1, images * CHANNELS * pixels).iter().map(level).collect(),
        noise(2, count / CHANNELS).iter().map(|e| 2.0 * e).collect(),
        noise(3, count),
        noise(4, count).iter().map(|e| log_scale + e).collect(),
        noise(5, count),
    ];
    Owned(values, sizes, -7.0)
}

fn double(single: &Owned<f32>) -> Owned<f64> {
    Owned(single.0.each_ref().map(|values| wide(values)), single.1, single.2)
}

fn gradients<T: Clone + From<f32>>(
    sizes: [usize; 3],
    run: impl FnOnce(MixtureGradients<T>) -> Result<()>,
) -> [Vec<T>; 4] {
    let logits = sizes.iter().product::<usize>();
    let mut out = [1, 3, 3, 3].map(|each| vec![T::from(f32::NAN); each * logits]);
    let [logits, means, log_scales, coefficients] = &mut out;
    run(MixtureGradients { logits, means, log_scales, coefficients }).unwrap();
    out
}

#[test]
fn values_and_gradients_are_accurate_on_every_level_and_thread_count() {
    for sizes in [[1, 1, 1], [2, 3, 15], [1, 10, 17], [3, 2, 64], [1, 5, 391], [5, 10, 65]] {
        for log_scale in [-8.0, -3.0, 0.0, 4.0] {
            let single = random(sizes, log_scale);
            let exact = double(&single);
            let images = sizes[0];
            let (grad, mut truth) = (noise(9, images), vec![f64::NAN; images]);
            discretized_logistic_mixture_log_prob_f64(exact.view(), &mut truth, 2).unwrap();
            let slopes = gradients(sizes, |out| {
                discretized_logistic_mixture_log_prob_backward_f64(exact.view(), &wide(&grad), out)
            });
            for level in available() {
                let mut before = None;
                for threads in [1, 2, 3, 64] {
                    let mut ours = vec![f32::NAN; images];
                    discretized_logistic_mixture_log_prob_at(level, single.view(), &mut ours, threads).unwrap();
                    for (&ours, truth) in ours.iter().zip(&truth) {
                        let error = (f64::from(ours) / truth - 1.0).abs();
                        assert!(error < 3e-6, "{level:?} {sizes:?} {log_scale}: {ours}, not {truth}");
                    }
                    let own = gradients(sizes, |out| {
                        let view = single.view();
                        discretized_logistic_mixture_log_prob_backward_at(level, view, &grad, out, threads)
                    });
                    for (which, (ours, truth)) in own.iter().zip(&slopes).enumerate() {
                        let most = truth.iter().fold(1.0, |most: f64, value| most.max(value.abs()));
                        for (&ours, truth) in ours.iter().zip(truth) {
                            let error = (f64::from(ours) - truth).abs() / most;
                            assert!(error < 1e-4, "{level:?} {sizes:?} {log_scale} {which}: {ours}, not {truth}");
                        }
                    }
                    assert!(before.is_none_or(|before| before == (ours.clone(), own.clone())), "{level:?} {threads}");
                    before = Some((ours, own));
                }
            }
        }
    }
}

#[test]
fn a_component_that_is_impossible_does_not_count() {
    let sizes = [1, 2, 33];
    for level in available() {
        let mut data = random(sizes, -1.0);
        // The second component of no weight, then of no likelihood.
        let alone = {
            let first = |values: &[f32], rows: usize| -> Vec<f32> {
                values.chunks(2 * 33).take(rows).flat_map(|both| both[..33].to_vec()).collect()
            };
            let [x, logits, means, log_scales, coefficients] = &data.0;
            let values = [x.clone(), first(logits, 1), first(means, 3), first(log_scales, 3), first(coefficients, 3)];
            let mut out = [f32::NAN];
            let one = Owned(values, [1, 1, 33], -7.0);
            discretized_logistic_mixture_log_prob_at(level, one.view(), &mut out, 1).unwrap();
            out[0]
        };
        data.0[1][..33].fill(0.0);
        data.0[1][33..].fill(f32::NEG_INFINITY);
        let mut out = [f32::NAN];
        discretized_logistic_mixture_log_prob_at(level, data.view(), &mut out, 1).unwrap();
        assert!((out[0] / alone - 1.0).abs() < 1e-6, "{level:?}: {}, not {alone}", out[0]);
        data.0[1][33..].fill(0.0);
        data.0[2][33..66].fill(f32::INFINITY);
        data.0[0][..33].fill(0.0);
        discretized_logistic_mixture_log_prob_at(level, data.view(), &mut out, 1).unwrap();
        assert!(out[0].is_finite(), "{level:?}: {}", out[0]);
        let slopes =
            gradients(sizes, |to| discretized_logistic_mixture_log_prob_backward_at(level, data.view(), &[1.0], to, 1));
        assert!(slopes.iter().flatten().all(|slope| slope.is_finite()), "{level:?}");
        data.0[2][..33].fill(f32::INFINITY);
        discretized_logistic_mixture_log_prob_at(level, data.view(), &mut out, 1).unwrap();
        assert_eq!(out[0], f32::NEG_INFINITY, "{level:?}");
    }
}

#[test]
fn nan_spoils_its_own_image_only() {
    for level in available() {
        for which in 0..5 {
            let mut data = random([3, 2, 21], -2.0);
            let length = data.0[which].len();
            data.0[which][length / 2] = f32::NAN;
            let mut out = [0.0; 3];
            discretized_logistic_mixture_log_prob_at(level, data.view(), &mut out, 2).unwrap();
            assert_eq!(out.map(f32::is_nan), [false, true, false], "{level:?} {which}");
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors_and_nothing_is_zero() {
    let data = random([2, 3, 4], 0.0);
    let mut out = [7.0; 2];
    for wrong in [
        Mixture { x: &data.0[0][..9], ..data.view() },
        Mixture { x: &[], ..data.view() },
        Mixture { logits: &data.0[1][1..], ..data.view() },
        Mixture { coefficients: &data.0[4][1..], ..data.view() },
        Mixture { levels: 1, ..data.view() },
        Mixture { images: 3, ..data.view() },
    ] {
        assert!(discretized_logistic_mixture_log_prob(wrong, &mut out, 1).is_err());
    }
    let none = Owned::<f32>([vec![], vec![], vec![], vec![], vec![]], [2, 3, 0], -7.0);
    discretized_logistic_mixture_log_prob(none.view(), &mut out, 2).unwrap();
    assert_eq!(out, [0.0; 2]);
}
