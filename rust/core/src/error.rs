//! The one error type: bad arguments, bad data, and the operating system's own failures.

use std::fmt;

/// What went wrong, in one sentence that names the argument or the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A caller broke a contract that the Python layer checks (a `ValueError` there).
    Argument(String),
    /// A file or a dataset is not what it should be (a `ferrovae.data.DataError` there).
    Data(String),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument(message) | Self::Data(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
