//! What the boot loader says about the machine: PVH's start info or multiboot2's tags, read once into plain values.
//!
//! Both are records in memory below 4 GiB. Everything in them is a claim: addresses and lengths are checked against what
//! [`Physical`] gives out, and what does not fit the fixed lists here is an error, not a guess. After
//! [`BootInfo::read`] nothing of the loader's memory is needed, except the modules.
//!
//! PVH: Xen's public/arch-x86/hvm/start_info.h. Multiboot2: its specification, section 3.6.

use core::fmt;

use heapless::Vec;

use crate::acpi::Root;
use crate::memory::{Physical, Range};

/// What `eax` holds after a multiboot2 entry.
pub const MULTIBOOT2: u32 = 0x36d7_6289;
/// The first word of PVH's start info, and what our PVH entry puts in `eax`.
pub const PVH: u32 = 0x336e_c578;

/// Ranges of RAM at most. QEMU gives below 10, UEFI machines some 40.
pub const MAX_RANGES: usize = 128;
/// Modules at most.
pub const MAX_MODULES: usize = 8;
/// Bytes of the command line at most.
pub const MAX_COMMAND_LINE: usize = 4096;

/// Why the boot information cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError {
    /// Neither entry left its mark.
    Loader {
        /// What `eax` held.
        magic: u32,
    },
    /// A record is not in memory.
    Address {
        /// Which.
        what: &'static str,
        /// Where it should be.
        at: u64,
        /// Its length.
        len: u64,
    },
    /// A record is malformed.
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// More of something than there is room for.
    TooMany {
        /// Of what.
        what: &'static str,
        /// Room for so many.
        max: usize,
    },
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            BootError::Loader { magic } => {
                write!(f, "no known boot protocol left {magic:#x}; expected PVH or multiboot2")
            }
            BootError::Address { what, at, len } => {
                write!(f, "the {what} ({len} bytes at {at:#x}) is not in the first 4 GiB")
            }
            BootError::Malformed { what } => write!(f, "boot information: {what}"),
            BootError::TooMany { what, max } => write!(f, "boot information has more than {max} {what}"),
        }
    }
}

impl core::error::Error for BootError {}

/// The machine as the loader describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootInfo {
    /// Usable RAM.
    pub ram: Vec<Range, MAX_RANGES>,
    /// Files that the loader put into memory.
    pub modules: Vec<Range, MAX_MODULES>,
    /// The command line.
    pub command_line: Vec<u8, MAX_COMMAND_LINE>,
    /// Where ACPI's tables begin.
    pub acpi: Option<Root>,
}

/// Type of usable RAM in both memory maps.
const USABLE: u32 = 1;

impl BootInfo {
    /// Reads what the entry code found in `eax` and `ebx`.
    pub fn read(magic: u32, at: u32, memory: &impl Physical) -> Result<BootInfo, BootError> {
        match magic {
            PVH => BootInfo::pvh(at.into(), memory),
            MULTIBOOT2 => BootInfo::multiboot2(at.into(), memory),
            _ => Err(BootError::Loader { magic }),
        }
    }

    fn pvh(at: u64, memory: &impl Physical) -> Result<BootInfo, BootError> {
        let mut info = BootInfo::default();
        let head = record(memory, "PVH start info", at, 56)?;
        if word(head, 0) != PVH {
            return Err(BootError::Malformed { what: "the PVH start info lacks its magic number" });
        }
        if word(head, 4) < 1 {
            return Err(BootError::Malformed { what: "the PVH start info has no memory map (version 0)" });
        }
        let list = |what, at, n: u32, size: usize| record(memory, what, at, n as usize * size);
        if word(head, 12) > 0 {
            for entry in list("module list", long(head, 16), word(head, 12).min(64), 32)?.chunks_exact(32) {
                info.add_module(Range { start: long(entry, 0), len: long(entry, 8) })?;
            }
        }
        let command_line = long(head, 24);
        if command_line != 0 {
            info.set_command_line(text_at(memory, command_line)?)?;
        }
        if long(head, 32) != 0 {
            info.acpi = Root::read(record(memory, "RSDP", long(head, 32), Root::BYTES)?);
        }
        let n = word(head, 48).min(MAX_RANGES as u32 + 1);
        for entry in list("memory map", long(head, 40), n, 24)?.chunks_exact(24) {
            info.add_ram(word(entry, 16), long(entry, 0), long(entry, 8))?;
        }
        Ok(info)
    }

    fn multiboot2(at: u64, memory: &impl Physical) -> Result<BootInfo, BootError> {
        let mut info = BootInfo::default();
        let total = word(record(memory, "multiboot2 information", at, 8)?, 0) as usize;
        let bytes = record(memory, "multiboot2 information", at, total)?;
        let mut rest = bytes.get(8..).unwrap_or_default();
        loop {
            let (kind, size) = match rest.get(..8) {
                Some(head) => (word(head, 0), word(head, 4) as usize),
                None => return Err(BootError::Malformed { what: "the multiboot2 tags have no end" }),
            };
            let tag =
                rest.get(8..size).ok_or(BootError::Malformed { what: "a multiboot2 tag is cut off" })?;
            match kind {
                0 => return Ok(info),
                1 => info.set_command_line(until_nul(tag))?,
                3 if tag.len() >= 8 => {
                    let (start, end) = (word(tag, 0), word(tag, 4));
                    let len = end.checked_sub(start);
                    let len = len.ok_or(BootError::Malformed { what: "a module ends before it begins" })?;
                    info.add_module(Range { start: start.into(), len: len.into() })?;
                }
                6 if tag.len() >= 8 => {
                    let size = word(tag, 0) as usize;
                    if size < 24 {
                        return Err(BootError::Malformed { what: "entries of the memory map are too short" });
                    }
                    for entry in tag[8..].chunks_exact(size) {
                        info.add_ram(word(entry, 16), long(entry, 0), long(entry, 8))?;
                    }
                }
                // A copy of ACPI's root pointer, of version 1 or 2.
                14 | 15 => info.acpi = Root::read(tag).or(info.acpi),
                _ => {}
            }
            rest = rest.get(size.next_multiple_of(8)..).unwrap_or_default();
        }
    }

    fn add_ram(&mut self, kind: u32, start: u64, len: u64) -> Result<(), BootError> {
        if kind != USABLE || len == 0 {
            return Ok(());
        }
        if start.checked_add(len).is_none() {
            return Err(BootError::Malformed { what: "a range of RAM passes the end of the address space" });
        }
        let full = BootError::TooMany { what: "ranges of RAM", max: MAX_RANGES };
        self.ram.push(Range { start, len }).map_err(|_| full)
    }

    fn add_module(&mut self, range: Range) -> Result<(), BootError> {
        if range.start == 0 || range.start.checked_add(range.len).is_none_or(|end| end > 1 << 32) {
            return Err(BootError::Address { what: "module", at: range.start, len: range.len });
        }
        let full = BootError::TooMany { what: "modules", max: MAX_MODULES };
        self.modules.push(range).map_err(|_| full)
    }

    fn set_command_line(&mut self, text: &[u8]) -> Result<(), BootError> {
        let long = BootError::TooMany { what: "bytes of command line", max: MAX_COMMAND_LINE };
        self.command_line.clear();
        self.command_line.extend_from_slice(text).map_err(|_| long)
    }

    /// RAM that nobody uses: without the first MiB (firmware, and the cores' start code), and without the pages of
    /// `image` and of the modules. At most two more ranges than RAM and modules have.
    pub fn free(&self, image: Range) -> Vec<Range, { MAX_RANGES + MAX_MODULES + 2 }> {
        const LOW: Range = Range { start: 0, len: 1 << 20 };
        let mut free = Vec::new();
        for ram in &self.ram {
            let mut from = ram.start;
            while from < ram.end() {
                let taken = || self.modules.iter().copied().chain([LOW, image]).map(Range::pages);
                if let Some(end) = taken().filter(|t| t.start <= from && from < t.end()).map(Range::end).max()
                {
                    from = end;
                    continue;
                }
                let next = taken().map(|t| t.start).filter(|&start| start > from).min().unwrap_or(u64::MAX);
                let to = next.min(ram.end());
                // The list is long enough: every taken range splits RAM at most once more.
                let _ = free.push(Range { start: from, len: to - from });
                from = to;
            }
        }
        free
    }
}

fn record<'m>(
    memory: &'m impl Physical,
    what: &'static str,
    at: u64,
    len: usize,
) -> Result<&'m [u8], BootError> {
    memory.bytes(at, len).ok_or(BootError::Address { what, at, len: len as u64 })
}

fn text_at(memory: &impl Physical, at: u64) -> Result<&[u8], BootError> {
    // Up to its NUL, or as much of it as lies in memory.
    let len = (0..=MAX_COMMAND_LINE).find(|&i| memory.bytes(at + i as u64, 1).is_none_or(|byte| byte == [0]));
    let long = BootError::TooMany { what: "bytes of command line", max: MAX_COMMAND_LINE };
    record(memory, "command line", at, len.ok_or(long)?)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len())]
}

/// A 32-bit word of a record whose length is known.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A 64-bit word of a record whose length is known.
fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::vec::Vec as Bytes;

    /// Memory made of pieces.
    pub struct Pieces(pub Bytes<(u64, Bytes<u8>)>);

    impl Physical for Pieces {
        fn bytes(&self, at: u64, len: usize) -> Option<&[u8]> {
            self.0.iter().find_map(|(start, bytes)| {
                let from = usize::try_from(at.checked_sub(*start)?).ok()?;
                bytes.get(from..from.checked_add(len)?)
            })
        }
    }

    fn words(words: &[u32]) -> Bytes<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn pvh(n_modules: u32) -> Pieces {
        Pieces(std::vec![
            // magic, version, flags, n_modules, modules, command line, RSDP, map, n_map, reserved
            (0x1000, words(&[PVH, 1, 0, n_modules, 0x2000, 0, 0x3000, 0, 0, 0, 0x4000, 0, 3, 0])),
            (0x2000, words(&[0x80_0000, 0, 0x1234, 0, 0, 0, 0, 0])),
            (0x3000, b"model=module threads=2\0junk".to_vec()),
            (
                0x4000,
                words(&[
                    0, 0, 0x9_f000, 0, 1, 0, 0xf_0000, 0, 0x1_0000, 0, 2, 0, 0x10_0000, 0, 0x700_0000, 0, 1,
                    0
                ])
            ),
        ])
    }

    #[test]
    fn pvh_is_read() {
        let info = BootInfo::read(PVH, 0x1000, &pvh(1)).unwrap();
        assert_eq!(&info.command_line[..], b"model=module threads=2");
        assert_eq!(&info.modules[..], [Range { start: 0x80_0000, len: 0x1234 }]);
        let ram = [Range { start: 0, len: 0x9_f000 }, Range { start: 0x10_0000, len: 0x700_0000 }];
        assert_eq!(&info.ram[..], ram);
        assert_eq!(info.acpi, None);
    }

    #[test]
    fn a_list_outside_memory_is_an_error() {
        let error = BootInfo::read(PVH, 0x1000, &pvh(2)).unwrap_err();
        assert_eq!(error, BootError::Address { what: "module list", at: 0x2000, len: 64 });
        assert!(matches!(BootInfo::read(PVH, 0x5000, &pvh(1)), Err(BootError::Address { .. })));
        assert!(matches!(BootInfo::read(7, 0x1000, &pvh(1)), Err(BootError::Loader { magic: 7 })));
    }

    fn multiboot(tags: &[(u32, Bytes<u8>)]) -> Pieces {
        let mut bytes = words(&[0, 0]);
        for (kind, body) in tags {
            bytes.extend(words(&[*kind, 8 + body.len() as u32]));
            bytes.extend(body);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let total = bytes.len() as u32;
        bytes[..4].copy_from_slice(&total.to_le_bytes());
        Pieces(std::vec![(0x9000, bytes)])
    }

    #[test]
    fn multiboot2_is_read() {
        let map = words(&[24, 0, 0x10_0000, 0, 0x700_0000, 0, 1, 0]);
        let tags = [
            (1, b"predict=4\0".to_vec()),
            (3, words(&[0x40_0000, 0x40_1000])),
            (6, map),
            (21, std::vec![1, 2, 3]),
            (0, std::vec![]),
        ];
        let info = BootInfo::read(MULTIBOOT2, 0x9000, &multiboot(&tags)).unwrap();
        assert_eq!(&info.command_line[..], b"predict=4");
        assert_eq!(&info.modules[..], [Range { start: 0x40_0000, len: 0x1000 }]);
        assert_eq!(&info.ram[..], [Range { start: 0x10_0000, len: 0x700_0000 }]);
        // Cut anywhere, it is an error and nothing worse.
        let whole = multiboot(&tags).0.remove(0).1;
        for len in 0..whole.len() {
            let cut = Pieces(std::vec![(0x9000, whole[..len].to_vec())]);
            assert!(BootInfo::read(MULTIBOOT2, 0x9000, &cut).is_err(), "{len}");
        }
    }

    #[test]
    fn a_module_that_ends_before_it_begins() {
        let tags = [(3, words(&[0x40_0000, 0x3f_0000])), (0, std::vec![])];
        let error = BootInfo::read(MULTIBOOT2, 0x9000, &multiboot(&tags)).unwrap_err();
        assert!(matches!(error, BootError::Malformed { .. }));
    }

    #[test]
    fn free_memory_avoids_what_is_taken() {
        let mut info = BootInfo::read(PVH, 0x1000, &pvh(1)).unwrap();
        info.add_module(Range { start: 0x80_1234, len: 0x10 }).unwrap();
        let free = info.free(Range { start: 0x20_0000, len: 0x10_0000 });
        let expected = [
            Range { start: 0x10_0000, len: 0x10_0000 },
            Range { start: 0x30_0000, len: 0x50_0000 },
            Range { start: 0x80_2000, len: 0x710_0000 - 0x80_2000 },
        ];
        assert_eq!(&free[..], expected);
    }
}
