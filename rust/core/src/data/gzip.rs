//! Reading a file that may be gzipped, never further than the caller asks.

use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use crate::{Error, Result};

/// DEFLATE cannot expand by more than this: what a stream of a given size can hold at most.
pub const MAX_RATIO: u64 = 1032;

/// A file's contents, unpacked when its first bytes say gzip.
pub struct Input {
    name: String,
    size: u64,
    taken: u64,
    source: Source,
}

enum Source {
    Plain(BufReader<File>),
    Gzip(Box<MultiGzDecoder<BufReader<File>>>),
}

impl Input {
    /// Opens `path`, which is not empty.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |error: std::io::Error| Error::Data(format!("{name}: cannot be read ({error})"));
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::Data(format!("{name}: is not a file")));
        }
        let size = metadata.len();
        if size == 0 {
            return Err(Error::Data(format!("{name}: is empty, expected a header and data")));
        }
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let start = reader.fill_buf().map_err(failed)?;
        let source = if start.starts_with(&[0x1f, 0x8b]) {
            Source::Gzip(Box::new(MultiGzDecoder::new(reader)))
        } else {
            Source::Plain(reader)
        };
        Ok(Self { name, size, taken: 0, source })
    }

    /// The path, as messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The most bytes the contents can have: the length of a plain file, a bound for a gzipped one.
    pub fn capacity(&self) -> u64 {
        match self.source {
            Source::Plain(_) => self.size,
            Source::Gzip(_) => self.size.saturating_mul(MAX_RATIO),
        }
    }

    /// Whether the file is gzipped.
    pub fn is_gzip(&self) -> bool {
        matches!(self.source, Source::Gzip(_))
    }

    /// Fills `out`; an error says what the bytes are (`what`) and how many were expected.
    pub fn fill(&mut self, out: &mut [u8], what: &str) -> Result<()> {
        let mut filled = 0;
        while filled < out.len() {
            let got = self.some(&mut out[filled..])?;
            if got == 0 {
                return Err(Error::Data(format!(
                    "{}: truncated: ends after {} bytes{}, expected {} ({what})",
                    self.name,
                    self.taken,
                    if self.is_gzip() { " unpacked" } else { "" },
                    self.taken + (out.len() - filled) as u64,
                )));
            }
            filled += got;
        }
        Ok(())
    }

    /// Checks that nothing follows; for gzip this reaches the trailer, so the checksum is verified.
    pub fn finish(&mut self) -> Result<()> {
        let taken = self.taken;
        if self.some(&mut [0])? == 0 {
            return Ok(());
        }
        Err(Error::Data(match self.source {
            Source::Plain(_) => format!("{}: too long: {} bytes, expected {taken}", self.name, self.size),
            Source::Gzip(_) => format!("{}: too long: unpacks to more than the {taken} bytes expected", self.name),
        }))
    }

    fn some(&mut self, out: &mut [u8]) -> Result<usize> {
        let read = match &mut self.source {
            Source::Plain(reader) => reader.read(out),
            Source::Gzip(decoder) => decoder.read(out),
        };
        match read {
            Ok(count) => {
                self.taken += count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => self.some(out),
            Err(error) if self.is_gzip() && error.kind() == ErrorKind::UnexpectedEof => Err(Error::Data(format!(
                "{}: truncated: the gzip stream of {} bytes is cut off after {} bytes unpacked, expected its trailer",
                self.name, self.size, self.taken
            ))),
            Err(error) if self.is_gzip() => Err(Error::Data(format!(
                "{}: corrupt gzip stream after {} bytes unpacked, expected a valid stream and checksum ({error})",
                self.name, self.taken
            ))),
            Err(error) => Err(Error::Data(format!("{}: cannot be read ({error})", self.name))),
        }
    }
}
