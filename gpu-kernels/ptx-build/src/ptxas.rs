//! NVIDIA's assembler as a checker: no entry may spill more than a few registers, nor keep anything else on a stack.
//!
//! ptxas comes from a Python wheel that xtask fetches; only tests and reports need it, never a build.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::compiler::run;
use crate::elf;
use crate::error::PtxError;
use crate::module::{Entry, Module};
use crate::tier::Tier;

/// An assembler.
#[derive(Clone, Debug)]
pub struct Ptxas {
    program: PathBuf,
    version: String,
}

impl Ptxas {
    /// The assembler at this path.
    pub fn new(program: PathBuf) -> Result<Ptxas, PtxError> {
        let version = run(Command::new(&program).arg("--version"), "say its version")?;
        Ok(Ptxas { program, version })
    }
}

/// Most that an entry may spill on a tier, stores and loads together: what launch bounds for full occupancy cost some
/// entries for dear formats. Below sm_75 it is `mmq`'s cuts of 32 and 64 columns, which such GPUs compile and do not choose;
/// on sm_90a `mmq_hopper`'s of 64 columns with f16 scales. An array that went to memory takes more, and is an error of its
/// own (`module`).
fn most_spilled(tier: Tier) -> u32 {
    match tier.sm {
        ..75 => 256,
        75..89 => 160,
        89 => 128,
        _ => 160,
    }
}

/// What one kernel takes on one tier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Kernel.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory, bytes.
    pub smem_bytes: u32,
    /// Stack per thread, bytes.
    pub stack_bytes: u32,
    /// Bytes spilled to local memory and read back.
    pub spill_bytes: u32,
    /// Machine instructions, the padding at the end included.
    pub instructions: usize,
}

/// Assembles a module's entries below `build_dir`, each by itself as a driver gets it. An entry with more spills than its
/// tier may have, or with anything else on a stack, is an error. A module that was assembled before is not assembled again.
pub fn assemble(ptxas: &Ptxas, module: &Module, build_dir: &Path) -> Result<Vec<Resources>, PtxError> {
    let folder = build_dir.join(module.tier.name);
    std::fs::create_dir_all(&folder).map_err(PtxError::path("create", &folder))?;
    let kept = folder.join(format!("{}.resources", module.name));
    let digest = format!("{:016x}\n", cache::digest([module.ptx.as_str(), ptxas.version.as_str(), LAYOUT]));
    let record = std::fs::read_to_string(&kept).ok();
    let rows = match record.and_then(|text| from_lines(text.strip_prefix(&digest)?)) {
        Some(rows) => rows,
        None => {
            let entries = module.entries();
            let rows = entries.into_iter().map(|entry| assemble_entry(ptxas, module.tier, &entry, &folder));
            let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
            rows.sort_by(|a, b| a.kernel.cmp(&b.kernel));
            std::fs::write(&kept, digest + &to_lines(&rows)).map_err(PtxError::path("write", &kept))?;
            rows
        }
    };
    check(module.tier, &rows)?;
    Ok(rows)
}

/// The rules; all entries that break one are named.
fn check(tier: Tier, rows: &[Resources]) -> Result<(), PtxError> {
    let mut spilling = rows
        .iter()
        // A stack is counted in eights, and what is never read back counts once.
        .filter(|row| {
            let spilled = row.spill_bytes.next_multiple_of(8);
            row.stack_bytes > spilled || row.spill_bytes > most_spilled(tier)
        });
    let Some(first) = spilling.next() else { return Ok(()) };
    let others: String = spilling.map(|row| format!(", {} too", row.kernel)).collect();
    let what = format!("{} bytes of stack, {} bytes spilled{others}", first.stack_bytes, first.spill_bytes);
    Err(PtxError::Lint { tier: tier.name.into(), kernel: first.kernel.clone(), what })
}

fn assemble_entry(
    ptxas: &Ptxas,
    tier: Tier,
    entry: &Entry<'_>,
    folder: &Path,
) -> Result<Resources, PtxError> {
    let ptx = folder.join(format!("{}.ptx", entry.kernel));
    let cubin = folder.join(format!("{}.cubin", entry.kernel));
    std::fs::write(&ptx, entry.texts.concat()).map_err(PtxError::path("write", &ptx))?;
    let mut command = Command::new(&ptxas.program);
    command.args(["-v", "-arch", tier.name]).arg(&ptx).arg("-o").arg(&cubin);
    // The report of -v is on stderr.
    let output = command.output().map_err(PtxError::path("start", &ptxas.program))?;
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let purpose = format!("assemble {} for {}", entry.kernel, tier.name);
        return Err(PtxError::Command { program: "ptxas".into(), purpose, stderr: report });
    }
    let bytes = std::fs::read(&cubin).map_err(PtxError::path("read", &cubin))?;
    let sizes = elf::code_sizes(&cubin, &bytes)?;
    let (mut rows, size) = (parse(&report), sizes.iter().find(|(kernel, _)| kernel == entry.kernel));
    match (&mut rows[..], size) {
        ([row], Some((_, size))) if row.kernel == entry.kernel => {
            Ok(Resources { instructions: instructions(tier, *size), ..std::mem::take(row) })
        }
        _ => {
            let what = format!("{} kernels reported for {}", rows.len(), entry.kernel);
            Err(PtxError::Output { program: "ptxas -v".into(), what })
        }
    }
}

/// What a kept record holds, so that an older one is not read.
const LAYOUT: &str = "spills are kept";

/// Rows as they are kept.
fn to_lines(rows: &[Resources]) -> String {
    let line = |row: &Resources| {
        let Resources { kernel, registers, smem_bytes, stack_bytes, spill_bytes, instructions } = row;
        format!("{kernel} {registers} {smem_bytes} {stack_bytes} {spill_bytes} {instructions}\n")
    };
    rows.iter().map(line).collect()
}

fn from_lines(text: &str) -> Option<Vec<Resources>> {
    let row = |line: &str| {
        let mut words = line.split(' ');
        Some(Resources {
            kernel: words.next()?.into(),
            registers: words.next()?.parse().ok()?,
            smem_bytes: words.next()?.parse().ok()?,
            stack_bytes: words.next()?.parse().ok()?,
            spill_bytes: words.next()?.parse().ok()?,
            instructions: words.next()?.parse().ok()?,
        })
    };
    text.lines().map(row).collect()
}

/// Instructions in this many bytes of code: 16 bytes each from sm_70 on; before, 8 bytes, with one word of scheduling
/// hints for every three.
fn instructions(tier: Tier, code_bytes: usize) -> usize {
    if tier.sm >= 70 { code_bytes / 16 } else { code_bytes / 8 * 3 / 4 }
}

/// Rows of `ptxas -v`.
fn parse(report: &str) -> Vec<Resources> {
    let mut rows: Vec<Resources> = Vec::new();
    for line in report.lines() {
        if let Some(kernel) =
            line.split("Compiling entry function '").nth(1).and_then(|rest| rest.split('\'').next())
        {
            rows.push(Resources { kernel: kernel.into(), ..Resources::default() });
        }
        let Some(row) = rows.last_mut() else { continue };
        let number = |before: &str| -> Option<u32> {
            line.split(before).next()?.trim_end().rsplit([' ', ':']).next()?.parse().ok()
        };
        if line.contains("bytes stack frame") {
            row.stack_bytes = number("bytes stack frame").unwrap_or(0);
            row.spill_bytes =
                number("bytes spill stores").unwrap_or(0) + number("bytes spill loads").unwrap_or(0);
        }
        if line.contains("registers") {
            row.registers = number("registers").unwrap_or(0);
            row.smem_bytes = if line.contains("bytes smem") { number("bytes smem").unwrap_or(0) } else { 0 };
        }
    }
    rows
}

/// The table that is diffed in review: one line per kernel and tier.
pub fn table(tiers: &[(Tier, Vec<Resources>)]) -> String {
    let mut text = format!(
        "{:<8} {:<32} {:>9} {:>10} {:>11} {:>12}\n",
        "tier", "kernel", "registers", "smem_bytes", "spill_bytes", "instructions"
    );
    for (tier, rows) in tiers {
        for row in rows {
            let Resources { kernel, registers, smem_bytes, spill_bytes, instructions, .. } = row;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:<8} {kernel:<32} {registers:>9} {smem_bytes:>10} {spill_bytes:>11} {instructions:>12}",
                tier.name
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_reads_both_shapes_of_the_report() {
        let report = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
            ptxas info    : Function properties for a\n    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 38 registers, used 1 barriers, 128 bytes smem, 376 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
            ptxas info    : Used 10 registers, used 0 barriers\n";
        let a = Resources {
            kernel: "a".into(),
            registers: 38,
            smem_bytes: 128,
            stack_bytes: 16,
            spill_bytes: 12,
            instructions: 0,
        };
        let b = Resources { kernel: "b".into(), registers: 10, ..Resources::default() };
        assert_eq!(parse(report), [a, b]);
    }

    #[test]
    fn kept_rows_are_read_back() {
        let row = |kernel: &str, registers| Resources {
            kernel: kernel.into(),
            registers,
            spill_bytes: registers,
            instructions: 7,
            ..Resources::default()
        };
        let rows = [row("a", 1), row("b", 2)];
        assert_eq!(from_lines(&to_lines(&rows)).as_deref(), Some(&rows[..]));
        assert_eq!(from_lines("a 1\n"), None);
    }
}
