//! Binding of `reparameterize_kl`.

use ferrovae_core::reparameterize_kl::{
    Draws, Gradients, Layout, Number, Parameter, ParameterMut, Prior, Rows, backward, forward,
};
use ferrovae_core::{Error, Result, simd};
use half::{bf16, f16};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{Span, read, write, write_new};

/// Span, strides of examples and segments.
type Strided = (Span, usize, usize);
/// Seed, example ids, number of samples, first sample.
type Noise = (i64, Option<Span>, usize, u32);

/// A parameter of the prior: span, stride of examples, whether in the type that is computed in.
type Given = Option<(Span, usize, bool)>;
/// Room for its gradient.
type Wanted = Option<(Span, bool)>;

/// The tensor's rows.
///
/// # Safety
/// As [`read`].
unsafe fn rows<'a, T>((span, example_stride, segment_stride): Strided, shape: [usize; 3]) -> Result<Rows<'a, T>> {
    let [examples, segments, inner] = shape;
    let layout = Layout { examples, segments, inner, example_stride, segment_stride };
    // SAFETY: the caller's promise.
    Rows::new(unsafe { read(span) }, layout)
}

/// What decides the noise.
///
/// # Safety
/// As [`read`].
unsafe fn draws<'a>((seed, example_ids, samples, first): Noise) -> Draws<'a> {
    // SAFETY: the caller's promise.
    Draws { seed, example_ids: example_ids.map(|span| unsafe { read(span) }), samples, first }
}

/// A parameter of the prior.
///
/// # Safety
/// As [`read`].
unsafe fn parameter<'a, T: Number>(given: Given, shape: [usize; 3]) -> Result<Option<Parameter<'a, T>>> {
    let Some((span, example_stride, wide)) = given else { return Ok(None) };
    let (place, shape) = ((span, example_stride, 0), [shape[0], 1, shape[1] * shape[2]]);
    // SAFETY: the caller's promise.
    Ok(Some(unsafe {
        if wide { Parameter::Wide(rows(place, shape)?) } else { Parameter::Narrow(rows(place, shape)?) }
    }))
}

/// The prior.
///
/// # Safety
/// As [`read`].
unsafe fn prior<'a, T: Number>([mean, logvar]: [Given; 2], shape: [usize; 3]) -> Result<Prior<'a, T>> {
    // SAFETY: the caller's promise.
    unsafe { Ok(Prior { mean: parameter(mean, shape)?, logvar: parameter(logvar, shape)? }) }
}

/// Room for the gradient of a parameter of the prior.
///
/// # Safety
/// As [`write`].
unsafe fn parameter_mut<'a, T: Number>(wanted: Wanted) -> Option<ParameterMut<'a, T>> {
    let (span, wide) = wanted?;
    // SAFETY: the caller's promise.
    Some(unsafe { if wide { ParameterMut::Wide(write(span)) } else { ParameterMut::Narrow(write(span)) } })
}

/// Runs `$body` with `$number` the element type named `$dtype`.
macro_rules! with_number {
    ($dtype:expr, $number:ident => $body:expr) => {
        match $dtype {
            "float32" => {
                type $number = f32;
                $body
            }
            "float64" => {
                type $number = f64;
                $body
            }
            "bfloat16" => {
                type $number = bf16;
                $body
            }
            "float16" => {
                type $number = f16;
                $body
            }
            other => Err(Error::Argument(format!("reparameterize_kl: numbers are {other}"))),
        }
    };
}

#[pyfunction]
fn reparameterize_kl(
    py: Python<'_>,
    dtype: &str,
    shape: [usize; 3],
    mean: Strided,
    logvar: Strided,
    of_prior: [Given; 2],
    noise: Noise,
    z: Span,
    kl: Span,
    elementwise: bool,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the caller keeps the tensors alive, the inputs unwritten and the results unused until this returns.
    py.detach(|| unsafe {
        with_number!(dtype, T => {
            let (mean, logvar) = (rows::<T>(mean, shape)?, rows::<T>(logvar, shape)?);
            let (z, kl) = (write_new::<T>(z), write::<<T as Number>::Work>(kl));
            let prior = prior::<T>(of_prior, shape)?;
            forward(simd::level(), mean, logvar, prior, draws(noise), z, kl, elementwise, threads)
        })
    })
    .map_err(to_python)
}

/// With `dlogvar` the gradients of two tensors; without it, `dmean` is that of the moments.
#[pyfunction]
fn reparameterize_kl_backward(
    py: Python<'_>,
    dtype: &str,
    shape: [usize; 3],
    mean: Strided,
    logvar: Strided,
    of_prior: [Given; 2],
    noise: Noise,
    dz: Option<Span>,
    dkl: Option<Span>,
    elementwise: bool,
    dmean: Span,
    dlogvar: Option<Span>,
    dprior: [Wanted; 2],
    threads: usize,
) -> PyResult<()> {
    // SAFETY: as above.
    py.detach(|| unsafe {
        with_number!(dtype, T => {
            let (mean, logvar) = (rows::<T>(mean, shape)?, rows::<T>(logvar, shape)?);
            let (dz, dkl) = (dz.map(|span| read::<T>(span)), dkl.map(|span| read::<<T as Number>::Work>(span)));
            let gradients = match dlogvar {
                Some(dlogvar) => Gradients::Pair(write_new::<T>(dmean), write_new::<T>(dlogvar)),
                None => Gradients::Moments(write_new::<T>(dmean)),
            };
            let (prior, draws, dprior) = (prior::<T>(of_prior, shape)?, draws(noise), dprior.map(|to| parameter_mut(to)));
            backward(simd::level(), mean, logvar, prior, draws, dz, dkl, elementwise, gradients, dprior, threads)
        })
    })
    .map_err(to_python)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(reparameterize_kl, module)?)?;
    module.add_function(wrap_pyfunction!(reparameterize_kl_backward, module)?)
}
