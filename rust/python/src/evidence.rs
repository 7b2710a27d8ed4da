//! Binding of `evidence`.

use ferrovae_core::evidence::{LogWeights, pareto};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{self, Span};

/// log mean, its standard error, mean, its standard error, effective sample size, k-hat, exact, reliable.
type Row = (f64, f64, f64, f64, f64, f64, bool, bool);

#[pyclass(name = "LogWeights", module = "ferrovae._core")]
struct PyLogWeights(LogWeights);

#[pymethods]
impl PyLogWeights {
    #[new]
    fn new(rows: usize, samples: usize) -> PyResult<Self> {
        LogWeights::new(rows, samples).map(Self).map_err(to_python)
    }

    fn add_float64(&mut self, py: Python<'_>, values: Span, threads: usize) -> PyResult<Option<usize>> {
        // SAFETY: Python passes a contiguous float64 tensor that it keeps alive and unwritten during the call.
        let values = unsafe { memory::read::<f64>(values) };
        py.detach(|| self.0.add(values, threads)).map_err(to_python)
    }

    fn add_float32(&mut self, py: Python<'_>, values: Span, threads: usize) -> PyResult<Option<usize>> {
        // SAFETY: Python passes a contiguous float32 tensor that it keeps alive and unwritten during the call.
        let values = unsafe { memory::read::<f32>(values) };
        py.detach(|| self.0.add(values, threads)).map_err(to_python)
    }

    fn summaries(&self, py: Python<'_>, precision: f64, threads: usize) -> PyResult<Vec<Row>> {
        let summaries = py.detach(|| self.0.summaries(precision, threads)).map_err(to_python)?;
        Ok(summaries
            .into_iter()
            .map(|row| {
                (
                    row.log_mean,
                    row.standard_error,
                    row.mean,
                    row.mean_standard_error,
                    row.effective_sample_size,
                    row.khat,
                    row.exact,
                    row.reliable,
                )
            })
            .collect())
    }
}

/// The largest k-hat at which an average of `samples` weights is to be trusted.
#[pyfunction]
fn good_khat(samples: usize) -> f64 {
    pareto::good_khat(samples)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyLogWeights>()?;
    module.add_function(wrap_pyfunction!(good_khat, module)?)
}
