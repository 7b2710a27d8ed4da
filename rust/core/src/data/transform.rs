//! What happens to an example on its way into a batch.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::keys::RowKey;
use super::rows;
use crate::simd::Level;

/// The random part of a transform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draw {
    /// Nothing is drawn: bytes become x / 255, floats stay.
    Nothing,
    /// 1 with probability x (bytes: x / 255), else 0.
    Binarize,
    /// (x + u) / 256 with u uniform on [0, 1); for bytes only.
    Dequantize,
}

/// A draw, then `value * scale + shift`; always to f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transform {
    /// The random part.
    pub draw: Draw,
    /// Factor of the unit value.
    pub scale: f64,
    /// Added last.
    pub shift: f64,
}

/// An element type a dataset can have.
pub trait Element: Copy {
    /// Applies `transform` to one example.
    fn transform(source: &[Self], out: &mut [f32], transform: &Transform, key: RowKey, level: Level);
    /// Whether the value is a number: false for NaN and the infinities.
    fn is_finite(self) -> bool;
}

impl Element for u8 {
    fn transform(source: &[u8], out: &mut [f32], transform: &Transform, key: RowKey, level: Level) {
        let Transform { draw, scale, shift } = *transform;
        match draw {
            Draw::Nothing => rows::scale_bytes(level, source, out, rows::ByteScale::new(scale, shift)),
            Draw::Binarize => {
                rows::binarize_bytes(level, source, out, key, (scale + shift) as f32, shift as f32);
            }
            Draw::Dequantize => rows::dequantize_bytes(level, source, out, key, scale as f32, shift as f32),
        }
    }

    #[inline]
    fn is_finite(self) -> bool {
        true
    }
}

macro_rules! float_element {
    ($type:ty, $convert:expr) => {
        impl Element for $type {
            fn transform(source: &[Self], out: &mut [f32], transform: &Transform, key: RowKey, level: Level) {
                let convert: fn(&[Self], &mut [f32]) = $convert;
                convert(source, out);
                transform_floats(out, transform, key, level);
            }

            #[inline]
            fn is_finite(self) -> bool {
                <$type>::is_finite(self)
            }
        }
    };
}

float_element!(f32, |source, out| out.copy_from_slice(source));
float_element!(f64, |source, out| out.iter_mut().zip(source).for_each(|(y, &x)| *y = x as f32));
float_element!(f16, |source, out| source.convert_to_f32_slice(out));
float_element!(bf16, |source, out| source.convert_to_f32_slice(out));

fn transform_floats(out: &mut [f32], transform: &Transform, key: RowKey, level: Level) {
    let (scale, shift) = (transform.scale as f32, transform.shift as f32);
    match transform.draw {
        Draw::Binarize => {
            rows::binarize_floats(level, out, key, (transform.scale + transform.shift) as f32, shift);
        }
        // Dequantisation of floats is refused by the caller.
        Draw::Nothing | Draw::Dequantize => {
            if (transform.scale, transform.shift) != (1.0, 0.0) {
                rows::scale_floats(level, out, scale, shift);
            }
        }
    }
}
