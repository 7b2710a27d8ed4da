//! IDX, the format of MNIST and its successors: magic `00 00 type dimensions`, big-endian u32 sizes, then the data.

use std::ops::RangeInclusive;
use std::path::Path;

use super::gzip::Input;
use crate::{Error, Result};

const UNSIGNED_BYTE: u8 = 0x08;

/// The sizes a file declares, checked against what the file can hold before anything is allocated.
pub fn shape(path: &Path, dimensions: RangeInclusive<u8>) -> Result<Vec<usize>> {
    header(&mut Input::open(path)?, &dimensions)
}

/// Reads the elements into `out`, whose length is the product of `shape`; the file ends exactly there.
pub fn read(path: &Path, shape: &[usize], out: &mut [u8]) -> Result<()> {
    let mut input = Input::open(path)?;
    let rank = shape.len() as u8;
    let found = header(&mut input, &(rank..=rank))?;
    if found != shape || found.iter().product::<usize>() != out.len() {
        return Err(Error::Data(format!("{}: changed while it was read", input.name())));
    }
    input.fill(out, &format!("a header and {} elements", describe(shape)))?;
    input.finish()
}

fn header(input: &mut Input, dimensions: &RangeInclusive<u8>) -> Result<Vec<usize>> {
    let mut magic = [0u8; 4];
    input.fill(&mut magic, "the magic number")?;
    let [zero, one, element, rank] = magic;
    if (zero, one, element) != (0, 0, UNSIGNED_BYTE) || !dimensions.contains(&rank) {
        let expected = if dimensions.start() == dimensions.end() {
            format!("0x000008{:02x}", dimensions.start())
        } else {
            format!("0x000008{:02x} to 0x000008{:02x}", dimensions.start(), dimensions.end())
        };
        return Err(Error::Data(format!(
            "{}: magic number is 0x{:08x}, expected {expected} (IDX of unsigned bytes)",
            input.name(),
            u32::from_be_bytes(magic),
        )));
    }
    let mut shape = Vec::with_capacity(rank.into());
    for _ in 0..rank {
        let mut size = [0u8; 4];
        input.fill(&mut size, "the sizes")?;
        shape.push(u32::from_be_bytes(size) as usize);
    }
    check_size(input, &shape)?;
    Ok(shape)
}

fn check_size(input: &Input, shape: &[usize]) -> Result<()> {
    let (name, sizes) = (input.name(), describe(shape));
    let header = 4 + 4 * shape.len() as u64;
    let total = shape
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size as u64))
        .and_then(|elements| elements.checked_add(header))
        .filter(|&total| usize::try_from(total).is_ok())
        .ok_or_else(|| Error::Data(format!("{name}: declares {sizes} elements, more than memory can address")))?;
    if shape.contains(&0) {
        return Err(Error::Data(format!("{name}: declares {sizes} elements, expected at least one")));
    }
    let capacity = input.capacity();
    if input.is_gzip() {
        if total > capacity {
            return Err(Error::Data(format!(
                "{name}: declares {sizes} elements ({total} bytes), but its gzip stream can hold {capacity} at most"
            )));
        }
    } else if total != capacity {
        let kind = if capacity < total { "truncated" } else { "too long" };
        return Err(Error::Data(format!(
            "{name}: {kind}: {capacity} bytes, expected {total} for {sizes} elements and their header"
        )));
    }
    Ok(())
}

fn describe(shape: &[usize]) -> String {
    shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::fs;
    use std::io::Write;
    use std::path::PathBuf;

    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str, contents: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("ferrovae-idx-{}-{name}", std::process::id()));
            fs::write(&path, contents).unwrap();
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn idx(shape: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, shape.len() as u8];
        bytes.extend(shape.iter().flat_map(|size| size.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn load(name: &str, contents: &[u8]) -> Result<(Vec<usize>, Vec<u8>)> {
        let file = Temporary::new(name, contents);
        let shape = shape(&file.0, 1..=4)?;
        let mut out = vec![0; shape.iter().product()];
        read(&file.0, &shape, &mut out)?;
        Ok((shape, out))
    }

    #[test]
    fn reads_plain_and_gzip() {
        let data: Vec<u8> = (0..24).collect();
        let bytes = idx(&[2, 3, 4], &data);
        assert_eq!(load("plain", &bytes), Ok((vec![2, 3, 4], data.clone())));
        assert_eq!(load("gzip", &gzip(&bytes)), Ok((vec![2, 3, 4], data.clone())));
        let members = [gzip(&bytes[..20]), gzip(&bytes[20..])].concat();
        assert_eq!(load("members", &members), Ok((vec![2, 3, 4], data)));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = idx(&[2, 3, 4], &[7; 24]);
        let packed = gzip(&bytes);
        for (name, whole) in [("cut-plain", &bytes), ("cut-gzip", &packed)] {
            for end in 0..whole.len() {
                let error = load(name, &whole[..end]).unwrap_err().to_string();
                assert!(error.contains(name), "{error}");
            }
        }
    }

    /// Padding bits inside the stream mean nothing; any other flip is noticed.
    #[test]
    fn a_flipped_bit_never_gives_other_data() {
        let data: Vec<u8> = (0..300).map(|i| (i * i % 251) as u8).collect();
        let packed = gzip(&idx(&[3, 100], &data));
        let mut noticed = 0;
        for bit in 10 * 8..packed.len() * 8 {
            let mut broken = packed.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            match load("flip", &broken) {
                Ok(read) => assert_eq!(read, (vec![3, 100], data.clone()), "bit {bit}"),
                Err(_) => noticed += 1,
            }
        }
        assert!(noticed >= packed.len() * 8 - 10 * 8 - 7);
    }

    #[test]
    fn sizes_are_checked_before_memory_is_taken() {
        let huge = idx(&[u32::MAX, u32::MAX, u32::MAX], &[]);
        for (name, bytes) in [("huge", huge.clone()), ("huge-gzip", gzip(&huge))] {
            assert!(load(name, &bytes).unwrap_err().to_string().contains("more than memory"));
        }
        let large = gzip(&idx(&[4_000_000, 784], &[]));
        assert!(load("large", &large).unwrap_err().to_string().contains("can hold"));
        let long = [idx(&[2], &[1, 2, 3]), gzip(&idx(&[2], &[1, 2, 3]))];
        assert!(long.iter().all(|bytes| load("long", bytes).unwrap_err().to_string().contains("too long")));
        assert!(load("none", &idx(&[0, 28], &[])).unwrap_err().to_string().contains("at least one"));
    }
}
