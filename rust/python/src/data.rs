//! Binding of `data`: file headers, and the pipeline that fills torch's memory.

use std::path::PathBuf;
use std::time::Duration;

use ferrovae_core::data::batch::{Plan, Slot, Source};
use ferrovae_core::data::keys::{DRAW, epoch_key};
use ferrovae_core::data::order::Order;
use ferrovae_core::data::pipeline::{Delivery, Pipeline as Core};
use ferrovae_core::data::schedule::Schedule;
use ferrovae_core::data::transform::{Draw, Transform};
use ferrovae_core::data::{idx, npy};
use ferrovae_core::{Error, simd};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::memory::{self, Span};

/// Waiting threads look for Ctrl-C this often.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Sizes of an IDX file of unsigned bytes with `least` to `most` dimensions.
#[pyfunction]
fn idx_shape(py: Python<'_>, path: PathBuf, least: u8, most: u8) -> PyResult<Vec<usize>> {
    py.detach(|| idx::shape(&path, least..=most)).map_err(to_python)
}

/// Reads an IDX file of that shape into uint8 memory.
#[pyfunction]
fn idx_read(py: Python<'_>, path: PathBuf, shape: Vec<usize>, out: Span) -> PyResult<()> {
    // SAFETY: Python passes a new uint8 tensor that it keeps alive.
    let out = unsafe { memory::write::<u8>(out) };
    py.detach(|| idx::read(&path, &shape, out)).map_err(to_python)
}

/// `(kind, size, big_endian, fortran_order, shape, offset)` of a .npy file.
#[pyfunction]
fn npy_header(path: PathBuf) -> PyResult<(char, usize, bool, bool, Vec<usize>, usize)> {
    let header = npy::header(&path).map_err(to_python)?;
    Ok((header.kind, header.size, header.big_endian, header.fortran_order, header.shape, header.offset))
}

fn source(element: &str, span: Span) -> ferrovae_core::Result<Source> {
    // SAFETY: the pipeline holds the owner of this memory until its threads are joined.
    unsafe {
        Ok(match element {
            "uint8" => Source::U8(memory::read(span)),
            "float16" => Source::F16(memory::read(span)),
            "bfloat16" => Source::Bf16(memory::read(span)),
            "float32" => Source::F32(memory::read(span)),
            "float64" => Source::F64(memory::read(span)),
            other => return Err(Error::Argument(format!("element type {other:?} has no reader"))),
        })
    }
}

fn transform(spec: Option<(String, f64, f64)>) -> ferrovae_core::Result<Option<Transform>> {
    let Some((draw, scale, shift)) = spec else { return Ok(None) };
    let draw = match draw.as_str() {
        "nothing" => Draw::Nothing,
        "binarize" => Draw::Binarize,
        "dequantize" => Draw::Dequantize,
        other => return Err(Error::Argument(format!("draw {other:?} is unknown"))),
    };
    Ok(Some(Transform { draw, scale, shift }))
}

/// One pass over an epoch. Slots are numbered; each is submitted, delivered in order, and submitted again.
#[pyclass]
struct Pipeline {
    // Declared first, so dropped first: its threads are gone before the memory they write.
    core: Core,
    owners: Vec<Option<Py<PyAny>>>,
    _source: Py<PyAny>,
}

#[pymethods]
impl Pipeline {
    /// `owner` keeps `data` and `labels` alive; `steps` are those of `(start, batch, drop_last, rank, world)`.
    #[new]
    #[pyo3(signature = (owner, name, element, data, width, labels, shuffle, seed, epoch, spec, steps, threads))]
    fn new(
        py: Python<'_>,
        owner: Py<PyAny>,
        name: String,
        element: &str,
        data: Span,
        width: usize,
        labels: Option<Span>,
        shuffle: bool,
        seed: u64,
        epoch: u64,
        spec: Option<(String, f64, f64)>,
        steps: (usize, usize, bool, usize, usize),
        threads: usize,
    ) -> PyResult<Self> {
        let source = source(element, data).map_err(to_python)?;
        // SAFETY: as in `source`.
        let labels = labels.map(|span| unsafe { memory::read::<i64>(span) });
        let transform = transform(spec).map_err(to_python)?;
        let core = py.detach(|| {
            let len = source.elements() / width.max(1);
            let order = if shuffle { Order::shuffled(len, seed, epoch) } else { Order::Identity };
            let draw_key = epoch_key(DRAW, seed, epoch);
            let plan = Plan { name, source, width, labels, order, transform, draw_key, level: simd::level() };
            let (start, batch, drop_last, rank, world) = steps;
            let schedule = Schedule { len, start, batch, drop_last, rank, world };
            // SAFETY: `owner` is held until the threads are joined.
            unsafe { Core::start(plan, schedule, threads) }
        });
        Ok(Self { core: core.map_err(to_python)?, owners: Vec::new(), _source: owner })
    }

    /// Steps submitted so far.
    #[getter]
    fn submitted(&self) -> usize {
        self.core.submitted()
    }

    /// Has the next step written into slot `number`, which is not in flight: addresses of x, index, label and valid,
    /// rows, and who keeps them alive. False when no step is left.
    fn submit(
        &mut self,
        number: usize,
        addresses: (usize, usize, usize, usize),
        capacity: usize,
        owner: Py<PyAny>,
    ) -> bool {
        let (x, index, label, valid) = addresses;
        if self.owners.len() <= number {
            self.owners.resize_with(number + 1, || None);
        }
        // SAFETY: the owner is held until Python submits this slot again, which it does only after its delivery.
        let submitted = unsafe { self.core.submit(Slot { x, index, label, valid, capacity }) };
        if submitted {
            self.owners[number] = Some(owner);
        }
        submitted
    }

    /// `(rows, examples of the global batch)` of a step, waited for; None when it was not submitted. May be asked for
    /// again until the next is.
    fn take(&self, py: Python<'_>, step: usize) -> PyResult<Option<(usize, usize)>> {
        loop {
            match py.detach(|| self.core.take(step, SIGNAL_INTERVAL)).map_err(to_python)? {
                Delivery::Batch(rows, examples) => return Ok(Some((rows, examples))),
                Delivery::Nothing => return Ok(None),
                Delivery::Late => py.check_signals()?,
            }
        }
    }

    /// Stops and joins the threads.
    fn close(&mut self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(idx_shape, module)?)?;
    module.add_function(wrap_pyfunction!(idx_read, module)?)?;
    module.add_function(wrap_pyfunction!(npy_header, module)?)?;
    module.add_class::<Pipeline>()
}
