//! A normal prior other than N(0, I): its parameters, for every example or shared by all, and their gradients.

use super::memory::{Layout, Rows};
use super::number::{Number, Real};
use super::{UNIT, Unit, expect};
use crate::{Error, Result};

/// A parameter of the prior: of the moments' element type, or of the one they are computed in.
#[derive(Debug, Clone, Copy)]
pub enum Parameter<'a, T: Number> {
    /// As mean and logvar.
    Narrow(Rows<'a, T>),
    /// `f32` for halves.
    Wide(Rows<'a, T::Work>),
}

/// N(mean, exp(logvar)); 0 for what is not given.
#[derive(Debug, Clone, Copy)]
pub struct Prior<'a, T: Number> {
    /// As many rows and columns as mean; an example stride of 0 makes it one that all examples share.
    pub mean: Option<Parameter<'a, T>>,
    /// The log of the variance, in the same way.
    pub logvar: Option<Parameter<'a, T>>,
}

impl<T: Number> Parameter<'_, T> {
    fn layout(&self) -> Layout {
        match self {
            Self::Narrow(rows) => rows.layout(),
            Self::Wide(rows) => rows.layout(),
        }
    }

    /// Whether it is one row for all examples.
    pub(super) fn is_shared(&self) -> bool {
        self.layout().example_stride == 0
    }
}

impl<T: Number> Prior<'_, T> {
    /// N(0, I).
    pub const STANDARD: Self = Self { mean: None, logvar: None };

    pub(super) fn is_given(&self) -> bool {
        self.mean.is_some() || self.logvar.is_some()
    }

    pub(super) fn check(&self, like: Layout) -> Result<()> {
        for parameter in [&self.mean, &self.logvar].into_iter().flatten() {
            let layout = parameter.layout();
            if (layout.examples, layout.columns()) != (like.examples, like.columns()) {
                return Err(Error::Argument("reparameterize_kl: the prior and mean have different shapes".to_owned()));
            }
        }
        Ok(())
    }

    /// Both parameters of a unit.
    #[inline(always)]
    pub(super) fn read(&self, unit: &Unit, mean: &mut [T::Work; UNIT], logvar: &mut [T::Work; UNIT]) {
        read(self.mean.as_ref(), unit, mean);
        read(self.logvar.as_ref(), unit, logvar);
    }
}

/// A parameter that is not given leaves the buffer as it is: zeros.
#[inline(always)]
fn read<T: Number>(parameter: Option<&Parameter<T>>, unit: &Unit, buffer: &mut [T::Work; UNIT]) {
    match parameter {
        Some(Parameter::Narrow(rows)) => rows.read(unit, buffer),
        Some(Parameter::Wide(rows)) => rows.read(unit, buffer),
        None => {}
    }
}

/// (mean - prior mean) / prior std, 1 / prior std, the log of the variances' ratio, and that ratio minus 1.
#[inline(always)]
pub(super) fn divergence<R: Real>(mean: R, logvar: R, prior_mean: R, prior_logvar: R) -> (R, R, R, R) {
    let (inverse, _) = (R::ZERO - prior_logvar).deviation_and_excess();
    let ratio = logvar - prior_logvar;
    let (_, excess) = ratio.deviation_and_excess();
    ((mean - prior_mean) * inverse, inverse, ratio, excess)
}

/// Room for the gradient of a parameter, contiguous.
#[derive(Debug)]
pub enum ParameterMut<'a, T: Number> {
    /// As mean and logvar.
    Narrow(&'a mut [T]),
    /// `f32` for halves.
    Wide(&'a mut [T::Work]),
}

impl<T: Number> ParameterMut<'_, T> {
    pub(super) fn check(&self, expected: usize) -> Result<()> {
        let length = match self {
            Self::Narrow(values) => values.len(),
            Self::Wide(values) => values.len(),
        };
        expect("the prior's gradient", length, expected)
    }

    /// The sums of the columns of `parts`, in order.
    pub(super) fn add_up(self, parts: &[f64]) {
        match self {
            Self::Narrow(values) => add_up(values, parts),
            Self::Wide(values) => add_up(values, parts),
        }
    }
}

fn add_up<N: Number>(values: &mut [N], parts: &[f64]) {
    let columns = values.len();
    for (column, value) in values.iter_mut().enumerate() {
        let total = parts.iter().skip(column).step_by(columns).sum();
        *value = N::round(N::Work::from_f64(total));
    }
}
