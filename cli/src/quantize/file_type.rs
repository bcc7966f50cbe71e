//! File types: the names that `quantize` takes, llama.cpp's numbers for them (`general.file_type`) and the format that
//! most tensors get. The facts are llama.cpp's (`include/llama.h`, `tools/quantize/quantize.cpp`).

use quant::FormatId;

/// An overall quantisation of a file.
#[allow(missing_docs, non_camel_case_types)] // the names are what users type
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FileType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q8_0 = 7,
    Q5_0 = 8,
    Q5_1 = 9,
    Q2_K = 10,
    Q3_K_S = 11,
    Q3_K_M = 12,
    Q3_K_L = 13,
    Q4_K_S = 14,
    Q4_K_M = 15,
    Q5_K_S = 16,
    Q5_K_M = 17,
    Q6_K = 18,
    IQ2_XXS = 19,
    IQ2_XS = 20,
    Q2_K_S = 21,
    IQ3_XS = 22,
    IQ3_XXS = 23,
    IQ1_S = 24,
    IQ4_NL = 25,
    IQ3_S = 26,
    IQ3_M = 27,
    IQ2_S = 28,
    IQ2_M = 29,
    IQ4_XS = 30,
    IQ1_M = 31,
    BF16 = 32,
    TQ1_0 = 36,
    TQ2_0 = 37,
    MXFP4_MOE = 38,
    NVFP4 = 39,
    Q1_0 = 40,
    Q2_0 = 41,
}

/// A name, its type, and the format of most tensors.
type Row = (&'static str, FileType, FormatId);

/// All names; aliases stand after what they mean.
const ROWS: &[Row] = &[
    ("F32", FileType::F32, FormatId::F32),
    ("F16", FileType::F16, FormatId::F16),
    ("BF16", FileType::BF16, FormatId::BF16),
    ("Q8_0", FileType::Q8_0, FormatId::Q8_0),
    ("Q6_K", FileType::Q6_K, FormatId::Q6_K),
    ("Q5_K_M", FileType::Q5_K_M, FormatId::Q5_K),
    ("Q5_K_S", FileType::Q5_K_S, FormatId::Q5_K),
    ("Q5_1", FileType::Q5_1, FormatId::Q5_1),
    ("Q5_0", FileType::Q5_0, FormatId::Q5_0),
    ("Q4_K_M", FileType::Q4_K_M, FormatId::Q4_K),
    ("Q4_K_S", FileType::Q4_K_S, FormatId::Q4_K),
    ("Q4_1", FileType::Q4_1, FormatId::Q4_1),
    ("Q4_0", FileType::Q4_0, FormatId::Q4_0),
    ("IQ4_NL", FileType::IQ4_NL, FormatId::IQ4_NL),
    ("IQ4_XS", FileType::IQ4_XS, FormatId::IQ4_XS),
    ("MXFP4_MOE", FileType::MXFP4_MOE, FormatId::MXFP4),
    ("NVFP4", FileType::NVFP4, FormatId::NVFP4),
    ("Q3_K_L", FileType::Q3_K_L, FormatId::Q3_K),
    ("Q3_K_M", FileType::Q3_K_M, FormatId::Q3_K),
    ("Q3_K_S", FileType::Q3_K_S, FormatId::Q3_K),
    ("IQ3_M", FileType::IQ3_M, FormatId::IQ3_S),
    ("IQ3_S", FileType::IQ3_S, FormatId::IQ3_S),
    ("IQ3_XS", FileType::IQ3_XS, FormatId::IQ3_S),
    ("IQ3_XXS", FileType::IQ3_XXS, FormatId::IQ3_XXS),
    ("Q2_K", FileType::Q2_K, FormatId::Q2_K),
    ("Q2_K_S", FileType::Q2_K_S, FormatId::Q2_K),
    ("IQ2_M", FileType::IQ2_M, FormatId::IQ2_S),
    ("IQ2_S", FileType::IQ2_S, FormatId::IQ2_XS),
    ("IQ2_XS", FileType::IQ2_XS, FormatId::IQ2_XS),
    ("IQ2_XXS", FileType::IQ2_XXS, FormatId::IQ2_XXS),
    ("IQ1_M", FileType::IQ1_M, FormatId::IQ1_M),
    ("IQ1_S", FileType::IQ1_S, FormatId::IQ1_S),
    ("TQ2_0", FileType::TQ2_0, FormatId::TQ2_0),
    ("TQ1_0", FileType::TQ1_0, FormatId::TQ1_0),
    ("Q2_0", FileType::Q2_0, FormatId::Q2_0),
    ("Q1_0", FileType::Q1_0, FormatId::Q1_0),
    ("Q3_K", FileType::Q3_K_M, FormatId::Q3_K),
    ("Q4_K", FileType::Q4_K_M, FormatId::Q4_K),
    ("Q5_K", FileType::Q5_K_M, FormatId::Q5_K),
];

impl FileType {
    /// The type of this name, any case, or of llama.cpp's number.
    pub fn parse(text: &str) -> Result<FileType, String> {
        let number = text.parse::<u32>().ok();
        let found = ROWS.iter().find(|r| r.0.eq_ignore_ascii_case(text) || Some(r.1 as u32) == number);
        found.map(|r| r.1).ok_or_else(|| {
            let names: Vec<_> = ROWS.iter().map(|r| r.0).collect();
            format!("unknown file type '{text}'; known: {}", names.join(", "))
        })
    }

    /// The name of a file's `general.file_type`.
    pub fn name_of(number: u32) -> Option<&'static str> {
        ROWS.iter().find(|r| r.1 as u32 == number).map(|r| r.0)
    }

    /// The format that most tensors get.
    pub fn format(self) -> FormatId {
        ROWS.iter().find(|r| r.1 == self).expect("each has a row").2
    }
}
