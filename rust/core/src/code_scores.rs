//! Scores of rows against codes, a tile in registers at a time: what the operations over a softmax of codes share.
//!
//! Euclidean distances are summed in difference form, so neither a common offset nor a row that lies on a code costs
//! digits. Codes are packed in panels whose layout does not depend on the instruction set.

use crate::nearest_code::Metric;
use crate::simd::Lanes;
use crate::{Error, Result};

/// Codes of a panel.
pub(crate) const PANEL: usize = 64;
/// Codes whose sums a sink gets at once, at most.
pub(crate) const BLOCK: usize = 8 * PANEL;
/// Vectors of codes in a register tile.
const VECTORS: usize = 4;
/// Floats of codes that stay in the second-level cache while rows pass over them.
const CACHED: usize = 1 << 16;
/// Floats of rows treated together.
const CHUNK: usize = 1 << 14;

/// H heads of N rows and K codes of D dimensions.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// H.
    pub heads: usize,
    /// N, of each head.
    pub rows: usize,
    /// K, of each head.
    pub codes: usize,
    /// D.
    pub dims: usize,
}

impl Shape {
    /// Whether the slices of an operation have these sizes.
    pub(crate) fn check(self, operation: &str, x: usize, codebook: usize, bias: usize, rows: usize) -> Result<()> {
        let Self { heads, rows: each, codes, dims } = self;
        let fits = x == heads * each * dims && codebook == heads * codes * dims && bias == heads * codes;
        if fits && rows == heads * each && codes > 0 && dims > 0 {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "{operation}: {x} of x, {codebook} of the codebook, {bias} biases, {rows} rows do not fit {self:?}"
        )))
    }
}

/// score(x, k) = -distance(x, k) / temperature + bias[k], where the metric is Euclidean, its square or -x.e.
#[derive(Debug, Clone, Copy)]
pub struct Scoring {
    /// The distance.
    pub metric: Metric,
    /// 1 / temperature.
    pub inverse_temperature: f32,
}

impl Scoring {
    fn is_dot(self) -> bool {
        self.metric == Metric::Dot
    }

    /// Turns sums into distances in place.
    #[inline(always)]
    pub(crate) fn distances(self, sums: &mut [f32]) {
        let mut at = 0;
        match self.metric {
            Metric::Euclidean => {
                while at < sums.len() {
                    sums[at] = sums[at].sqrt();
                    at += 1;
                }
            }
            Metric::SquaredEuclidean => {}
            Metric::Dot | Metric::Cosine => {
                while at < sums.len() {
                    sums[at] = -sums[at];
                    at += 1;
                }
            }
        }
    }

    /// Turns sums into scores in place.
    #[inline(always)]
    pub(crate) fn scores(self, sums: &mut [f32], bias: &[f32]) {
        self.distances(sums);
        let bias = &bias[..sums.len()];
        let mut at = 0;
        while at < sums.len() {
            sums[at] = bias[at] - sums[at] * self.inverse_temperature;
            at += 1;
        }
    }
}

/// A head's codes, packed.
pub(crate) struct Codes {
    /// [panels][D][PANEL], padded with zeros.
    panels: Vec<f32>,
    /// [panels][PANEL], padded with -infinity.
    pub bias: Vec<f32>,
    dims: usize,
    count: usize,
}

impl Codes {
    /// From `codebook` [K, D] and `bias` [K].
    pub fn new(codebook: &[f32], bias: &[f32], dims: usize) -> Self {
        let count = bias.len();
        let panels = count.div_ceil(PANEL);
        let mut packed = vec![0.0; panels * dims * PANEL];
        for (panel, codes) in packed.chunks_exact_mut(dims * PANEL).zip(codebook.chunks(dims * PANEL)) {
            for (column, code) in codes.chunks_exact(dims).enumerate() {
                for (d, &value) in code.iter().enumerate() {
                    panel[d * PANEL + column] = value;
                }
            }
        }
        let mut padded = bias.to_vec();
        padded.resize(panels * PANEL, f32::NEG_INFINITY);
        Self { panels: packed, bias: padded, dims, count }
    }

    /// How many, without padding.
    pub fn len(&self) -> usize {
        self.count
    }
}

/// What becomes of a row's sums.
pub(crate) trait Sink {
    /// The sums (of squared differences, or of products) of row `row` and codes `first..first + sums.len()`, whole
    /// panels of them; for every row in the order of the codes.
    fn take<V: Lanes>(&mut self, row: usize, first: usize, sums: &mut [f32]);
}

/// Hands the sums of all rows of `x` [n, D] and all codes to the sink.
#[inline(always)]
pub(crate) fn scan<V: Lanes, S: Sink>(scoring: Scoring, x: &[f32], codes: &Codes, sink: &mut S) {
    // 32 registers hold 6 rows by 4 vectors of sums, 16 hold 2 by 4.
    match (V::COUNT == 16, scoring.is_dot()) {
        (true, false) => scan_tiles::<V, S, 6, true>(x, codes, sink),
        (true, true) => scan_tiles::<V, S, 6, false>(x, codes, sink),
        (false, false) => scan_tiles::<V, S, 2, true>(x, codes, sink),
        (false, true) => scan_tiles::<V, S, 2, false>(x, codes, sink),
    }
}

#[inline(always)]
fn scan_tiles<V: Lanes, S: Sink, const ROWS: usize, const DIFFERENCE: bool>(x: &[f32], codes: &Codes, sink: &mut S) {
    let dims = codes.dims;
    let panels = codes.bias.len() / PANEL;
    let step = (CACHED / (dims * PANEL)).clamp(1, BLOCK / PANEL);
    let chunk = (CHUNK / dims).clamp(1, 256).next_multiple_of(ROWS);
    let mut tiles = vec![[0.0; ROWS]; chunk / ROWS * dims];
    let mut sums = [[0.0; BLOCK]; ROWS];
    let (mut start, total) = (0, x.len() / dims);
    while start < total {
        let size = chunk.min(total - start);
        turn(&x[start * dims..(start + size) * dims], dims, &mut tiles);
        let mut first = 0;
        while first < panels {
            let count = step.min(panels - first);
            let mut row = 0;
            while row < size {
                let tile = &tiles[row / ROWS * dims..][..dims];
                let mut panel = 0;
                while panel < count {
                    let packed = &codes.panels[(first + panel) * dims * PANEL..][..dims * PANEL];
                    let mut column = 0;
                    while column < PANEL {
                        add_up::<V, ROWS, DIFFERENCE>(tile, packed, column, panel * PANEL + column, &mut sums);
                        column += VECTORS * V::COUNT;
                    }
                    panel += 1;
                }
                let mut lane = 0;
                while lane < ROWS && row + lane < size {
                    sink.take::<V>(start + row + lane, first * PANEL, &mut sums[lane][..count * PANEL]);
                    lane += 1;
                }
                row += ROWS;
            }
            first += count;
        }
        start += size;
    }
}

/// Rows [n, D] as [n / ROWS, D][ROWS]; what the last tile lacks keeps old values, whose sums nobody reads.
#[inline(always)]
fn turn<const ROWS: usize>(x: &[f32], dims: usize, tiles: &mut [[f32; ROWS]]) {
    for (row, values) in x.chunks_exact(dims).enumerate() {
        let tile = &mut tiles[row / ROWS * dims..][..dims];
        for (slot, &value) in tile.iter_mut().zip(values) {
            slot[row % ROWS] = value;
        }
    }
}

/// Sums of ROWS rows and `VECTORS` vectors of codes from `column` of the panel on, into `sums` from `to` on.
#[inline(always)]
fn add_up<V: Lanes, const ROWS: usize, const DIFFERENCE: bool>(
    tile: &[[f32; ROWS]],
    panel: &[f32],
    column: usize,
    to: usize,
    sums: &mut [[f32; BLOCK]; ROWS],
) {
    let mut totals = [[V::splat(0.0); ROWS]; VECTORS];
    let mut d = 0;
    while d < tile.len() {
        let codes = &panel[d * PANEL + column..][..VECTORS * V::COUNT];
        let mut values = [V::splat(0.0); ROWS];
        let mut row = 0;
        while row < ROWS {
            values[row] = V::splat(tile[d][row]);
            row += 1;
        }
        let mut vector = 0;
        while vector < VECTORS {
            let code = V::load(codes, vector * V::COUNT);
            let mut row = 0;
            while row < ROWS {
                let total = totals[vector][row];
                totals[vector][row] = if DIFFERENCE {
                    let difference = values[row].sub(code);
                    difference.mul_add(difference, total)
                } else {
                    values[row].mul_add(code, total)
                };
                row += 1;
            }
            vector += 1;
        }
        d += 1;
    }
    let mut row = 0;
    while row < ROWS {
        let mut vector = 0;
        while vector < VECTORS {
            totals[vector][row].store(&mut sums[row], to + vector * V::COUNT);
            vector += 1;
        }
        row += 1;
    }
}
