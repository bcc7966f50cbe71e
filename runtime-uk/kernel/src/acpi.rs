//! ACPI: from the root pointer to the list of processors. Nothing else is asked of it.
//!
//! Tables are claims of the firmware: lengths and checksums are checked, and a table that does not hold leaves the
//! machine with the processor that it booted on. ACPI 6.5, sections 5.2.5 to 5.2.12.

use heapless::Vec;

use crate::memory::Physical;

/// Processors at most: as many as xAPIC can name.
pub const MAX_CPUS: usize = 255;
/// A table longer than this is not believed.
const MAX_TABLE_BYTES: usize = 1 << 20;

/// Where the list of tables is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    at: u64,
    /// Whether its entries have 64 bits (XSDT) or 32 (RSDT).
    wide: bool,
}

impl Root {
    /// Bytes that [`Root::read`] looks at.
    pub const BYTES: usize = 36;

    /// Reads a root pointer (RSDP) of version 1 (20 bytes) or later.
    pub fn read(rsdp: &[u8]) -> Option<Root> {
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let first = rsdp.get(..20)?;
        if &first[..8] != b"RSD PTR " || sum(first) != 0 {
            return None;
        }
        if let (2.., Some(whole)) = (first[15], rsdp.get(..Root::BYTES)) {
            let at = u64::from_le_bytes(whole[24..32].try_into().ok()?);
            if sum(whole) == 0 && at != 0 {
                return Some(Root { at, wide: true });
            }
        }
        Some(Root { at: u32::from_le_bytes(first[16..20].try_into().ok()?).into(), wide: false })
    }
}

/// The APIC numbers of all usable processors; empty if the tables do not say.
pub fn processors(root: Root, memory: &impl Physical) -> Vec<u32, MAX_CPUS> {
    find(root, memory, b"APIC").map(apic_ids).unwrap_or_default()
}

/// The table with a signature.
fn find<'m>(root: Root, memory: &'m impl Physical, signature: &[u8; 4]) -> Option<&'m [u8]> {
    let list = table(memory, root.at)?;
    let width = if root.wide { 8 } else { 4 };
    list.get(36..)?.chunks_exact(width).find_map(|entry| {
        let mut at = [0; 8];
        at[..width].copy_from_slice(entry);
        table(memory, u64::from_le_bytes(at)).filter(|bytes| bytes.starts_with(signature))
    })
}

/// A table whose length and checksum hold.
fn table(memory: &impl Physical, at: u64) -> Option<&[u8]> {
    let head = memory.bytes(at, 36)?;
    let len = u32::from_le_bytes(head[4..8].try_into().ok()?) as usize;
    if !(36..=MAX_TABLE_BYTES).contains(&len) {
        return None;
    }
    let bytes = memory.bytes(at, len)?;
    (bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0).then_some(bytes)
}

/// Entries of the MADT that describe processors: local APIC (0) and local x2APIC (9), if enabled.
fn apic_ids(madt: &[u8]) -> Vec<u32, MAX_CPUS> {
    let mut ids = Vec::new();
    let mut rest = madt.get(44..).unwrap_or_default();
    while let [kind, len, ..] = *rest {
        let Some(entry) = rest.get(..usize::from(len)).filter(|entry| entry.len() >= 2) else { break };
        let word = |at: usize| {
            entry.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).unwrap_or_default()
        };
        let id = match kind {
            0 if word(4) & 1 != 0 => Some(u32::from(entry[3])),
            9 if word(8) & 1 != 0 => Some(word(4)),
            _ => None,
        };
        if let Some(id) = id
            && ids.push(id).is_err()
        {
            break;
        }
        rest = &rest[usize::from(len)..];
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::Pieces;
    use std::vec::Vec as Bytes;

    fn checksummed(mut bytes: Bytes<u8>, at: usize) -> Bytes<u8> {
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        bytes[at] = bytes[at].wrapping_sub(sum);
        bytes
    }

    fn table(signature: &[u8; 4], body: &[u8]) -> Bytes<u8> {
        let mut bytes = signature.to_vec();
        bytes.extend((36 + body.len() as u32).to_le_bytes());
        bytes.resize(36, 0);
        bytes.extend(body);
        checksummed(bytes, 9)
    }

    fn machine() -> Pieces {
        let mut rsdp = b"RSD PTR \0QEMU  \0".to_vec();
        rsdp.extend(0x2000u32.to_le_bytes());
        let rsdt: Bytes<u8> = [0x3000u32, 0x4000].iter().flat_map(|at| at.to_le_bytes()).collect();
        let madt = [
            &[0, 0, 0xe0, 0xfe, 1, 0, 0, 0][..],
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[0, 8, 1, 1, 1, 0, 0, 0],
            // Not enabled, then an x2APIC.
            &[0, 8, 2, 2, 0, 0, 0, 0],
            &[9, 16, 0, 0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        Pieces(std::vec![
            (0x1000, checksummed(rsdp, 8)),
            (0x2000, table(b"RSDT", &rsdt)),
            (0x3000, table(b"FACP", &[0; 80])),
            (0x4000, table(b"APIC", &madt)),
        ])
    }

    #[test]
    fn processors_are_found() {
        let machine = machine();
        let root = Root::read(machine.bytes(0x1000, 20).unwrap()).unwrap();
        assert_eq!(root, Root { at: 0x2000, wide: false });
        assert_eq!(&processors(root, &machine)[..], [0, 1, 0x107]);
    }

    #[test]
    fn a_bad_table_leaves_none() {
        let mut machine = machine();
        machine.0[3].1[50] ^= 1;
        assert!(processors(Root { at: 0x2000, wide: false }, &machine).is_empty());
        assert_eq!(Root::read(&machine.0[3].1), None);
    }

    #[test]
    fn entries_of_no_length_end_the_list() {
        assert_eq!(&apic_ids(&[&[0; 44][..], &[0, 8, 0, 3, 1, 0, 0, 0], &[0, 0]].concat())[..], [3]);
    }
}
