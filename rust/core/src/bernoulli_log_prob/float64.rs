//! The same in double precision: one number at a time, one logarithm a block.

use super::{check, pieces};
use crate::{Error, Result, threads};

/// Factors of at most 2 whose product cannot overflow.
const BLOCK: usize = 1000;

/// [`super::bernoulli_log_prob`] in double precision.
pub fn bernoulli_log_prob_f64(
    logits: &[f64],
    x: &[f64],
    columns: usize,
    out: &mut [f64],
    threads: usize,
) -> Result<()> {
    check(logits.len(), x.len(), columns, out.len())?;
    let mut rest = out;
    let tasks = pieces(rest.len(), columns, threads).map(|rows| {
        let out = rest.split_off_mut(..rows.len()).unwrap_or_default();
        move || {
            for (row, out) in rows.zip(out) {
                let start = row * columns;
                let x_start = start % x.len().max(1);
                *out = row_sum(&logits[start..start + columns], &x[x_start..x_start + columns]);
            }
        }
    });
    threads::run(tasks.collect());
    Ok(())
}

/// [`super::bernoulli_log_prob_backward`] in double precision.
pub fn bernoulli_log_prob_backward_f64(
    logits: &[f64],
    x: &[f64],
    grad: &[f64],
    columns: usize,
    out: &mut [f64],
    threads: usize,
) -> Result<()> {
    check(logits.len(), x.len(), columns, grad.len())?;
    if out.len() != logits.len() {
        return Err(Error::Argument(format!(
            "bernoulli_log_prob: room for {} of {} gradients",
            out.len(),
            logits.len()
        )));
    }
    let mut rest = out;
    let tasks = pieces(grad.len(), columns, threads).map(|rows| {
        let out = rest.split_off_mut(..rows.len() * columns).unwrap_or_default();
        move || {
            let start = rows.start * columns;
            for (index, (out, &logit)) in out.iter_mut().zip(&logits[start..]).enumerate() {
                let factor = (-logit.abs()).exp();
                let rest = (factor / (1.0 + factor)).copysign(logit);
                *out = grad[(start + index) / columns] * (x[(start + index) % x.len()] - step(logit) + rest);
            }
        }
    });
    threads::run(tasks.collect());
    Ok(())
}

fn step(logit: f64) -> f64 {
    if logit.is_sign_positive() { 1.0 } else { 0.0 }
}

fn row_sum(logits: &[f64], x: &[f64]) -> f64 {
    logits.chunks(BLOCK).zip(x.chunks(BLOCK)).map(|(logits, x)| block_sum(logits, x)).sum::<f64>() + 0.0
}

fn block_sum(logits: &[f64], x: &[f64]) -> f64 {
    let (mut linear, mut growth) = (0.0, 0.0);
    for (&logit, &x) in logits.iter().zip(x) {
        let error = x - step(logit);
        // 0 times infinity is 0 here.
        linear += if error == 0.0 { 0.0 } else { error * logit };
        let factor = (-logit.abs()).exp();
        growth += factor * growth + factor;
    }
    linear - growth.ln_1p()
}
