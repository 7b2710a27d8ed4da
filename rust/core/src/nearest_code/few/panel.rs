//! A panel: some codes side by side, and the scores of rows against them. Lanes are codes, so that a few rows fill them.

use std::borrow::Cow;

use super::Codes;
use crate::nearest_code::Metric;
use crate::nearest_code::scan::SPAN;
use crate::nearest_code::vector::Floats;

/// No panel has more codes.
pub(super) const MOST_CODES: usize = SPAN * 16;
/// Norms whose squares are above `LARGE`, and of cosines below `SMALL`, are left to the pass that scales its codes.
const LARGE: f32 = 1e30;
const SMALL: f32 = 1e-20;

/// Why the codebook cannot be searched here.
pub(super) struct Unfit;

/// score(x, k) = (x.code[k]) factor[k] + bias[k] for negated, centred rows.
pub(super) struct Panel {
    /// [D, codes of a panel].
    pub values: Vec<f32>,
    factors: [f32; MOST_CODES],
    biases: [f32; MOST_CODES],
    /// Whether any code of any panel so far was finite.
    pub any: bool,
    /// The largest squared norm (in float32) and factor of any panel so far.
    pub square: f32,
    pub factor: f32,
}

impl Panel {
    pub fn new<T: Floats>(codes: &Codes) -> Self {
        let width = SPAN * T::LANES;
        let values = vec![0.0; codes.dims * width];
        Self { values, factors: [1.0; MOST_CODES], biases: [0.0; MOST_CODES], any: false, square: 0.0, factor: 0.0 }
    }

    /// Takes the codes of panel `number`: transposed and centred, with their factors and biases.
    ///
    /// # Safety
    /// As [`crate::nearest_code::vector::Vector`].
    #[inline(always)]
    pub unsafe fn pack<T: Floats>(&mut self, codes: &Codes, number: usize) -> Result<(), Unfit> {
        let (dims, width) = (codes.dims, SPAN * T::LANES);
        let first = number * width;
        let size = (codes.size() - first).min(width);
        let mut source = Cow::Borrowed(&codes.codebook[first * dims..(first + size) * dims]);
        if size < width {
            // The last panel is filled up with its first code.
            let padding = source[..dims].repeat(width - size);
            source.to_mut().extend(padding);
        }
        let mut squares = [0.0_f32; MOST_CODES];
        // SAFETY: the caller's promise; `source` has `width` codes and `values` room for them.
        unsafe {
            for v in 0..SPAN {
                let to = self.values.as_mut_ptr().add(v * T::LANES);
                let from = &source[v * T::LANES * dims..][..T::LANES * dims];
                transpose::<T>(from, &codes.centre, to).store(squares.as_mut_ptr().add(v * T::LANES));
            }
        }
        let mut fine = true;
        let (mut largest, mut lane) = (self.square, 0);
        while lane < width {
            let square = squares[lane];
            fine &= square < LARGE;
            largest = if square > largest { square } else { largest };
            self.biases[lane] = if codes.metric.is_euclidean() { square * 0.5 } else { 0.0 };
            lane += 1;
        }
        if fine {
            self.any = true;
        } else {
            largest = self.omit(codes, &source, width, &mut squares)?;
        }
        self.square = largest;
        if codes.metric == Metric::Cosine {
            self.divide(&squares[..width])?;
        }
        self.biases[size..width].fill(f32::INFINITY);
        Ok(())
    }

    /// Codes with a NaN or an infinity never win: zeros, and a bias of infinity. Returns the largest squared norm.
    #[cold]
    fn omit(
        &mut self,
        codes: &Codes,
        source: &[f32],
        width: usize,
        squares: &mut [f32; MOST_CODES],
    ) -> Result<f32, Unfit> {
        let mut largest = self.square;
        for (lane, code) in source.chunks_exact(codes.dims).enumerate() {
            if squares[lane] < LARGE {
                largest = largest.max(squares[lane]);
                self.any = true;
                continue;
            }
            // With the dot product an infinity could win.
            let infinite = code.iter().any(|value| value.is_infinite()) && codes.metric == Metric::Dot;
            if infinite || code.iter().all(|value| value.is_finite()) {
                return Err(Unfit);
            }
            self.values.iter_mut().skip(lane).step_by(width).for_each(|value| *value = 0.0);
            (squares[lane], self.biases[lane]) = (0.0, f32::INFINITY);
        }
        Ok(largest)
    }

    /// The factors of the cosine: 1 / |e|, and 1 for zeros.
    fn divide(&mut self, squares: &[f32]) -> Result<(), Unfit> {
        for (lane, &square) in squares.iter().enumerate() {
            let zero = square < SMALL;
            if zero && self.values.iter().skip(lane).step_by(squares.len()).any(|&value| value != 0.0) {
                return Err(Unfit);
            }
            self.factors[lane] = if zero { 1.0 } else { 1.0 / square.sqrt() };
            self.factor = self.factor.max(self.factors[lane]);
        }
        Ok(())
    }

    /// Scores of R packed rows [D, R], one row after the other, each for `sink(row, v, scores)`.
    ///
    /// # Safety
    /// As [`crate::nearest_code::vector::Vector`]; `x` points to R rows of the panel's D.
    #[inline(always)]
    pub unsafe fn scores<T: Floats, const R: usize>(&self, x: *const f32, mut sink: impl FnMut(usize, usize, T)) {
        let mut products = [[[0.0_f32; 16]; SPAN]; R];
        // SAFETY: the caller's promise; no vector has more than 16 lanes.
        unsafe {
            self.products::<T, R>(x, &mut products);
            let load = |values: &[f32; MOST_CODES], v: usize| T::load(values.as_ptr().add(v * T::LANES));
            let factors = [load(&self.factors, 0), load(&self.factors, 1)];
            let biases = [load(&self.biases, 0), load(&self.biases, 1)];
            let mut row = 0;
            while row < R {
                let mut v = 0;
                while v < SPAN {
                    sink(row, v, biases[v].plus_product(T::load(products[row][v].as_ptr()), factors[v]));
                    v += 1;
                }
                row += 1;
            }
        }
    }

    /// Products of R packed rows with all codes. Apart from the scores, that the sums stay in registers.
    ///
    /// # Safety
    /// As [`Self::scores`].
    #[inline(always)]
    unsafe fn products<T: Floats, const R: usize>(&self, mut x: *const f32, out: &mut [[[f32; 16]; SPAN]; R]) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[T::splat(0.0); SPAN]; R];
            for codes in self.values.chunks_exact(SPAN * T::LANES) {
                let (left, right) = (T::load(codes.as_ptr()), T::load(codes.as_ptr().add(T::LANES)));
                let mut row = 0;
                while row < R {
                    let value = T::splat(*x.add(row));
                    sums[row][0] = sums[row][0].plus_product(left, value);
                    sums[row][1] = sums[row][1].plus_product(right, value);
                    row += 1;
                }
                x = x.add(R);
            }
            let mut row = 0;
            while row < R {
                sums[row][0].store(out[row][0].as_mut_ptr());
                sums[row][1].store(out[row][1].as_mut_ptr());
                row += 1;
            }
        }
    }
}

/// One vector of codes less their centre, `to` [D, at steps of a panel]; returns their squared norms.
///
/// # Safety
/// As [`crate::nearest_code::vector::Vector`]; `to` has room for D steps of a panel.
#[inline(always)]
unsafe fn transpose<T: Floats>(codes: &[f32], centre: &[f32], to: *mut f32) -> T {
    let (dims, step) = (centre.len(), SPAN * T::LANES);
    // SAFETY: the caller's promise; a dimension is below D.
    unsafe {
        let (mut squares, one) = ([T::splat(0.0); 4], T::splat(1.0));
        let mut d = 0;
        while d + 4 <= dims {
            let columns = T::columns(codes.as_ptr().add(d), dims);
            let mut c = 0;
            while c < 4 {
                // e - c, rounded once.
                let value = columns[c].plus_product(T::splat(-*centre.get_unchecked(d + c)), one);
                value.store(to.add((d + c) * step));
                squares[c] = squares[c].plus_product(value, value);
                c += 1;
            }
            d += 4;
        }
        while d < dims {
            let column = to.add(d * step);
            for lane in 0..T::LANES {
                *column.add(lane) = codes[lane * dims + d] - centre[d];
            }
            let value = T::load(column);
            squares[0] = squares[0].plus_product(value, value);
            d += 1;
        }
        let halves = [squares[0].plus_product(squares[1], one), squares[2].plus_product(squares[3], one)];
        halves[0].plus_product(halves[1], one)
    }
}
