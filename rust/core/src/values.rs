//! Slices whose element type is known at run time, read and written as `f32` a block at a time.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Numbers to be computed with in `f32`.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of an `f32`.
    Bf16(&'a [bf16]),
    /// Bytes; also booleans, as 0 and 1.
    U8(&'a [u8]),
}

impl<'a> Values<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::U8(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `length` values from `start` on, converted into `scratch` where they are not `f32` already.
    #[inline]
    pub fn block<'b>(&self, start: usize, length: usize, scratch: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        let range = start..start + length;
        let converted = &mut scratch[..length];
        match self {
            Self::F32(values) => return &values[range],
            Self::F16(values) => values[range].convert_to_f32_slice(converted),
            Self::Bf16(values) => values[range].convert_to_f32_slice(converted),
            Self::U8(values) => {
                for (to, &from) in converted.iter_mut().zip(&values[range]) {
                    *to = f32::from(from);
                }
            }
        }
        converted
    }
}

/// Room for numbers computed in `f32`.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// As they are.
    F32(&'a mut [f32]),
    /// Rounded to IEEE half precision.
    F16(&'a mut [f16]),
    /// Rounded to the upper half of an `f32`.
    Bf16(&'a mut [bf16]),
}

impl ValuesMut<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes `block` from `start` on.
    #[inline]
    pub fn write(&mut self, start: usize, block: &[f32]) {
        let range = start..start + block.len();
        match self {
            Self::F32(values) => values[range].copy_from_slice(block),
            Self::F16(values) => values[range].convert_from_f32_slice(block),
            Self::Bf16(values) => values[range].convert_from_f32_slice(block),
        }
    }

    /// The first `count`, and the others.
    pub fn split_at_mut(self, count: usize) -> (Self, Self) {
        match self {
            Self::F32(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F32(head), Self::F32(tail))
            }
            Self::F16(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F16(head), Self::F16(tail))
            }
            Self::Bf16(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::Bf16(head), Self::Bf16(tail))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::float_cmp)]
    fn every_type_is_read_and_written_as_f32() {
        let truth = [0.0, 1.0, 3.0, 255.0, 7.0];
        let (halves, brains) = (truth.map(f16::from_f32), truth.map(bf16::from_f32));
        let mut scratch = [f32::NAN; 8];
        let sources =
            [Values::F32(&truth), Values::F16(&halves), Values::Bf16(&brains), Values::U8(&[0, 1, 3, 255, 7])];
        for source in sources {
            assert_eq!((source.len(), source.is_empty()), (5, false));
            assert_eq!(source.block(1, 3, &mut scratch), &truth[1..4]);
        }
        let (mut one, mut two, mut three) = ([0.0; 5], [f16::ZERO; 5], [bf16::ZERO; 5]);
        for target in [ValuesMut::F32(&mut one), ValuesMut::F16(&mut two), ValuesMut::Bf16(&mut three)] {
            assert_eq!((target.len(), target.is_empty()), (5, false));
            let (mut head, mut tail) = target.split_at_mut(2);
            head.write(0, &truth[..2]);
            tail.write(1, &truth[3..]);
        }
        assert_eq!(one, [0.0, 1.0, 0.0, 255.0, 7.0]);
        assert_eq!((two.map(f16::to_f32), three.map(bf16::to_f32)), (one, one));
    }
}
