//! Q8_K: 256 activations, 292 bytes. ggml's activation format for the K and IQ formats; files do not normally carry it.
//!
//! ```text
//! byte 0..4      d      f32 scale
//! byte 4..260    qs     signed bytes
//! byte 260..292  bsums  16 × i16, sum of each 16 codes
//! ```
//! `w = d * q`, where the value of largest magnitude becomes -127; `bsums` is redundant and not read. Relative RMS error
//! 0.0069 on normal values.

use bytemuck::{Pod, Zeroable};

use crate::bits::{nearest_int, word};
use crate::extent::extreme;
use crate::format::{BlockFormat, Encode, FormatId, Group, Importance};
use crate::lookup::Lookup;

/// One super-block.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    d: [u8; 4],
    qs: [u8; 256],
    bsums: [[u8; 2]; 16],
}

const _: () = assert!(size_of::<Block>() == 292);

impl BlockFormat for Block {
    const ID: FormatId = FormatId::Q8_K;
    const ELEMS: usize = 256;
    const BIAS: i32 = 128;
    const CODE_MAX: u8 = 255;
    const ENCODE: Encode = Encode::Yes;

    #[inline(always)]
    fn unpack_group_by<L: Lookup>(&self, g: usize, _lookup: L) -> Group {
        let qs = &self.qs[32 * g..][..32];
        let codes = core::array::from_fn(|i| word(qs, i) ^ 0x8080_8080);
        Group { codes, scale: [f32::from_le_bytes(self.d); 2], offset: [0.0; 2] }
    }

    fn encode_row(src: &[f32], _importance: Importance<'_>, out: &mut [Self]) {
        for (x, block) in src.chunks_exact(256).zip(out) {
            *block = Block::zeroed();
            let extreme = extreme(x);
            if extreme == 0.0 {
                continue;
            }
            let inverse = -127.0 / extreme;
            for (q, &v) in block.qs.iter_mut().zip(x) {
                *q = nearest_int(inverse * v).min(127) as i8 as u8;
            }
            for (sum, qs) in block.bsums.iter_mut().zip(block.qs.chunks_exact(16)) {
                *sum = qs.iter().map(|&q| q as i8 as i16).sum::<i16>().to_le_bytes();
            }
            block.d = (1.0 / inverse).to_le_bytes();
        }
    }
}
