//! A guest's side of the protocol: commands are collected, submitted with one doorbell, and waited for.
//!
//! At most one submission is under way, so staging memory and the ring are free again whenever [`Session::flush`] returns.
//! A broker that neither finishes nor says that it is alive for [`PATIENCE`] is given up: every later call fails at once.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;

use gpu_kernels::driver::DriverError;
use uk_wire::command::{Command, Data};
use uk_wire::frame::{Frame, Hello, MAX_INLINE_BYTES, WELCOME_BYTES, Welcome};
use uk_wire::ring::RingPlace;
use uk_wire::shared::Shared;
use uk_wire::{Reply, SLOT_BYTES, Slot, Status};

use crate::link::{Link, LinkError, Window};

/// Slots of the ring: a step of a model without graphs, some 500 launches of two slots, fits.
const RING_SLOTS: u32 = 2048;
/// Memory that data passes through which is small or not in the window.
pub const STAGING_BYTES: usize = MAX_INLINE_BYTES as usize;
/// A broker is silent for at most so long. It says every second that it is alive.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the counter is looked at before others get the core.
const SPIN: Duration = Duration::from_micros(20);
/// Bytes of a failure's text that are asked for.
const TEXT_BYTES: usize = 1024;

/// The guest's memory that the broker reads and writes.
struct Ring {
    place: RingPlace,
    /// The ring, then the staging memory, at `place.at` of the window.
    memory: Shared,
}

impl Ring {
    /// Offset in `memory` of an offset in the window.
    fn local(&self, at: u64) -> u64 {
        at - self.place.at
    }

    fn staging(&self) -> u64 {
        RingPlace::bytes(self.place.slots) as u64
    }

    /// Submits commands, of which the first has the number `from`, and waits; the replies take the commands' places.
    fn submit_and_wait(
        &self,
        link: &mut dyn Link,
        frames: &mut Frames,
        slots: &mut [Slot],
        from: u64,
    ) -> Result<(), String> {
        let to = from + slots.len() as u64;
        for (slot, number) in slots.iter().zip(from..) {
            self.memory.write(self.local(self.place.command(number)), slot);
        }
        // The doorbell orders the writes above before the broker's reads: it is a system call or a device's exit, and
        // the fence holds the compiler and other cores to it.
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        let doorbell = Frame::Submit { to, slots: 0, data_bytes: 0, reply_bytes: 0 };
        link.send(&doorbell.encode()).map_err(|error| error.to_string())?;
        let mut spin_until = link.now() + SPIN;
        let mut give_up = link.now() + PATIENCE;
        loop {
            let done = self.memory.load_acquire(self.local(self.place.done()));
            if done == to {
                break;
            }
            if done > to {
                return Err(alloc::format!("the broker says that {done} slots of {to} are done"));
            }
            let now = link.now();
            if now < spin_until {
                core::hint::spin_loop();
                continue;
            }
            match frames.poll(link)? {
                Some(Frame::Alive) => give_up = now + PATIENCE,
                Some(Frame::End) => return Err(String::from("the broker ended the session")),
                Some(other) => return Err(alloc::format!("the broker sent {other:?}")),
                None if now > give_up => return Err(silent()),
                None => link.pause(),
            }
            spin_until = now;
        }
        for (slot, number) in slots.iter_mut().zip(from..) {
            *slot = self.memory.slot(self.local(self.place.reply(number)));
        }
        Ok(())
    }
}

/// Puts frames together, which may come in pieces.
#[derive(Default)]
struct Frames {
    /// The bytes of a frame that is not whole yet.
    partial: Vec<u8>,
}

impl Frames {
    /// The next frame, if all of it has come.
    fn poll(&mut self, link: &mut dyn Link) -> Result<Option<Frame>, String> {
        let mut slot = [0; SLOT_BYTES];
        let had = self.partial.len();
        let got = link.receive(&mut slot[had..]).map_err(|error| error.to_string())?;
        self.partial.extend_from_slice(&slot[had..had + got]);
        if self.partial.len() < SLOT_BYTES {
            return Ok(None);
        }
        slot.copy_from_slice(&self.partial);
        self.partial.clear();
        Frame::parse(&slot).map(Some).map_err(|error| error.to_string())
    }
}

/// The connection.
pub struct Session {
    link: Box<dyn Link>,
    window: Option<Box<dyn Window>>,
    ring: Option<Ring>,
    /// Slots of all submissions.
    submitted: u64,
    /// Commands not yet submitted, with what each is called.
    pending: Vec<Slot>,
    starts: Vec<(usize, &'static str)>,
    /// Bytes of staging memory in use.
    staged: usize,
    /// Data of the next submission, without a window.
    outgoing: Vec<u8>,
    /// Data of the last replies, without a window.
    incoming: Vec<u8>,
    frames: Frames,
    /// Why nothing works any more.
    dead: Option<String>,
}

/// Memory for the ring and the staging area, aligned for its words and for the broker's cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; SLOT_BYTES]);

impl Session {
    /// Greets the broker; with a window if there is one.
    pub fn open(
        link: Box<dyn Link>,
        window: Option<Box<dyn Window>>,
    ) -> Result<(Session, Welcome), DriverError> {
        let ring = match &window {
            Some(window) => Some(ring_in(&**window).ok_or_else(|| DriverError::NoDriver {
                what: "the heap is not in memory that the broker maps".to_string(),
            })?),
            None => None,
        };
        let mut session = Session {
            link,
            window,
            ring,
            submitted: 0,
            pending: Vec::with_capacity(RING_SLOTS as usize),
            starts: Vec::with_capacity(RING_SLOTS as usize),
            staged: 0,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            frames: Frames::default(),
            dead: None,
        };
        let hello = Hello { ring: session.ring.as_ref().map(|ring| ring.place) };
        let no_driver = |what: String| DriverError::NoDriver { what };
        session.link.send(&hello.encode()).map_err(|error| no_driver(error.to_string()))?;
        let mut bytes = [0; WELCOME_BYTES];
        session.receive_all(&mut bytes).map_err(no_driver)?;
        let welcome = Welcome::parse(&bytes).map_err(|error| no_driver(error.to_string()))?;
        Ok((session, welcome))
    }

    /// Adds a command; goes out with the next flush.
    pub fn push(&mut self, op: &'static str, command: Command) -> Result<(), DriverError> {
        let encoded = command.encode();
        if self.pending.len() + encoded.slots().len() > RING_SLOTS as usize {
            self.flush()?;
        }
        self.starts.push((self.pending.len(), op));
        self.pending.extend_from_slice(encoded.slots());
        Ok(())
    }

    /// Adds a command and waits for its result. What went wrong before it is reported first.
    pub fn call(&mut self, op: &'static str, command: Command) -> Result<u64, DriverError> {
        self.push(op, command)?;
        self.flush()
    }

    /// Submits all commands and waits; the result of the last, or the first failure.
    pub fn flush(&mut self) -> Result<u64, DriverError> {
        let result = self.exchange(0);
        self.settle(result)
    }

    /// Puts bytes where the broker finds them. At most [`STAGING_BYTES`].
    pub fn stage(&mut self, bytes: &[u8]) -> Result<Data, DriverError> {
        if self.staged + bytes.len() > STAGING_BYTES {
            self.flush()?;
        }
        let at = match &self.ring {
            Some(ring) => {
                let at = ring.staging() + self.staged as u64;
                ring.memory.write(at, bytes);
                ring.place.at + at
            }
            None => {
                self.outgoing.extend_from_slice(bytes);
                self.staged as u64
            }
        };
        // Words for the copy's speed.
        self.staged = if self.ring.is_some() {
            (self.staged + bytes.len()).next_multiple_of(8)
        } else {
            self.outgoing.len()
        };
        Ok(Data { at, bytes: bytes.len() as u64 })
    }

    /// The window's place of memory of the caller's.
    pub fn place(&self, at: *const u8, bytes: usize) -> Option<Data> {
        let at = self.window.as_ref()?.offset(at, bytes)?;
        Some(Data { at, bytes: bytes as u64 })
    }

    /// A command that brings bytes, at most [`STAGING_BYTES`]; waits for them.
    pub fn fetch(
        &mut self,
        op: &'static str,
        to: &mut [u8],
        command: impl FnOnce(Data) -> Command,
    ) -> Result<u64, DriverError> {
        // The bytes must not land on data that is still to be sent.
        if self.staged + to.len() > STAGING_BYTES {
            self.flush()?;
        }
        let bytes = to.len() as u64;
        let at = match &self.ring {
            Some(ring) => ring.place.at + ring.staging() + self.staged as u64,
            None => 0,
        };
        self.push(op, command(Data { at, bytes }))?;
        let result = self.exchange(to.len());
        let value = self.settle(result)?;
        match &self.ring {
            Some(ring) => ring.memory.read(ring.local(at), to),
            None => match self.incoming.get(..to.len()) {
                Some(incoming) => to.copy_from_slice(incoming),
                None => return Err(self.lost(op, "the broker sent fewer bytes than were asked for")),
            },
        }
        Ok(value)
    }

    /// The first failure with its words, which are another question to the broker.
    fn settle(&mut self, result: Result<u64, Failure>) -> Result<u64, DriverError> {
        match result {
            Ok(value) => Ok(value),
            Err(Failure::Dead(op)) => {
                let what = self.dead.clone().unwrap_or_default();
                Err(DriverError::Lost { op, code: 0, what })
            }
            Err(Failure::Reply(op, reply)) => {
                let mut text = [0; TEXT_BYTES];
                let n = self.text(&mut text);
                let what = String::from_utf8_lossy(&text[..n]).into_owned();
                Err(error_of(op, reply, what))
            }
        }
    }

    fn text(&mut self, into: &mut [u8; TEXT_BYTES]) -> usize {
        let bytes = TEXT_BYTES as u64;
        let at = self.ring.as_ref().map_or(0, |ring| ring.place.at + ring.staging());
        let slots = Command::ErrorText { to: Data { at, bytes } }.encode();
        self.starts.push((0, "error_text"));
        self.pending.extend_from_slice(slots.slots());
        let Ok(n) = self.exchange(TEXT_BYTES) else { return 0 };
        match &self.ring {
            Some(ring) => ring.memory.read(ring.staging(), into),
            None => into.iter_mut().zip(&self.incoming).for_each(|(to, from)| *to = *from),
        }
        TEXT_BYTES.min(usize::try_from(n).unwrap_or(TEXT_BYTES))
    }

    /// One submission and its replies.
    fn exchange(&mut self, reply_bytes: usize) -> Result<u64, Failure> {
        let Some(&(_, last)) = self.starts.last() else { return Ok(0) };
        let result = if self.dead.is_some() {
            Err(())
        } else {
            self.submit_and_wait(reply_bytes).map_err(|what| self.dead = Some(what))
        };
        let outcome = match result {
            Err(()) => Err(Failure::Dead(last)),
            Ok(()) => self.outcome(),
        };
        self.pending.clear();
        self.starts.clear();
        self.outgoing.clear();
        self.staged = 0;
        outcome
    }

    /// After a submission `pending` holds the replies, in the places of the commands.
    fn outcome(&mut self) -> Result<u64, Failure> {
        let mut value = 0;
        for &(start, op) in &self.starts {
            match Reply::parse(&self.pending[start]) {
                Ok(Reply { status: Status::Done, value: got, .. }) => value = got,
                Ok(reply) => return Err(Failure::Reply(op, reply)),
                Err(error) => {
                    self.dead = Some(error.to_string());
                    return Err(Failure::Dead(op));
                }
            }
        }
        Ok(value)
    }

    fn submit_and_wait(&mut self, reply_bytes: usize) -> Result<(), String> {
        let from = self.submitted;
        let to = from + self.pending.len() as u64;
        match &self.ring {
            Some(ring) => ring.submit_and_wait(&mut *self.link, &mut self.frames, &mut self.pending, from)?,
            None => self.submit_inline(to, reply_bytes)?,
        }
        self.submitted = to;
        Ok(())
    }

    fn submit_inline(&mut self, to: u64, reply_bytes: usize) -> Result<(), String> {
        let closed = |error: LinkError| error.to_string();
        let slots = self.pending.len() as u32;
        let frame = Frame::Submit {
            to,
            slots,
            data_bytes: self.outgoing.len() as u32,
            reply_bytes: reply_bytes as u32,
        };
        self.link.send(&frame.encode()).map_err(closed)?;
        self.link.send(self.pending.as_flattened()).map_err(closed)?;
        self.link.send(&self.outgoing).map_err(closed)?;
        let mut give_up = self.link.now() + PATIENCE;
        loop {
            match self.frames.poll(&mut *self.link)? {
                Some(Frame::Alive) => give_up = self.link.now() + PATIENCE,
                Some(Frame::Complete { to: done, slots: n, data_bytes }) if done == to && n == slots => {
                    let mut replies = vec![0; n as usize * SLOT_BYTES];
                    self.receive_all(&mut replies)?;
                    self.pending.as_flattened_mut().copy_from_slice(&replies);
                    let mut incoming = core::mem::take(&mut self.incoming);
                    incoming.resize(data_bytes as usize, 0);
                    self.receive_all(&mut incoming)?;
                    self.incoming = incoming;
                    return Ok(());
                }
                Some(Frame::End) => return Err(String::from("the broker ended the session")),
                Some(other) => return Err(alloc::format!("the broker sent {other:?}")),
                None if self.link.now() > give_up => return Err(silent()),
                None => self.link.pause(),
            }
        }
    }

    fn receive_all(&mut self, mut into: &mut [u8]) -> Result<(), String> {
        let mut give_up = self.link.now() + PATIENCE;
        while !into.is_empty() {
            match self.link.receive(into).map_err(|error| error.to_string())? {
                0 if self.link.now() > give_up => return Err(silent()),
                0 => self.link.pause(),
                n => {
                    into = &mut into[n..];
                    give_up = self.link.now() + PATIENCE;
                }
            }
        }
        Ok(())
    }

    fn lost(&mut self, op: &'static str, what: &str) -> DriverError {
        self.dead = Some(what.to_string());
        DriverError::Lost { op, code: 0, what: what.to_string() }
    }
}

/// Why an exchange brought no result.
enum Failure {
    /// The session is over.
    Dead(&'static str),
    /// The first command that failed.
    Reply(&'static str, Reply),
}

fn silent() -> String {
    alloc::format!("the broker has been silent for {} s", PATIENCE.as_secs())
}

#[allow(unsafe_code)]
fn ring_in(window: &dyn Window) -> Option<Ring> {
    let lines = RingPlace::bytes(RING_SLOTS).div_ceil(SLOT_BYTES) + STAGING_BYTES / SLOT_BYTES;
    // The broker may write to it for as long as it lives, which nobody here knows the end of: never given back.
    let memory: &'static mut [Line] = Box::leak(vec![Line([0; SLOT_BYTES]); lines].into_boxed_slice());
    let bytes = size_of_val(memory);
    let at = memory.as_mut_ptr().cast::<u8>();
    let place = RingPlace::new(window.offset(at, bytes)?, RING_SLOTS).ok()?;
    // SAFETY: the memory lives for ever, is aligned to 64, and its only reference ended with the pointer's making.
    Some(Ring { place, memory: unsafe { Shared::new(at, bytes) } })
}

/// A reply as the engine's error.
fn error_of(op: &'static str, reply: Reply, what: String) -> DriverError {
    use gpu_kernels::driver::MemKind;
    use gpu_kernels::launch::DevicePtr;
    match reply.status {
        Status::OutOfMemory => DriverError::OutOfMemory { kind: MemKind::Device, bytes: reply.value },
        Status::Address => DriverError::Address { op, at: DevicePtr(reply.value), bytes: 0 },
        Status::Handle => DriverError::Handle { what: op, id: reply.value as u32 },
        Status::NoKernel => DriverError::NoKernel { entry: what },
        Status::Launch => DriverError::Launch { entry: op, what },
        Status::Kernel => DriverError::Kernel { entry: op.to_string(), what },
        Status::Unsupported => DriverError::Unsupported { op },
        Status::Capture => DriverError::Capture { op },
        Status::Lost => DriverError::Lost { op, code: reply.code, what },
        Status::Done | Status::Refused | Status::Driver => DriverError::Driver { op, code: reply.code, what },
    }
}
