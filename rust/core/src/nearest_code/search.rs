//! Searching a run of rows: the fast pass, its certificate, and float64 for what it leaves undecided.

use super::Metric;
use super::codebook::Prepared;
use super::decide::{self, Row, Undecided};
use super::exact;
use super::few;
use super::integer::IntegerCodes;
use super::passes::{FastPass, FloatPass};
use super::scan::{MOST_ROWS, SPAN};
use super::vector::Floats;
use crate::simd::Level;

/// Floats of the rows treated together, and the most tiles of them.
const CHUNK: usize = 64 * 1024;
const MOST_TILES: usize = 32;
/// Below this many rows a head that is not searched by [`few`] is searched in float64 at once.
const FEW_ROWS: usize = 4;
/// From this many rows on it pays to round the codes to integers.
const MANY_ROWS: usize = 64;

/// One head: its codebook as it came [K, D] and prepared.
pub(crate) struct Head<'a> {
    pub metric: Metric,
    pub codebook: &'a [f32],
    pub dims: usize,
    /// Absent where float32 cannot be trusted, or too few rows would repay preparing.
    pub prepared: Option<Prepared>,
    /// Whether [`few`] searches it.
    pub few: bool,
}

impl<'a> Head<'a> {
    /// For searches of so many rows, `count` codes each, with the kernels of `level`.
    pub fn new(level: Level, metric: Metric, codebook: &'a [f32], dims: usize, (rows, count): (usize, usize)) -> Self {
        let few = few::pays((rows, count), codebook.len() / dims, dims);
        Self::of(level, metric, codebook, dims, (rows, count), few)
    }

    /// The same, searched as few rows are or not.
    pub(super) fn of(
        level: Level,
        metric: Metric,
        codebook: &'a [f32],
        dims: usize,
        (rows, count): (usize, usize),
        few: bool,
    ) -> Self {
        if few {
            return Self { metric, codebook, dims, prepared: None, few };
        }
        let group = if level >= Level::Avx512F { 8 } else { 4 };
        let mut prepared = (rows >= FEW_ROWS).then(|| Prepared::new(metric, codebook, dims, group)).flatten();
        let pays = level == Level::Avx512 && rows >= MANY_ROWS && count == 1;
        if let Some(prepared) = prepared.as_mut().filter(|_| pays) {
            prepared.integers = IntegerCodes::new::<8>(prepared);
        }
        Self { metric, codebook, dims, prepared, few }
    }

    pub(super) fn size(&self) -> usize {
        self.codebook.len() / self.dims
    }
}

/// The `count` nearest codes of every row of `x` [n, D] into `out` [n, count]; `threads` serve few rows only.
pub(crate) fn search(level: Level, head: &Head, x: &[f32], count: usize, out: &mut [i64], threads: usize) {
    let Head { metric, codebook, dims, few, .. } = *head;
    if few {
        if few::search(level, metric, codebook, x, dims, out, threads) {
            return;
        }
        let head = Head::of(level, metric, codebook, dims, (out.len(), 1), false);
        return search(level, &head, x, count, out, 1);
    }
    let Some(prepared) = &head.prepared else { return search_exactly(head, x, count, out) };
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx2 => unsafe { search_avx2(head, prepared, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512F => unsafe { search_avx512f(head, prepared, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512 => unsafe { search_avx512(head, prepared, x, count, out) },
        // SAFETY: portable vectors need no instruction set.
        _ => unsafe {
            search_with::<super::vector::Portable, 4>(head, prepared, x, count, out, &mut FloatPass::new());
        },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn search_avx2(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx2, 4>(head, prepared, x, count, out, &mut FloatPass::new()) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn search_avx512f(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx512, 8>(head, prepared, x, count, out, &mut FloatPass::new()) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
unsafe fn search_avx512(head: &Head, prepared: &Prepared, x: &[f32], count: usize, out: &mut [i64]) {
    let mut pass = super::passes::IntegerPass::<super::pairs::Vnni>::new(prepared.integers.as_ref());
    // SAFETY: this function enables the instruction set.
    unsafe { search_with::<super::vector::Avx512, 8>(head, prepared, x, count, out, &mut pass) }
}

/// Every row against every code in float64.
fn search_exactly(head: &Head, x: &[f32], count: usize, out: &mut [i64]) {
    for (row, out) in x.chunks_exact(head.dims).zip(out.chunks_exact_mut(count)) {
        exact::nearest_of(head.metric, row, head.codebook, 0..head.size(), out);
    }
}

/// Rows that are treated together.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a> {
    pub head: &'a Head<'a>,
    pub prepared: &'a Prepared,
    /// [n, D], as they came.
    pub x: &'a [f32],
    /// [tiles][D, SPAN * LANES], packed.
    pub packed: &'a [f32],
    /// [tiles]: norms of packed rows, and how far their float32 scores may be from the truth.
    pub norms: &'a [[f64; MOST_ROWS]],
    pub errors: &'a [[f64; MOST_ROWS]],
}

impl Chunk<'_> {
    /// One of its rows, in tiles of `width`.
    #[inline(always)]
    pub fn row(&self, row: usize, width: usize, margin: f64) -> Row<'_> {
        let dims = self.head.dims;
        let column = &self.packed[row / width * dims * width + row % width..];
        Row { x: &self.x[row * dims..][..dims], column, width, margin }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.x.len() / self.head.dims
    }
}

/// # Safety
/// As [`super::vector::Vector`], and `prepared` was packed in groups of CODES.
#[inline(always)]
pub(super) unsafe fn search_with<T: Floats, const CODES: usize>(
    head: &Head,
    prepared: &Prepared,
    x: &[f32],
    count: usize,
    out: &mut [i64],
    pass: &mut impl FastPass<T, CODES>,
) {
    let dims = head.dims;
    let width = SPAN * T::LANES;
    let most = (CHUNK / (dims * width)).clamp(1, MOST_TILES).min((x.len() / dims).div_ceil(width)).max(1);
    let mut packed = vec![0.0; most * dims * width];
    let mut norms = vec![[0.0; MOST_ROWS]; most];
    let mut errors = vec![[0.0; MOST_ROWS]; most];
    let mut undecided: Vec<Undecided> = Vec::new();
    let (mut x, mut out) = (x, out);
    let mut tiles = if count == 1 { pass.tiles_at_first(most) } else { most };
    while !x.is_empty() {
        let rows = (x.len() / dims).min(tiles * width);
        let (these, others) = x.split_at(rows * dims);
        let (results, more) = out.split_at_mut(rows * count);
        let tiles_of_rows = these.chunks(width * dims).zip(packed.chunks_exact_mut(dims * width));
        for (((x, tile), norms), errors) in tiles_of_rows.zip(&mut norms).zip(&mut errors) {
            // SAFETY: the caller's promise.
            *norms = unsafe { prepared.pack::<T>(x, tile) };
            *errors = prepared.errors(norms);
        }
        let chunk = Chunk { head, prepared, x: these, packed: &packed, norms: &norms, errors: &errors };
        undecided.clear();
        // SAFETY: the caller's promise.
        unsafe {
            if count == 1 {
                pass.run(&chunk, results, &mut undecided);
            } else {
                let error = |row: usize| errors[row / width][row % width];
                undecided.extend((0..rows).map(|row| Undecided { row, error: error(row), limit: f32::INFINITY }));
            }
            decide::decide::<T, CODES>(&chunk, &undecided, count, results);
        }
        (x, out, tiles) = (others, more, most);
    }
}
