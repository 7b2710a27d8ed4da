//! The one mapping from core errors to Python exceptions.

use ferrovae_core::Error;
use pyo3::PyErr;
use pyo3::exceptions::PyValueError;

pyo3::create_exception!(ferrovae.data, DataError, PyValueError, "A file or dataset that is not what it should be.");

/// `ValueError` for arguments, `ferrovae.data.DataError` for data.
pub fn to_python(error: Error) -> PyErr {
    match error {
        Error::Argument(message) => PyValueError::new_err(message),
        Error::Data(message) => DataError::new_err(message),
    }
}
