//! A panel: 16 rows of weights as they lie in a file, and where they go unpacked.

use quant::format::GROUP;

use super::vector::Simd;

/// Rows of a panel: the lanes of a vector.
pub(super) const ROWS: usize = 16;
/// Bytes of codes per group of a panel.
pub(super) const CODE_BYTES: usize = GROUP * ROWS;

/// Where a panel's chunk of k goes.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// `[groups][8][16][4]`
    pub codes: *mut u8,
    /// `[groups][HALVES][16]`
    pub scale: *mut [f32; ROWS],
    /// `[groups][HALVES][16]`, untouched by formats without offsets.
    pub offset: *mut [f32; ROWS],
}

/// With each line that is fetched into the first-level cache, the line this far behind it is fetched into the second-level
/// one: a core can have too few misses of its first-level cache under way to keep memory busy. (Measured on Zen 4: a third
/// more bytes a second; half or twice the distance is no better.)
pub(super) const FAR_BYTES: usize = 16 * 1024;

/// Memory that will be needed soon, prefetched a few lines with each call of [`columns`]: many lines at once would fill
/// the queue of misses, and loads behind them would wait. Where there are few lines, all are fetched at once.
pub(super) struct Ahead {
    from: *const u8,
    lines: usize,
    step: usize,
}

impl Ahead {
    /// Lines that [`columns`] reads.
    const STEP: usize = 4;
    /// Lines fetched at once (measured: 5 gain, 9 lose).
    const FEW: usize = 6;

    /// 16 blocks from an address.
    #[inline(always)]
    pub fn new<S: Simd, F>(s: S, from: *const u8) -> Ahead {
        let lines = (ROWS * size_of::<F>()).div_ceil(64);
        let mut ahead = Ahead { from, lines, step: Ahead::STEP };
        if lines <= Ahead::FEW {
            ahead.rest(s);
            ahead.step = 0;
        }
        ahead
    }

    #[inline(always)]
    fn fetch<S: Simd>(&mut self, s: S, lines: usize) {
        for line in 0..lines {
            let line = self.from.wrapping_add(64 * line);
            s.prefetch(line);
            s.prefetch_far(line.wrapping_add(FAR_BYTES));
        }
        self.from = self.from.wrapping_add(64 * lines);
        self.lines = self.lines.saturating_sub(lines);
    }

    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        self.fetch(s, self.step);
    }

    /// One line, if any is left.
    #[inline(always)]
    pub fn line<S: Simd>(&mut self, s: S) {
        if self.lines > 0 {
            self.fetch(s, 1);
        }
    }

    /// What is left.
    #[inline(always)]
    pub fn rest<S: Simd>(&mut self, s: S) {
        self.fetch(s, self.lines);
    }
}

/// [`Simd::transpose4`], fetching ahead.
///
/// # Safety
/// * As [`Simd::transpose4`].
#[inline(always)]
pub(super) unsafe fn columns<S: Simd>(s: S, ahead: &mut Ahead, p: *const u8, stride: usize) -> [S::I; 4] {
    ahead.step(s);
    // SAFETY: by this function's contract.
    unsafe { s.transpose4(p, stride) }
}
