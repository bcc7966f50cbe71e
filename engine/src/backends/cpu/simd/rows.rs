//! Rows of tables and of the KV cache: decoding by id, and writing a step's keys or values.

use quant::FormatId;

use super::elementwise::for_runs;
use super::error::{KernelError, check_len};
use super::isa::Isa;
use super::shared::Shared;
use super::vector::{Simd, SimdOp};
use crate::executor::Executor;
use crate::kv_cache::PAGE;

/// Rows `ids` of a table of `cols` columns, decoded to f32: `out` is [ids, cols].
pub fn get_rows(
    format: FormatId,
    table: &[u8],
    cols: usize,
    ids: &[i32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    const OP: &str = "get_rows";
    let stride = quant::row::row_bytes(format, cols)?;
    check_len(OP, "out", out.len(), ids.len() * cols)?;
    let rows = table.len() / stride.max(1);
    for (out, &id) in out.chunks_exact_mut(cols.max(1)).zip(ids) {
        if id < 0 || id as usize >= rows {
            return Err(KernelError::Index { op: OP, what: "row id", got: id.into(), bound: rows });
        }
        quant::row::decode(format, &table[id as usize * stride..][..stride], out)?;
    }
    Ok(())
}

/// One layer's keys or values, writable: `[page][head_kv][`[`PAGE`]` positions][head_dim]`, rows in `format`.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    /// Format of a row of `head_dim` elements.
    pub format: FormatId,
    /// Whole pages.
    pub bytes: &'a mut [u8],
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// A row of f32 to halves; shorter rests go through [`quant::row::encode`], which rounds the same way.
struct ToF16<'a> {
    x: &'a [f32],
    out: &'a mut [u8],
}

impl SimdOp for ToF16<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, x_rest) = self.x.as_chunks::<16>();
        let (out, out_rest) = self.out.as_chunks_mut::<32>();
        for (x, out) in x.iter().zip(out) {
            // SAFETY: `out` is 32 writable bytes.
            unsafe { s.store_f16(s.load(x), out.as_mut_ptr()) };
        }
        for (x, out) in x_rest.iter().zip(out_rest.chunks_exact_mut(2)) {
            out.copy_from_slice(&quant::bits::f32_to_f16(*x).to_le_bytes());
        }
    }
}

/// Writes `x` [n, n_head_kv · head_dim] to `slots` (page · [`PAGE`] + offset), which must differ from each other.
pub fn kv_store(
    isa: Isa,
    exec: &dyn Executor,
    kv: KvViewMut,
    x: &[f32],
    slots: &[u32],
) -> Result<(), KernelError> {
    const OP: &str = "kv_store";
    let KvViewMut { format, bytes, n_head_kv, head_dim } = kv;
    let row_bytes = quant::row::row_bytes(format, head_dim)?;
    let cols = n_head_kv * head_dim;
    check_len(OP, "x", x.len(), slots.len() * cols)?;
    let page_bytes = n_head_kv * PAGE * row_bytes;
    let bound = bytes.len() / page_bytes.max(1) * PAGE;
    if let Some(&slot) = slots.iter().find(|&&slot| slot as usize >= bound) {
        return Err(KernelError::Index { op: OP, what: "slot", got: slot.into(), bound });
    }
    if cols == 0 {
        return Ok(());
    }
    let store = |token: usize, head: usize, out: &mut [u8]| {
        let x = &x[token * cols + head * head_dim..][..head_dim];
        match format {
            FormatId::F16 => {
                isa.run(ToF16 { x, out });
                Ok(())
            }
            _ => quant::row::encode_one_group(format, x, out),
        }
    };
    // Whether the format can be encoded at all, once, where an error can be returned.
    if let Some(&slot) = slots.first() {
        let at = slot as usize / PAGE * page_bytes + slot as usize % PAGE * row_bytes;
        store(0, 0, &mut bytes[at..][..row_bytes])?;
    }
    // Slots differ by contract, but a caller that breaks it must not cause a race: heads are split over threads,
    // tokens are not.
    let target = Shared(bytes.as_mut_ptr());
    for_runs(exec, n_head_kv, slots.len() * head_dim, 1, |first, heads| {
        for (token, &slot) in slots.iter().enumerate() {
            let (page, offset) = (slot as usize / PAGE, slot as usize % PAGE);
            for head in first..first + heads {
                let at = page * page_bytes + (head * PAGE + offset) * row_bytes;
                // SAFETY: the slot is in bounds, so the row is; runs of heads are disjoint.
                let out = unsafe { core::slice::from_raw_parts_mut(target.at(at), row_bytes) };
                store(token, head, out).expect("the first row was encoded");
            }
        }
    });
    Ok(())
}
