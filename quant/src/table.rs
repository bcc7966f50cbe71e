//! The rows: every tensor type a GGUF file can carry, with its size, and the one place where an id becomes a type.

use crate::format::{BlockFormat, FloatFormat, FormatId};
use crate::formats::*;

/// Sizes and name of a tensor type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatInfo {
    /// The id.
    pub id: FormatId,
    /// The spelling users type and read.
    pub name: &'static str,
    /// Elements per block (1 for plain types).
    pub elems: usize,
    /// Bytes per block.
    pub bytes: usize,
}

/// What to do with a format once its type is known.
pub trait Visitor {
    /// The result.
    type Output;
    /// The id names a quantised block format.
    fn block<F: BlockFormat>(self) -> Self::Output;
    /// The id names a float format.
    fn float<F: FloatFormat>(self) -> Self::Output;
}

macro_rules! table {
    (blocks { $($block:ident => $ty:ty,)* } floats { $($float:ident => $fty:ty,)* } plain { $($plain:ident => ($elems:literal, $bytes:literal),)* }) => {
        /// All rows.
        pub const FORMATS: &[FormatInfo] = &[
            $(FormatInfo { id: FormatId::$block, name: stringify!($block), elems: <$ty as BlockFormat>::ELEMS, bytes: size_of::<$ty>() },)*
            $(FormatInfo { id: FormatId::$float, name: stringify!($float), elems: 1, bytes: size_of::<$fty>() },)*
            $(FormatInfo { id: FormatId::$plain, name: stringify!($plain), elems: $elems, bytes: $bytes },)*
        ];

        /// Size and name of a type.
        pub const fn info(id: FormatId) -> FormatInfo {
            match id {
                $(FormatId::$block => FormatInfo { id, name: stringify!($block), elems: <$ty as BlockFormat>::ELEMS, bytes: size_of::<$ty>() },)*
                $(FormatId::$float => FormatInfo { id, name: stringify!($float), elems: 1, bytes: size_of::<$fty>() },)*
                $(FormatId::$plain => FormatInfo { id, name: stringify!($plain), elems: $elems, bytes: $bytes },)*
            }
        }

        /// Calls the visitor with the type behind `id`; `None` for plain integer types, which hold no weights.
        pub fn with_format<V: Visitor>(id: FormatId, visitor: V) -> Option<V::Output> {
            match id {
                $(FormatId::$block => Some(visitor.block::<$ty>()),)*
                $(FormatId::$float => Some(visitor.float::<$fty>()),)*
                $(FormatId::$plain => None,)*
            }
        }

        // A row says what its type says.
        const _: () = {
            $(assert!(<$ty as BlockFormat>::ID as u32 == FormatId::$block as u32);)*
            $(assert!(align_of::<$ty>() == 1);)*
            $(assert!(<$fty as FloatFormat>::ID as u32 == FormatId::$float as u32);)*
        };
    };
}

/// Hands every block format, as `ID => module::Block` with the module below [`crate::formats`], to a macro: for code
/// that must name each format, such as the entry points of GPU kernels. Tokens in brackets come first, unchanged.
#[macro_export]
macro_rules! for_each_block_format {
    ($callback:ident ! [$($args:tt)*]) => {
        $callback! {
            [$($args)*]
            Q4_0 => q4_0::Block,
            Q4_1 => q4_1::Block,
            Q5_0 => q5_0::Block,
            Q5_1 => q5_1::Block,
            Q8_0 => q8_0::Block,
            Q8_1 => q8_1::Block,
            Q2_K => q2_k::Block,
            Q3_K => q3_k::Block,
            Q4_K => q4_k::Block,
            Q5_K => q5_k::Block,
            Q6_K => q6_k::Block,
            Q8_K => q8_k::Block,
            TQ1_0 => tq1_0::Block,
            TQ2_0 => tq2_0::Block,
            MXFP4 => mxfp4::Block,
            NVFP4 => nvfp4::Block,
            Q1_0 => q1_0::Block,
            Q2_0 => q2_0::Block,
            IQ2_XXS => iq2_xxs::Block,
            IQ2_XS => iq2_xs::Block,
            IQ2_S => iq2_s::Block,
            IQ3_XXS => iq3_xxs::Block,
            IQ3_S => iq3_s::Block,
            IQ1_S => iq1_s::Block,
            IQ1_M => iq1_m::Block,
            IQ4_NL => iq4_nl::Block,
            IQ4_XS => iq4_xs::Block,
        }
    };
}

macro_rules! all_rows {
    ([] $($block:ident => $module:ident :: Block,)*) => {
        table! {
            blocks { $($block => $module::Block,)* }
            floats {
                F32 => f32,
                F16 => half::f16,
                BF16 => half::bf16,
            }
            plain {
                I8 => (1, 1),
                I16 => (1, 2),
                I32 => (1, 4),
                I64 => (1, 8),
                F64 => (1, 8),
            }
        }
    };
}

for_each_block_format!(all_rows![]);

impl FormatId {
    /// The type with this ggml number.
    pub fn from_ggml(number: u32) -> Option<FormatId> {
        FORMATS.iter().find(|row| row.id as u32 == number).map(|row| row.id)
    }

    /// The type with this name, any case.
    pub fn from_name(name: &str) -> Option<FormatId> {
        FORMATS.iter().find(|row| row.name.eq_ignore_ascii_case(name)).map(|row| row.id)
    }

    /// The spelling users type and read.
    pub fn name(self) -> &'static str {
        info(self).name
    }
}

impl core::fmt::Display for FormatId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}
