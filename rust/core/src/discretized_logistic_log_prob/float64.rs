//! The same in double precision: one number at a time.

use super::{check, check_room, pieces};
use crate::logistic::{Mass, level, mass};
use crate::{Result, threads};

/// The numbers of all examples, as in [`super::Logistics`].
#[derive(Debug, Clone, Copy)]
pub struct Logistics64<'a> {
    /// As long as the others, or a divisor.
    pub x: &'a [f64],
    /// The logistics' means.
    pub mean: &'a [f64],
    /// The logarithms of their scales.
    pub log_scale: &'a [f64],
    /// Levels, 2 to 65536.
    pub levels: usize,
    /// Numbers a row.
    pub columns: usize,
}

impl Logistics64<'_> {
    /// The mass of one number.
    fn mass(&self, index: usize) -> Mass {
        let top = self.levels as f64 - 1.0;
        let level = level(self.x[index % self.x.len()], top);
        let n = 2.0 * level - top;
        let lower = (-self.mean[index]).mul_add(top, n - 1.0);
        let upper = (-self.mean[index]).mul_add(top, n + 1.0);
        mass(level, top, lower, upper, self.log_scale[index])
    }

    fn check(&self, rows: usize) -> Result<()> {
        check(self.x.len(), self.mean.len(), self.log_scale.len(), self.levels, self.columns, rows)
    }
}

/// [`super::discretized_logistic_log_prob`] in double precision.
pub fn discretized_logistic_log_prob_f64(data: Logistics64, out: &mut [f64], threads: usize) -> Result<()> {
    data.check(out.len())?;
    let mut rest = out;
    let tasks = pieces(rest.len(), data.columns, threads).map(|rows| {
        let out = rest.split_off_mut(..rows.len()).unwrap_or_default();
        move || {
            for (row, out) in rows.zip(out) {
                let row = row * data.columns..(row + 1) * data.columns;
                *out = row.map(|index| data.mass(index).log).sum::<f64>() + 0.0;
            }
        }
    });
    threads::run(tasks.collect());
    Ok(())
}

/// [`super::discretized_logistic_log_prob_backward`] in double precision.
pub fn discretized_logistic_log_prob_backward_f64(
    data: Logistics64,
    grad: &[f64],
    out: [&mut [f64]; 2],
    threads: usize,
) -> Result<()> {
    data.check(grad.len())?;
    check_room([out[0].len(), out[1].len()], data.mean.len())?;
    let [mut means, mut log_scales] = out;
    let tasks = pieces(grad.len(), data.columns, threads).map(|rows| {
        let count = rows.len() * data.columns;
        let means = means.split_off_mut(..count).unwrap_or_default();
        let log_scales = log_scales.split_off_mut(..count).unwrap_or_default();
        move || {
            let first = rows.start * data.columns;
            for (index, (d_mean, d_log_scale)) in means.iter_mut().zip(log_scales).enumerate() {
                let (mass, grad) = (data.mass(first + index), grad[(first + index) / data.columns]);
                (*d_mean, *d_log_scale) = (grad * mass.d_mean, grad * mass.d_log_scale);
            }
        }
    });
    threads::run(tasks.collect());
    Ok(())
}
