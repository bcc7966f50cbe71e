//! Sizes of the code sections in a cubin (ELF64, little-endian): how many instructions a kernel became.

use std::path::Path;

use crate::error::PtxError;

/// Name and bytes of every section `.text.KERNEL`.
pub(crate) fn code_sizes(path: &Path, bytes: &[u8]) -> Result<Vec<(String, usize)>, PtxError> {
    let bad = |what| PtxError::Elf { path: path.to_path_buf(), what };
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(bad("not a 64-bit little-endian ELF file"));
    }
    let number = |at: usize, size: usize| -> Option<usize> {
        let field = bytes.get(at..at.checked_add(size)?)?;
        Some(field.iter().rev().fold(0, |value, &byte| (value << 8) | byte as usize))
    };
    let header = || Some((number(40, 8)?, number(58, 2)?, number(60, 2)?, number(62, 2)?));
    let (table, entry, count, names) = header().ok_or_else(|| bad("header cut short"))?;
    let section = |i: usize| {
        let at = table.checked_add(i.checked_mul(entry)?)?;
        Some((number(at, 4)?, number(at.checked_add(24)?, 8)?, number(at.checked_add(32)?, 8)?))
    };
    let (_, names_at, _) = section(names).ok_or_else(|| bad("section names missing"))?;
    let mut sizes = Vec::new();
    for i in 0..count {
        let (name, _, size) = section(i).ok_or_else(|| bad("section table cut short"))?;
        let start =
            names_at.checked_add(name).and_then(|at| bytes.get(at..)).ok_or_else(|| bad("bad name"))?;
        let name = start.split(|&byte| byte == 0).next().unwrap_or_default();
        if let Some(kernel) = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix(".text.")) {
            sizes.push((kernel.to_string(), size));
        }
    }
    Ok(sizes)
}
