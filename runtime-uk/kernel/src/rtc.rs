//! The date, from the PC's battery clock (MC146818), which QEMU and Cloud Hypervisor have and Firecracker does not. Only
//! what clients see as an answer's date depends on it.

use crate::port;

/// Register numbers, in the order of [`Date`]'s fields.
const FIELDS: [u8; 6] = [0x00, 0x02, 0x04, 0x07, 0x08, 0x09];
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
/// An update is under way, in status A.
const UPDATING: u8 = 0x80;
/// Numbers are binary, hours count to 24: in status B.
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Afternoon, where hours count to 12.
const AFTERNOON: u8 = 0x80;
/// Reads before the clock is taken for absent; an update takes 2 ms, a read 1 µs.
const PATIENCE: u32 = 100_000;

/// Seconds, minutes, hours, day of the month, month, year of the century.
type Date = [u8; 6];

fn register(index: u8) -> u8 {
    // SAFETY: the clock has no access to memory. The top bit of the index would mask NMIs, and stays clear.
    unsafe {
        port::write_u8(0x70, index);
        port::read_u8(0x71)
    }
}

/// Seconds since 1970; `None` where there is no clock, or none that makes sense.
pub fn read() -> Option<u64> {
    let read = || {
        let waits = (0..PATIENCE).find(|_| register(STATUS_A) & UPDATING == 0);
        waits.map(|_| FIELDS.map(register))
    };
    // An update between two reads shows as a difference.
    let date = (0..3).find_map(|_| read().filter(|date| read() == Some(*date)))?;
    seconds(date, register(STATUS_B))
}

fn seconds(date: Date, status: u8) -> Option<u64> {
    let number = |value: u8| match status & BINARY {
        0 if value & 0xf > 9 || value >> 4 > 9 => None,
        0 => Some(u64::from((value >> 4) * 10 + (value & 0xf))),
        _ => Some(u64::from(value)),
    };
    let [second, minute, hour, day, month, year] = date;
    let hour = match status & HOURS_24 {
        0 => number(hour & !AFTERNOON)? % 12 + if hour & AFTERNOON != 0 { 12 } else { 0 },
        _ => number(hour)?,
    };
    let (second, minute, day, month) = (number(second)?, number(minute)?, number(day)?, number(month)?);
    let year = 2000 + number(year)?;
    let valid =
        second < 60 && minute < 60 && hour < 24 && (1..=31).contains(&day) && (1..=12).contains(&month);
    // Days before the month in a year that begins in March, as Howard Hinnant's days_from_civil counts them.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    // From 0000-03-01 to 1970-01-01.
    valid.then(|| (days - 719_468) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_seconds() {
        let binary = BINARY | HOURS_24;
        assert_eq!(seconds([0, 0, 0, 1, 1, 0], binary), Some(946_684_800));
        assert_eq!(seconds([59, 59, 23, 29, 2, 24], binary), Some(1_709_251_199));
        // The same evening in other words: decimal digits, hours to 12.
        assert_eq!(seconds([0x59, 0x59, 0x11 | AFTERNOON, 0x29, 0x02, 0x24], 0), Some(1_709_251_199));
        assert_eq!(seconds([0x00, 0x30, 0x12, 0x31, 0x12, 0x99], 0), Some(4_102_360_200));
    }

    #[test]
    fn what_is_no_date_is_none() {
        // What an absent device reads as.
        assert_eq!(seconds([0xff; 6], 0xff), None);
        assert_eq!(seconds([0; 6], 0), None);
        assert_eq!(seconds([0, 0, 0, 1, 13, 0], BINARY | HOURS_24), None);
    }
}
