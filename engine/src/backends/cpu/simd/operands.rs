//! What every product has: activations by token, and a place for sums.

use super::shared::Shared;

/// The activations of a product: token `i` of the kernels is row `slots[i] / x_div` of `x`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub x: &'a [f32],
    pub k: usize,
    /// `None`: token `i` itself.
    pub slots: Option<&'a [u32]>,
    pub x_div: usize,
}

impl<'a> Rows<'a> {
    /// Activations of a token.
    #[inline(always)]
    pub fn x(&self, token: usize) -> &'a [f32] {
        let row = match self.slots {
            Some(slots) => slots[token] as usize / self.x_div,
            None => token,
        };
        &self.x[row * self.k..][..self.k]
    }
}

/// Where a product's sums go: `out[slot][row] = (sum + bias[row]) + residual[slot][row]`.
#[derive(Clone, Copy)]
pub(super) struct Store<'a> {
    pub out: Shared<f32>,
    /// Rows of the weight, the stride of `out` and `residual`.
    pub rows: usize,
    pub slots: Option<&'a [u32]>,
    pub bias: Option<&'a [f32]>,
    pub residual: Option<Shared<f32>>,
}

impl Store<'_> {
    /// Finish sums of consecutive rows of a token.
    ///
    /// # Safety
    /// * The rows and the token exist in `out` and `residual`, and nobody else touches these elements.
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, token: usize, sums: &[f32]) {
        let slot = self.slots.map_or(token, |slots| slots[token] as usize);
        let at = slot * self.rows + row;
        // SAFETY: by this function's contract; `residual` may be `out` itself, so element by element through pointers.
        unsafe {
            let out = self.out.at(at);
            match (self.bias, self.residual) {
                (None, None) => core::ptr::copy_nonoverlapping(sums.as_ptr(), out, sums.len()),
                (bias, residual) => {
                    for (i, &sum) in sums.iter().enumerate() {
                        let mut value = sum;
                        if let Some(bias) = bias {
                            value += bias[row + i];
                        }
                        if let Some(residual) = residual {
                            value += *residual.at(at + i);
                        }
                        *out.add(i) = value;
                    }
                }
            }
        }
    }
}
