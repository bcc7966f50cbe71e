//! The image as a file: what loaders look at.

use std::path::PathBuf;

struct Elf(Vec<u8>);

impl Elf {
    fn number(&self, at: usize, bytes: usize) -> u64 {
        self.0[at..at + bytes].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }
    /// Kind, flags, file offset, address, file size, alignment of each segment.
    fn segments(&self) -> Vec<[u64; 6]> {
        let (at, n) = (self.number(32, 8) as usize, self.number(56, 2) as usize);
        let header = |i: usize| at + 56 * i;
        (0..n)
            .map(|i| {
                let at = header(i);
                [
                    self.number(at, 4),
                    self.number(at + 4, 4),
                    self.number(at + 8, 8),
                    self.number(at + 16, 8),
                    self.number(at + 32, 8),
                    self.number(at + 48, 8),
                ]
            })
            .collect()
    }
}

const LOAD: u64 = 1;
const NOTE: u64 = 4;
const EXECUTE: u64 = 1;
const WRITE: u64 = 2;

fn image() -> Option<Elf> {
    let Some(path) = std::env::var_os("RUNIK_IMAGE").map(PathBuf::from) else {
        println!("skipped: no image (`cargo xtask image` builds one; set RUNIK_IMAGE to its path)");
        return None;
    };
    Some(Elf(std::fs::read(path).unwrap()))
}

#[test]
fn no_segment_is_written_and_executed() {
    let Some(elf) = image() else { return };
    let loads: Vec<_> = elf.segments().into_iter().filter(|s| s[0] == LOAD).collect();
    assert_eq!(loads.len(), 3);
    for [_, flags, ..] in &loads {
        assert!(flags & (EXECUTE | WRITE) != (EXECUTE | WRITE), "{flags:#x}");
    }
    assert_eq!(loads.iter().filter(|s| s[1] & EXECUTE != 0).count(), 1);
}

/// QEMU, Cloud Hypervisor and Firecracker look for this note: 18, Xen, a 32-bit entry within the code.
#[test]
fn the_pvh_note_is_there() {
    let Some(elf) = image() else { return };
    let notes: Vec<_> = elf.segments().into_iter().filter(|s| s[0] == NOTE).collect();
    let [[_, _, at, _, bytes, align]] = notes[..] else { panic!("{notes:?}") };
    assert_eq!((bytes, align), (20, 4));
    let at = at as usize;
    assert_eq!(&elf.0[at..at + 16], [4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    let entry = elf.number(at + 16, 4);
    let code = elf.segments().into_iter().find(|s| s[1] & EXECUTE != 0).unwrap();
    assert!((code[3]..code[3] + code[4]).contains(&entry), "{entry:#x}");
    // linux-loader refuses an ELF without an entry.
    assert_ne!(elf.number(24, 8), 0);
}

/// GRUB looks for this header in the first 32 KiB; its words sum up to 0.
#[test]
fn the_multiboot2_header_is_there() {
    let Some(elf) = image() else { return };
    let words: Vec<u32> =
        elf.0[..32 << 10].as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let at = words.iter().position(|word| *word == 0xe852_50d6).expect("no multiboot2 header");
    assert_eq!(at % 2, 0);
    assert_eq!(words[at..at + 4].iter().fold(0u32, |sum, word| sum.wrapping_add(*word)), 0);
}
