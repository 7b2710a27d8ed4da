use half::f16;

use super::*;

const METRICS: [Metric; 4] = [Metric::Euclidean, Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

/// Values of a linear congruential generator, roughly normal.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.7).collect()
}

#[derive(Debug, PartialEq)]
struct Results {
    indices: Vec<i64>,
    quantized: Vec<u32>,
    codes: Vec<u32>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The definition, written as plainly as it can be.
fn by_definition(inputs: &Inputs<'_, f32, f32>, shape: Shape, metric: Metric) -> Results {
    let Shape { groups, rows, stages, books, codes, dims } = shape;
    let (mut indices, mut quantized, mut all_codes) = (vec![], vec![], vec![]);
    for row in 0..groups * rows {
        let mut residual = inputs.x[row * dims..][..dims].to_vec();
        let mut total = vec![0.0_f32; dims];
        for stage in 0..stages {
            if inputs.limits.is_some_and(|limits| limits[row] <= stage as i64) {
                indices.push(-1);
                all_codes.extend(vec![0.0; dims]);
                continue;
            }
            let book = row / rows * books + if books == 1 { 0 } else { stage };
            let code = |k: usize| &inputs.codebooks[(book * codes + k) * dims..][..dims];
            let score = |k: usize| {
                let (mut score, mut square) = (0.0, 0.0);
                for (&r, &e) in residual.iter().zip(code(k)) {
                    let (r, e) = (f64::from(r), f64::from(e));
                    square += e * e;
                    if metric.is_squared() { score += (r - e) * (r - e) } else { score -= r * e }
                }
                if metric == Metric::Cosine && square > 0.0 {
                    score /= square.sqrt();
                }
                if score.is_nan() { f64::INFINITY } else { score }
            };
            let best = (1..codes).fold(0, |best, k| if score(k) < score(best) { k } else { best });
            indices.push(best as i64);
            all_codes.extend(code(best));
            for d in 0..dims {
                let value = code(best)[d];
                residual[d] -= value;
                total[d] += value;
            }
        }
        quantized.extend(total);
    }
    Results { indices, quantized: bits(&quantized), codes: bits(&all_codes) }
}

impl Metric {
    fn is_squared(self) -> bool {
        matches!(self, Self::Euclidean | Self::SquaredEuclidean)
    }
}

fn compute<X: Row>(
    level: Level,
    inputs: Inputs<'_, X, f32>,
    shape: Shape,
    metric: Metric,
    threads: usize,
    keep: bool,
) -> Results {
    let Shape { groups, rows, stages, dims, .. } = shape;
    let mut indices = vec![i64::MIN; groups * rows * stages];
    let mut quantized = vec![f32::NAN; groups * rows * dims];
    let mut codes = vec![f32::NAN; if keep { groups * rows * stages * dims } else { 0 }];
    let outputs = Outputs { indices: &mut indices, quantized: &mut quantized, codes: &mut codes };
    residual_nearest_code_at(level, inputs, shape, metric, outputs, threads).unwrap();
    Results { indices, quantized: bits(&quantized), codes: bits(&codes) }
}

/// Every metric, level and several thread counts against the definition.
fn check_all(x: &[f32], codebooks: &[f32], limits: Option<&[i64]>, shape: Shape) {
    for metric in METRICS {
        let mut expected = by_definition(&Inputs { x, codebooks, limits }, shape, metric);
        for keep in [true, false] {
            if !keep {
                expected.codes.clear();
            }
            for level in simd::available() {
                for threads in [1, 3] {
                    let found = compute(level, Inputs { x, codebooks, limits }, shape, metric, threads, keep);
                    assert_eq!(found, expected, "{metric:?} {} {threads} threads {shape:?}", level.name());
                }
            }
        }
    }
}

#[test]
fn shapes_at_every_level() {
    for (groups, rows, stages, codes, dims) in
        [(1, 1, 1, 1, 1), (1, 3, 4, 17, 3), (2, 64, 3, 40, 8), (3, 5, 2, 130, 33), (1, 300, 5, 64, 5)]
    {
        for books in [1, stages] {
            let shape = Shape { groups, rows, stages, books, codes, dims };
            let codebooks = noise(groups * books * codes * dims, 2);
            check_all(&noise(groups * rows * dims, 1), &codebooks, None, shape);
        }
    }
}

#[test]
fn rows_stop_where_they_are_told_to() {
    let shape = Shape { groups: 2, rows: 50, stages: 4, books: 4, codes: 30, dims: 6 };
    let limits: Vec<i64> = (0..100).map(|row| row % 7 - 1).collect();
    check_all(&noise(600, 3), &noise(2 * 4 * 30 * 6, 4), Some(&limits), shape);
    check_all(&noise(600, 3), &noise(2 * 4 * 30 * 6, 4), Some(&[0; 100]), shape);
}

#[test]
fn ties_and_what_is_not_finite() {
    let shape = Shape { groups: 1, rows: 60, stages: 3, books: 3, codes: 50, dims: 4 };
    let grid = |count, seed| noise(count, seed).iter().map(|value| (value * 2.0).round()).collect::<Vec<_>>();
    let (mut x, mut codebooks) = (grid(240, 5), grid(600, 6));
    check_all(&x, &codebooks, None, shape);
    (x[2], x[21], x[45]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    (codebooks[0], codebooks[207], codebooks[430]) = (f32::NAN, f32::INFINITY, f32::NAN);
    check_all(&x, &codebooks, None, shape);
    // Padding: the second codebook has 20 codes, the third none.
    codebooks[280..400].fill(f32::NAN);
    codebooks[400..].fill(f32::NAN);
    check_all(&x, &codebooks, None, shape);
}

#[test]
fn many_blocks_are_one() {
    let shape = Shape { groups: 1, rows: 3 * BLOCK / 700, stages: 2, books: 2, codes: 3, dims: 700 };
    let (x, codebooks) = (noise(shape.rows * 700, 7), noise(2 * 3 * 700, 8));
    let expected = by_definition(&Inputs { x: &x, codebooks: &codebooks, limits: None }, shape, Metric::Dot);
    let inputs = Inputs { x: &x, codebooks: &codebooks, limits: None };
    assert_eq!(compute(simd::level(), inputs, shape, Metric::Dot, 2, true), expected);
}

#[test]
fn half_precision_is_widened_and_double_stays_double() {
    let shape = Shape { groups: 1, rows: 40, stages: 3, books: 3, codes: 20, dims: 5 };
    let (x, codebooks) = (noise(200, 9), noise(300, 10));
    let half: Vec<f16> = x.iter().map(|&value| f16::from_f32(value)).collect();
    let wide: Vec<f32> = half.iter().map(|value| value.to_f32()).collect();
    let metric = Metric::Euclidean;
    let expected = by_definition(&Inputs { x: &wide, codebooks: &codebooks, limits: None }, shape, metric);
    let inputs = Inputs { x: &half, codebooks: &codebooks, limits: None };
    assert_eq!(compute(simd::level(), inputs, shape, metric, 2, true), expected);

    let doubles = |values: &[f32]| values.iter().map(|&value| f64::from(value) / 3.0).collect::<Vec<_>>();
    let (x, codebooks) = (doubles(&x), doubles(&codebooks));
    let (mut indices, mut quantized, mut codes) = (vec![0; 120], vec![0.0; 200], vec![]);
    let outputs = Outputs { indices: &mut indices, quantized: &mut quantized, codes: &mut codes };
    let inputs = Inputs { x: &x, codebooks: &codebooks, limits: None };
    residual_nearest_code_f64(inputs, shape, metric, outputs, 3).unwrap();
    for row in 0..40 {
        let mut residual = x[row * 5..][..5].to_vec();
        let mut total = [0.0; 5];
        for stage in 0..3 {
            let distance = |k: usize| {
                let code = &codebooks[(stage * 20 + k) * 5..][..5];
                residual.iter().zip(code).fold(0.0, |sum, (r, e)| sum + (r - e) * (r - e))
            };
            let best = (1..20).fold(0, |best, k| if distance(k) < distance(best) { k } else { best });
            assert_eq!(indices[row * 3 + stage], best as i64);
            for d in 0..5 {
                residual[d] -= codebooks[(stage * 20 + best) * 5 + d];
                total[d] += codebooks[(stage * 20 + best) * 5 + d];
            }
        }
        assert_eq!(total.map(f64::to_bits), std::array::from_fn(|d| quantized[row * 5 + d].to_bits()));
    }
}

#[test]
fn gradients_go_to_the_chosen_codes() {
    let shape = Shape { groups: 2, rows: 70, stages: 3, books: 3, codes: 9, dims: 4 };
    let indices: Vec<i64> = noise(420, 11).iter().map(|value| ((value + 3.0) * 1e3) as i64 % 10 - 1).collect();
    assert!(indices.contains(&-1) && indices.contains(&8));
    // Integers: sums are exact, whatever the order.
    let whole = |count, seed| noise(count, seed).iter().map(|value| (value * 9.0).round()).collect::<Vec<_>>();
    let (of_quantized, of_codes) = (whole(560, 12), whole(1680, 13));
    for of_codes in [&of_codes[..], &[]] {
        let mut expected = vec![0.0_f32; 2 * 3 * 9 * 4];
        for (place, &k) in indices.iter().enumerate() {
            let (row, stage) = (place / 3, place % 3);
            for d in 0..4 {
                if k >= 0 {
                    let code = (row / 70 * 3 + stage) * 9 + k as usize;
                    let more = of_codes.get(place * 4 + d).copied().unwrap_or(0.0);
                    expected[code * 4 + d] += of_quantized[row * 4 + d] + more;
                }
            }
        }
        for threads in [1, 2, 5] {
            let mut out = vec![f32::NAN; expected.len()];
            gradients(&of_quantized, of_codes, &indices, shape, &mut out, threads).unwrap();
            assert_eq!(bits(&out), bits(&expected));
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let shape = Shape { groups: 1, rows: 2, stages: 2, books: 2, codes: 3, dims: 1 };
    let attempt = |x: &[f32], codebooks: &[f32], limits: Option<&[i64]>, shape| {
        let (mut indices, mut quantized) = ([0; 4], [0.0; 2]);
        let outputs = Outputs { indices: &mut indices, quantized: &mut quantized, codes: &mut [] };
        residual_nearest_code(Inputs { x, codebooks, limits }, shape, Metric::Dot, outputs, 1)
    };
    assert!(attempt(&[0.0; 2], &[0.0; 6], Some(&[1, 1]), shape).is_ok());
    assert!(attempt(&[0.0; 3], &[0.0; 6], None, shape).is_err());
    assert!(attempt(&[0.0; 2], &[0.0; 5], None, shape).is_err());
    assert!(attempt(&[0.0; 2], &[0.0; 6], Some(&[1]), shape).is_err());
    assert!(attempt(&[0.0; 2], &[0.0; 9], None, Shape { books: 3, ..shape }).is_err());
    assert!(gradients(&[0.0_f32; 2], &[], &[0, 1, 2, 3], shape, &mut [0.0; 6], 1).is_err(), "an index out of range");
}
