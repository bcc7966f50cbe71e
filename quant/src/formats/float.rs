//! Plain floats: F32, F16, BF16.

use crate::bits;
use crate::format::{FloatFormat, FormatId};

impl FloatFormat for f32 {
    const ID: FormatId = FormatId::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl FloatFormat for half::f16 {
    const ID: FormatId = FormatId::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bits::f16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(value: f32) -> half::f16 {
        half::f16::from_bits(bits::f32_to_f16(value))
    }
}

impl FloatFormat for half::bf16 {
    const ID: FormatId = FormatId::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bits::bf16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn from_f32(value: f32) -> half::bf16 {
        half::bf16::from_bits(bits::f32_to_bf16(value))
    }
}
