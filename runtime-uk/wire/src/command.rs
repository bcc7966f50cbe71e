//! Descriptors: what a guest may ask of its broker, one to four slots each.
//!
//! ```text
//! 0   u16  operation
//! 2   u8   slots, this one included
//! 3   u8   kind of memory, or 0
//! 4   u32  stream, event, graph or kernel
//! 8   …    the operation's fields, in order
//! ```
//!
//! Handles are the broker's numbers, addresses the device's. A kernel is named once and then numbered.

use crate::fields::{Put, Take};
use crate::{SLOT_BYTES, Slot, WireError};

/// Slots of the longest descriptor.
pub const MAX_SLOTS: usize = 4;
/// Bytes of a kernel's arguments at most: what fits behind the fields of a launch.
pub const MAX_PARAM_BYTES: usize = MAX_SLOTS * SLOT_BYTES - LAUNCH_BYTES;
/// Bytes of a kernel's name at most.
pub const MAX_NAME_BYTES: usize = MAX_SLOTS * SLOT_BYTES - 16;
/// Bytes of a launch's fields before its arguments.
const LAUNCH_BYTES: usize = 40;

/// Where the bytes of a copy are on the host: in the window, or in the submission's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Offset of the first.
    pub at: u64,
    /// How many.
    pub bytes: u64,
}

impl Data {
    fn parse(take: &mut Take<'_>) -> Result<Data, WireError> {
        let data = Data { at: take.u64(), bytes: take.u64() };
        if data.at.checked_add(data.bytes).is_none() {
            return Err(WireError::Field { what: "end of a piece of data", got: data.at });
        }
        Ok(data)
    }
}

/// Kinds of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Page-locked host memory of the broker's.
    Host = 1,
    /// The device's.
    Device = 2,
    /// Pages that move.
    Managed = 3,
}

/// Bytes with a length, in a fixed place: a name or arguments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Short<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Short<N> {
    /// A copy; `None` if it does not fit.
    pub fn new(from: &[u8]) -> Option<Short<N>> {
        let mut bytes = [0; N];
        bytes.get_mut(..from.len())?.copy_from_slice(from);
        Some(Short { bytes, len: from.len() })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl<const N: usize> core::fmt::Debug for Short<N> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:02x?}", self.as_slice())
    }
}

/// How a launch is ordered with the others of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It starts when the one before has ended.
    Alone = 0,
    /// All its CTAs run at once.
    Cooperative = 1,
    /// It may start beside the one before: its kernel waits itself.
    Early = 2,
}

/// A kernel's launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's number.
    pub kernel: u32,
    /// Stream.
    pub stream: u32,
    /// CTAs, per dimension.
    pub grid: [u32; 3],
    /// Threads per CTA.
    pub cta: u32,
    /// CTAs per cluster.
    pub cluster: u32,
    /// Dynamic shared memory per CTA.
    pub smem_bytes: u32,
    /// When it may start.
    pub how: How,
    /// Arguments, laid out as the kernel takes them.
    pub params: Short<MAX_PARAM_BYTES>,
}

/// What a guest may ask. The result that a reply brings is said where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Memory; its address.
    Alloc {
        /// Which.
        kind: Kind,
        /// How much.
        bytes: u64,
    },
    /// Memory for work queued later on the stream; its address.
    AllocAsync {
        /// How much.
        bytes: u64,
        /// Stream.
        stream: u32,
    },
    /// Gives memory back.
    Free {
        /// Its address.
        at: u64,
    },
    /// Gives memory back when the stream's work so far is done.
    FreeAsync {
        /// Its address.
        at: u64,
        /// Stream.
        stream: u32,
    },
    /// Bytes of device memory left to this guest.
    FreeBytes,
    /// Copies to the device.
    Write {
        /// Device address.
        to: u64,
        /// The bytes.
        from: Data,
        /// Stream.
        stream: u32,
    },
    /// Copies from the device, after the stream's work so far.
    Read {
        /// Device address.
        from: u64,
        /// Where the bytes go.
        to: Data,
        /// Stream.
        stream: u32,
    },
    /// Writes host or managed memory at once.
    WriteHost {
        /// Its address.
        to: u64,
        /// The bytes.
        from: Data,
    },
    /// Reads host or managed memory at once.
    ReadHost {
        /// Its address.
        from: u64,
        /// Where the bytes go.
        to: Data,
    },
    /// Copies between addresses.
    Copy {
        /// To.
        to: u64,
        /// From.
        from: u64,
        /// How much.
        bytes: u64,
        /// Stream.
        stream: u32,
    },
    /// Sets every byte.
    Fill {
        /// Address.
        at: u64,
        /// Bytes.
        bytes: u64,
        /// The value.
        byte: u8,
        /// Stream.
        stream: u32,
    },
    /// Names a kernel; its number.
    Kernel {
        /// Its name.
        name: Short<MAX_NAME_BYTES>,
    },
    /// Launches a kernel.
    Launch(Launch),
    /// How many CTAs of a cooperative launch the device holds.
    ResidentCtas(Launch),
    /// A new stream; its number.
    CreateStream,
    /// Releases a stream.
    ReleaseStream {
        /// Its number.
        stream: u32,
    },
    /// Waits for a stream's work.
    Synchronise {
        /// Its number.
        stream: u32,
    },
    /// Marks a point; the event's number.
    Record {
        /// Stream.
        stream: u32,
    },
    /// Marks a point with an event that there is.
    RecordAgain {
        /// The event.
        event: u32,
        /// Stream.
        stream: u32,
    },
    /// Lets a stream wait.
    Wait {
        /// The event.
        event: u32,
        /// Stream.
        stream: u32,
    },
    /// Waits for an event.
    SynchroniseEvent {
        /// The event.
        event: u32,
    },
    /// Whether an event's point is reached: 0 or 1.
    IsDone {
        /// The event.
        event: u32,
    },
    /// Nanoseconds between two events.
    Elapsed {
        /// The first.
        from: u32,
        /// The second.
        to: u32,
    },
    /// Releases an event.
    ReleaseEvent {
        /// The event.
        event: u32,
    },
    /// Records work instead of doing it.
    BeginCapture {
        /// Stream.
        stream: u32,
    },
    /// Ends the recording; the graph's number.
    EndCapture {
        /// Stream.
        stream: u32,
    },
    /// Launches recorded work.
    LaunchGraph {
        /// The graph.
        graph: u32,
        /// Stream.
        stream: u32,
    },
    /// Releases a graph.
    ReleaseGraph {
        /// The graph.
        graph: u32,
    },
    /// The words of the last failure; how many bytes there are.
    ErrorText {
        /// Where they go.
        to: Data,
    },
}

/// A descriptor as slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    slots: [Slot; MAX_SLOTS],
    n: usize,
}

impl Encoded {
    /// The slots in use.
    pub fn slots(&self) -> &[Slot] {
        &self.slots[..self.n]
    }
}

const ALLOC: u16 = 1;
const ALLOC_ASYNC: u16 = 2;
const FREE: u16 = 3;
const FREE_ASYNC: u16 = 4;
const FREE_BYTES: u16 = 5;
const WRITE: u16 = 6;
const READ: u16 = 7;
const WRITE_HOST: u16 = 8;
const READ_HOST: u16 = 9;
const COPY: u16 = 10;
const FILL: u16 = 11;
const KERNEL: u16 = 12;
const LAUNCH: u16 = 13;
const RESIDENT_CTAS: u16 = 14;
const CREATE_STREAM: u16 = 15;
const RELEASE_STREAM: u16 = 16;
const SYNCHRONISE: u16 = 17;
const RECORD: u16 = 18;
const RECORD_AGAIN: u16 = 19;
const WAIT: u16 = 20;
const SYNCHRONISE_EVENT: u16 = 21;
const IS_DONE: u16 = 22;
const ELAPSED: u16 = 23;
const RELEASE_EVENT: u16 = 24;
const BEGIN_CAPTURE: u16 = 25;
const END_CAPTURE: u16 = 26;
const LAUNCH_GRAPH: u16 = 27;
const RELEASE_GRAPH: u16 = 28;
const ERROR_TEXT: u16 = 29;

impl Command {
    /// As slots.
    pub fn encode(&self) -> Encoded {
        let mut bytes = [0; MAX_SLOTS * SLOT_BYTES];
        let n = self.slots();
        let (op, kind, handle) = match self {
            Command::Alloc { kind, .. } => (ALLOC, *kind as u8, 0),
            Command::AllocAsync { stream, .. } => (ALLOC_ASYNC, 0, *stream),
            Command::Free { .. } => (FREE, 0, 0),
            Command::FreeAsync { stream, .. } => (FREE_ASYNC, 0, *stream),
            Command::FreeBytes => (FREE_BYTES, 0, 0),
            Command::Write { stream, .. } => (WRITE, 0, *stream),
            Command::Read { stream, .. } => (READ, 0, *stream),
            Command::WriteHost { .. } => (WRITE_HOST, 0, 0),
            Command::ReadHost { .. } => (READ_HOST, 0, 0),
            Command::Copy { stream, .. } => (COPY, 0, *stream),
            Command::Fill { stream, .. } => (FILL, 0, *stream),
            Command::Kernel { .. } => (KERNEL, 0, 0),
            Command::Launch(launch) => (LAUNCH, 0, launch.stream),
            Command::ResidentCtas(launch) => (RESIDENT_CTAS, 0, launch.stream),
            Command::CreateStream => (CREATE_STREAM, 0, 0),
            Command::ReleaseStream { stream } => (RELEASE_STREAM, 0, *stream),
            Command::Synchronise { stream } => (SYNCHRONISE, 0, *stream),
            Command::Record { stream } => (RECORD, 0, *stream),
            Command::RecordAgain { stream, .. } => (RECORD_AGAIN, 0, *stream),
            Command::Wait { stream, .. } => (WAIT, 0, *stream),
            Command::SynchroniseEvent { event } => (SYNCHRONISE_EVENT, 0, *event),
            Command::IsDone { event } => (IS_DONE, 0, *event),
            Command::Elapsed { from, .. } => (ELAPSED, 0, *from),
            Command::ReleaseEvent { event } => (RELEASE_EVENT, 0, *event),
            Command::BeginCapture { stream } => (BEGIN_CAPTURE, 0, *stream),
            Command::EndCapture { stream } => (END_CAPTURE, 0, *stream),
            Command::LaunchGraph { stream, .. } => (LAUNCH_GRAPH, 0, *stream),
            Command::ReleaseGraph { graph } => (RELEASE_GRAPH, 0, *graph),
            Command::ErrorText { .. } => (ERROR_TEXT, 0, 0),
        };
        let body = Put::new(&mut bytes).u16(op).u8(n as u8).u8(kind).u32(handle);
        match *self {
            Command::Alloc { bytes, .. } | Command::AllocAsync { bytes, .. } => drop(body.u64(bytes)),
            Command::Free { at } | Command::FreeAsync { at, .. } => drop(body.u64(at)),
            Command::Write { to: address, from: data, .. }
            | Command::Read { from: address, to: data, .. }
            | Command::WriteHost { to: address, from: data }
            | Command::ReadHost { from: address, to: data } => {
                _ = body.u64(address).u64(data.at).u64(data.bytes);
            }
            Command::Copy { to, from, bytes, .. } => drop(body.u64(to).u64(from).u64(bytes)),
            Command::Fill { at, bytes, byte, .. } => drop(body.u64(at).u64(bytes).u8(byte)),
            Command::Kernel { name } => drop(body.u64(name.len as u64).bytes(name.as_slice())),
            Command::Launch(launch) | Command::ResidentCtas(launch) => {
                let [x, y, z] = launch.grid;
                let length = launch.params.len as u16;
                let body = body.u32(launch.kernel).u32(x).u32(y).u32(z).u32(launch.cta).u32(launch.cluster);
                let body = body.u32(launch.smem_bytes).u16(length).u16(launch.how as u16);
                _ = body.bytes(launch.params.as_slice());
            }
            Command::RecordAgain { event, .. } | Command::Wait { event, .. } => drop(body.u32(event)),
            Command::Elapsed { to, .. } => drop(body.u32(to)),
            Command::LaunchGraph { graph, .. } => drop(body.u32(graph)),
            Command::ErrorText { to } => drop(body.u64(to.at).u64(to.bytes)),
            Command::FreeBytes
            | Command::CreateStream
            | Command::ReleaseStream { .. }
            | Command::Synchronise { .. }
            | Command::Record { .. }
            | Command::SynchroniseEvent { .. }
            | Command::IsDone { .. }
            | Command::ReleaseEvent { .. }
            | Command::BeginCapture { .. }
            | Command::EndCapture { .. }
            | Command::ReleaseGraph { .. } => {}
        }
        let mut slots = [[0; SLOT_BYTES]; MAX_SLOTS];
        slots.as_flattened_mut().copy_from_slice(&bytes);
        Encoded { slots, n }
    }

    fn slots(&self) -> usize {
        let bytes = match self {
            Command::Kernel { name } => 16 + name.len,
            Command::Launch(launch) | Command::ResidentCtas(launch) => LAUNCH_BYTES + launch.params.len,
            _ => SLOT_BYTES,
        };
        bytes.div_ceil(SLOT_BYTES)
    }

    /// The descriptor at the beginning of `slots`, and how many it takes. At most [`MAX_SLOTS`] are looked at.
    pub fn parse(slots: &[Slot]) -> Result<(Command, usize), WireError> {
        let first = slots.first().ok_or(WireError::CutOff { slots: 1, got: 0 })?;
        let n = usize::from(first[2]);
        if !(1..=MAX_SLOTS).contains(&n) {
            return Err(WireError::Field { what: "slots of a descriptor", got: n as u64 });
        }
        let own = slots.get(..n).ok_or(WireError::CutOff { slots: n, got: slots.len() })?;
        let mut take = Take::new(own.as_flattened());
        let op = take.u16();
        take.u8();
        let kind = take.u8();
        let handle = take.u32();
        let command = Command::fields(op, kind, handle, &mut take)?;
        take.end()?;
        // A descriptor that could be shorter is another's bytes, or will mean something to a later version.
        if command.slots() != n {
            return Err(WireError::Field { what: "slots of a descriptor", got: n as u64 });
        }
        // Fields that the operation does not have must be zero: what is encoded again is what came.
        let same = command.encode().slots[0][..8] == first[..8];
        if same { Ok((command, n)) } else { Err(WireError::NotZero) }
    }

    fn fields(op: u16, kind: u8, handle: u32, take: &mut Take<'_>) -> Result<Command, WireError> {
        let stream = handle;
        Ok(match op {
            ALLOC => {
                let kind = match kind {
                    1 => Kind::Host,
                    2 => Kind::Device,
                    3 => Kind::Managed,
                    got => return Err(WireError::Field { what: "kind of memory", got: got.into() }),
                };
                Command::Alloc { kind, bytes: take.u64() }
            }
            ALLOC_ASYNC => Command::AllocAsync { bytes: take.u64(), stream },
            FREE => Command::Free { at: take.u64() },
            FREE_ASYNC => Command::FreeAsync { at: take.u64(), stream },
            FREE_BYTES => Command::FreeBytes,
            WRITE => Command::Write { to: take.u64(), from: Data::parse(take)?, stream },
            READ => Command::Read { from: take.u64(), to: Data::parse(take)?, stream },
            WRITE_HOST => Command::WriteHost { to: take.u64(), from: Data::parse(take)? },
            READ_HOST => Command::ReadHost { from: take.u64(), to: Data::parse(take)? },
            COPY => Command::Copy { to: take.u64(), from: take.u64(), bytes: take.u64(), stream },
            FILL => Command::Fill { at: take.u64(), bytes: take.u64(), byte: take.u8(), stream },
            KERNEL => {
                let got = take.u64();
                let bad = WireError::Field { what: "length of a name", got };
                let len =
                    usize::try_from(got).ok().filter(|n| (1..=MAX_NAME_BYTES).contains(n)).ok_or(bad)?;
                Command::Kernel { name: short(take, len).ok_or(bad)? }
            }
            LAUNCH => Command::Launch(launch(stream, take)?),
            RESIDENT_CTAS => Command::ResidentCtas(launch(stream, take)?),
            CREATE_STREAM => Command::CreateStream,
            RELEASE_STREAM => Command::ReleaseStream { stream },
            SYNCHRONISE => Command::Synchronise { stream },
            RECORD => Command::Record { stream },
            RECORD_AGAIN => Command::RecordAgain { event: take.u32(), stream },
            WAIT => Command::Wait { event: take.u32(), stream },
            SYNCHRONISE_EVENT => Command::SynchroniseEvent { event: handle },
            IS_DONE => Command::IsDone { event: handle },
            ELAPSED => Command::Elapsed { from: handle, to: take.u32() },
            RELEASE_EVENT => Command::ReleaseEvent { event: handle },
            BEGIN_CAPTURE => Command::BeginCapture { stream },
            END_CAPTURE => Command::EndCapture { stream },
            LAUNCH_GRAPH => Command::LaunchGraph { graph: take.u32(), stream },
            RELEASE_GRAPH => Command::ReleaseGraph { graph: handle },
            ERROR_TEXT => Command::ErrorText { to: Data::parse(take)? },
            number => return Err(WireError::Unknown { what: "command", number: number.into() }),
        })
    }
}

/// Bytes of a length that was checked; `None` if fewer came.
fn short<const N: usize>(take: &mut Take<'_>, len: usize) -> Option<Short<N>> {
    let bytes = take.bytes(len);
    if bytes.len() == len { Short::new(bytes) } else { None }
}

fn launch(stream: u32, take: &mut Take<'_>) -> Result<Launch, WireError> {
    let kernel = take.u32();
    let grid = [take.u32(), take.u32(), take.u32()];
    let (cta, cluster, smem_bytes) = (take.u32(), take.u32(), take.u32());
    let (len, how) = (take.u16(), take.u16());
    let how = match how {
        0 => How::Alone,
        1 => How::Cooperative,
        2 => How::Early,
        got => return Err(WireError::Field { what: "when a launch may start", got: got.into() }),
    };
    let bad = WireError::Field { what: "length of arguments", got: len.into() };
    let params = Some(len.into()).filter(|len| *len <= MAX_PARAM_BYTES).and_then(|len| short(take, len));
    let params = params.ok_or(bad)?;
    Ok(Launch { kernel, stream, grid, cta, cluster, smem_bytes, how, params })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// One of each kind, with fields that differ.
    fn examples() -> Vec<Command> {
        let data = Data { at: 1, bytes: 2 };
        let launch = |n: usize| Launch {
            kernel: 3,
            stream: 4,
            grid: [5, 6, 7],
            cta: 128,
            cluster: 2,
            smem_bytes: 8,
            how: [How::Alone, How::Cooperative, How::Early][n % 3],
            params: Short::new(&std::vec![9; n]).unwrap(),
        };
        let mut all = std::vec![
            Command::Alloc { kind: Kind::Managed, bytes: 1 << 40 },
            Command::AllocAsync { bytes: 5, stream: 6 },
            Command::Free { at: 7 },
            Command::FreeAsync { at: 8, stream: 9 },
            Command::FreeBytes,
            Command::Write { to: 10, from: data, stream: 11 },
            Command::Read { from: 12, to: data, stream: 13 },
            Command::WriteHost { to: 14, from: data },
            Command::ReadHost { from: 15, to: data },
            Command::Copy { to: 16, from: 17, bytes: 18, stream: 19 },
            Command::Fill { at: 20, bytes: 21, byte: 22, stream: 23 },
            Command::Kernel { name: Short::new(b"mmvq_Q4_0").unwrap() },
            Command::Kernel { name: Short::new(&[b'x'; MAX_NAME_BYTES]).unwrap() },
            Command::ResidentCtas(launch(3)),
            Command::CreateStream,
            Command::ReleaseStream { stream: 24 },
            Command::Synchronise { stream: 25 },
            Command::Record { stream: 26 },
            Command::RecordAgain { event: 27, stream: 28 },
            Command::Wait { event: 29, stream: 30 },
            Command::SynchroniseEvent { event: 31 },
            Command::IsDone { event: 32 },
            Command::Elapsed { from: 33, to: 34 },
            Command::ReleaseEvent { event: 35 },
            Command::BeginCapture { stream: 36 },
            Command::EndCapture { stream: 37 },
            Command::LaunchGraph { graph: 38, stream: 39 },
            Command::ReleaseGraph { graph: 40 },
            Command::ErrorText { to: data },
        ];
        all.extend([0, 23, 24, 25, 88, 89, 192, MAX_PARAM_BYTES].map(|n| Command::Launch(launch(n))));
        all
    }

    #[test]
    fn every_command_keeps_its_meaning() {
        for command in examples() {
            let encoded = command.encode();
            let n = encoded.slots().len();
            assert_eq!(Command::parse(encoded.slots()), Ok((command, n)), "{command:?}");
            // With others behind it; cut off it is an error.
            let mut more = encoded.slots().to_vec();
            more.push([0xff; SLOT_BYTES]);
            assert_eq!(Command::parse(&more), Ok((command, n)));
            assert!(Command::parse(&encoded.slots()[..n - 1]).is_err());
        }
    }

    #[test]
    fn stray_bits_are_refused() {
        for command in examples() {
            let slots = command.encode().slots().to_vec();
            for bit in 0..8 * slots.as_flattened().len() {
                let mut changed = slots.clone();
                changed.as_flattened_mut()[bit / 8] ^= 1 << (bit % 8);
                match Command::parse(&changed) {
                    Err(_) => {}
                    // Another value of a field, and nothing lost of what was sent.
                    Ok((other, n)) => {
                        assert_ne!(other, command);
                        assert_eq!(other.encode().slots(), &changed[..n]);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_slots_are_refused_or_say_the_same_again(
            bytes in prop::collection::vec(any::<u8>(), 256),
            op in 0u8..32,
            n in 0u8..6,
            zero_from in 0usize..256,
        ) {
            let mut slots = [[0; SLOT_BYTES]; MAX_SLOTS];
            slots.as_flattened_mut().copy_from_slice(&bytes);
            slots.as_flattened_mut()[zero_from..].fill(0);
            slots[0][..4].copy_from_slice(&[op, 0, n, 0]);
            if let Ok((command, used)) = Command::parse(&slots) {
                let again = command.encode();
                prop_assert_eq!(again.slots(), &slots[..used]);
            }
        }
    }
}
