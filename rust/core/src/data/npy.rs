//! The header of NumPy's `.npy` format, versions 1 to 3: what the elements are, their order, shape and offset.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// Far beyond any header of a plain array.
const MAX_HEADER: usize = 1 << 16;

/// What a file declares, checked against its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// NumPy's letter: `u`, `i`, `f`, `b`.
    pub kind: char,
    /// Bytes of an element.
    pub size: usize,
    /// Whether the elements have the most significant byte first.
    pub big_endian: bool,
    /// Whether the first axis varies fastest.
    pub fortran_order: bool,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// Where the elements start.
    pub offset: usize,
}

/// Reads and checks the header of `path`.
pub fn header(path: &Path) -> Result<Header> {
    let name = path.display().to_string();
    let failed = |error: std::io::Error| Error::Data(format!("{name}: cannot be read ({error})"));
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut start = Vec::new();
    file.take(12 + MAX_HEADER as u64).read_to_end(&mut start).map_err(failed)?;
    parse(&start, length).map_err(|message| Error::Data(format!("{name}: {message}")))
}

/// The header at the start of a file of `length` bytes.
fn parse(start: &[u8], length: u64) -> std::result::Result<Header, String> {
    if start.is_empty() {
        return Err("is empty, expected a .npy header".into());
    }
    if !start.starts_with(b"\x93NUMPY") {
        let found = String::from_utf8_lossy(&start[..start.len().min(6)]).escape_default().to_string();
        return Err(format!("starts with \"{found}\", expected \"\\x93NUMPY\" (a .npy file)"));
    }
    let truncated = || format!("truncated: {length} bytes do not hold the .npy header");
    let version = *start.get(6).ok_or_else(truncated)?;
    let (text_start, text_length) = match (version, start) {
        (1, [_, _, _, _, _, _, _, _, a, b, ..]) => (10, u64::from(u16::from_le_bytes([*a, *b]))),
        (2 | 3, [_, _, _, _, _, _, _, _, a, b, c, d, ..]) => (12, u64::from(u32::from_le_bytes([*a, *b, *c, *d]))),
        (1..=3, _) => return Err(truncated()),
        _ => return Err(format!(".npy version is {version}, expected 1, 2 or 3")),
    };
    if text_length > MAX_HEADER as u64 {
        return Err(format!("declares a header of {text_length} bytes, expected at most {MAX_HEADER}"));
    }
    let offset = text_start + text_length as usize;
    let text = start.get(text_start..offset).ok_or_else(truncated)?;
    let text = std::str::from_utf8(text).map_err(|_| "its header is not text".to_string())?;
    let header = Header { offset, ..fields(text)? };
    check_length(&header, length)?;
    Ok(header)
}

fn check_length(header: &Header, length: u64) -> std::result::Result<(), String> {
    let expected = header
        .shape
        .iter()
        .try_fold(header.size as u64, |product, &size| product.checked_mul(size as u64))
        .and_then(|bytes| bytes.checked_add(header.offset as u64))
        .filter(|&bytes| usize::try_from(bytes).is_ok());
    let shape = &header.shape;
    match expected {
        None => Err(format!("declares shape {shape:?}, more than memory can address")),
        Some(expected) if expected == length => Ok(()),
        Some(expected) => {
            let kind = if length < expected { "truncated" } else { "too long" };
            Err(format!("{kind}: {length} bytes, expected {expected} for shape {shape:?}"))
        }
    }
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`
fn fields(text: &str) -> std::result::Result<Header, String> {
    let malformed = || format!("its header is {:?}, expected descr, fortran_order and shape", text.trim_end());
    let value = |key: &str| {
        let at = text.find(&format!("'{key}'"))? + key.len() + 2;
        text[at..].trim_start().strip_prefix(':').map(str::trim_start)
    };
    let descr = value("descr").ok_or_else(malformed)?;
    let Some(quoted) = descr.strip_prefix('\'').and_then(|rest| rest.split_once('\'')).map(|(inner, _)| inner) else {
        return Err("holds a structured array, expected numbers; save the field you need on its own".into());
    };
    let fortran = value("fortran_order").ok_or_else(malformed)?;
    let fortran_order = match (fortran.starts_with("True"), fortran.starts_with("False")) {
        (true, _) => true,
        (_, true) => false,
        _ => return Err(malformed()),
    };
    let shape = value("shape").and_then(|rest| rest.strip_prefix('(')).and_then(|rest| rest.split_once(')'));
    let shape = shape
        .ok_or_else(malformed)?
        .0
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty())
        .map(|size| size.parse::<usize>().map_err(|_| malformed()))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let mut letters = quoted.chars();
    let (order, kind) = (letters.next().ok_or_else(malformed)?, letters.next().ok_or_else(malformed)?);
    if kind == 'O' {
        return Err("holds Python objects (pickled), expected numbers; they are never unpickled: load the file \
                    yourself and save a numeric array"
            .into());
    }
    let size = letters.as_str().parse().map_err(|_| malformed())?;
    if !"<>|=".contains(order) {
        return Err(malformed());
    }
    Ok(Header { kind, size, big_endian: order == '>', fortran_order, shape, offset: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(version: u8, dictionary: &str, data: usize) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        if version == 1 {
            bytes.extend((dictionary.len() as u16).to_le_bytes());
        } else {
            bytes.extend((dictionary.len() as u32).to_le_bytes());
        }
        bytes.extend(dictionary.as_bytes());
        bytes.extend(vec![0; data]);
        bytes
    }

    fn parsed(bytes: &[u8]) -> std::result::Result<Header, String> {
        parse(bytes, bytes.len() as u64)
    }

    #[test]
    fn reads_every_version() {
        for version in 1..=3 {
            let text = "{'descr': '>f8', 'fortran_order': True, 'shape': (3, 4), }   \n";
            let header = parsed(&file(version, text, 96)).unwrap();
            let offset = text.len() + if version == 1 { 10 } else { 12 };
            let expected =
                Header { kind: 'f', size: 8, big_endian: true, fortran_order: true, shape: vec![3, 4], offset };
            assert_eq!(header, expected);
        }
        assert_eq!(parsed(&file(1, "{'shape': (5,), 'fortran_order': False, 'descr': '|u1'}", 5)).unwrap().shape, [5]);
    }

    #[test]
    fn says_what_is_wrong() {
        let dictionary =
            |descr: &str, shape: &str| format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}");
        for (bytes, message) in [
            (Vec::new(), "is empty"),
            (b"PK\x03\x04rest".to_vec(), "expected \"\\x93NUMPY\""),
            (b"\x93NUM".to_vec(), "expected \"\\x93NUMPY\""),
            (b"\x93NUMPY\x01\x00".to_vec(), "truncated"),
            (file(9, "{}", 0), "version is 9"),
            (file(2, "{}", 0)[..12].to_vec(), "truncated"),
            (file(1, "{}", 0), "expected descr"),
            (file(1, &dictionary("'|O'", "(1,)"), 8), "pickled"),
            (file(1, &dictionary("[('a', '<f4')]", "(1,)"), 4), "structured"),
            (file(1, &dictionary("'<f4'", "(3,)"), 11), "truncated"),
            (file(1, &dictionary("'<f4'", "(3,)"), 13), "too long"),
            (file(1, &dictionary("'<f4'", "(-3,)"), 12), "expected descr"),
            (file(1, &dictionary("'<f4'", "(4611686018427387904, 16)"), 0), "more than memory"),
        ] {
            let error = parsed(&bytes).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,80}", version in 0u8..5, data in 0usize..40) {
            let _ = parsed(&file(version, &text, data));
        }
    }
}
