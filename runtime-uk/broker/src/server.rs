//! The protocol's host side: one guest, from its greeting to its end.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use gpu_kernels::driver::{Driver, DriverError};
use gpu_kernels::launch::DevicePtr;
use uk_wire::command::{Command, MAX_SLOTS};
use uk_wire::frame::{Frame, Hello, NameBytes, Welcome};
use uk_wire::ring::RingPlace;
use uk_wire::{SLOT_BYTES, Slot, Status, WireError};

use crate::device::{Device, Host, Limits};
use crate::metrics::Metrics;
use crate::window::GuestWindow;

/// How often a guest hears that its work goes on.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// Why serving a guest ended before the guest did.
#[derive(Debug)]
pub enum BrokerError {
    /// The link.
    Io(io::Error),
    /// The guest's bytes are no message.
    Wire(WireError),
    /// The guest's messages make no sense together.
    Protocol(&'static str),
    /// The driver, when everything was given back.
    Driver(DriverError),
}

impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BrokerError::Io(error) => write!(f, "the link to the guest: {error}"),
            BrokerError::Wire(error) => write!(f, "the guest's message: {error}"),
            BrokerError::Protocol(what) => write!(f, "the guest broke the protocol: {what}"),
            BrokerError::Driver(error) => write!(f, "cleaning up after the guest: {error}"),
        }
    }
}

impl std::error::Error for BrokerError {}

impl From<io::Error> for BrokerError {
    fn from(error: io::Error) -> BrokerError {
        BrokerError::Io(error)
    }
}

impl From<WireError> for BrokerError {
    fn from(error: WireError) -> BrokerError {
        BrokerError::Wire(error)
    }
}

/// Serves a guest until it goes; then gives back all that it had. The window must be registered already, if it is to be.
pub fn serve(
    mut from: impl Read,
    to: impl Write + Send,
    driver: &dyn Driver,
    window: Option<&GuestWindow>,
    limits: Limits,
    metrics: &Metrics,
) -> Result<(), BrokerError> {
    let mut first = [0; SLOT_BYTES];
    from.read_exact(&mut first)?;
    let hello = Hello::parse(&first)?;
    let ring = match (hello.ring, window) {
        (None, _) => None,
        (Some(_), None) => return Err(BrokerError::Protocol("it has a window, this broker was given none")),
        (Some(place), Some(window)) => {
            let fits = window.shared().has(place.at, RingPlace::bytes(place.slots) as u64);
            if !fits {
                return Err(BrokerError::Protocol("its ring is not in the window"));
            }
            Some((place, window))
        }
    };
    let to = Mutex::new(to);
    send(&to, &welcome(driver, ring.map(|(_, window)| window)).encode())?;
    let mut device = Device::new(driver, limits, metrics);
    let served = with_heartbeat(&to, |busy| {
        let mut session = Session { from, to: &to, device: &mut device, metrics, done: 0, busy };
        match ring {
            Some((place, window)) => session.run_ring(place, window),
            None => session.run_inline(),
        }
    });
    if matches!(served, Err(BrokerError::Wire(_) | BrokerError::Protocol(_))) {
        // It may be gone already; then there is nobody to tell.
        let _ = send(&to, &Frame::End.encode());
    }
    let closed = device.close().map_err(BrokerError::Driver);
    served.and(closed)
}

fn welcome(driver: &dyn Driver, window: Option<&GuestWindow>) -> Welcome {
    let info = driver.info();
    Welcome {
        sm: info.sm,
        n_sm: info.n_sm,
        memory_bytes: info.memory_bytes,
        l2_bytes: info.l2_bytes,
        smem_per_cta_bytes: info.smem_per_cta_bytes,
        smem_per_sm_bytes: info.smem_per_sm_bytes,
        registers_per_sm: info.registers_per_sm,
        threads_per_sm: info.threads_per_sm,
        driver_version: info.driver_version,
        kernels: gpu_kernels::ptx::BUILD,
        window_address: window.and_then(GuestWindow::address).unwrap_or(DevicePtr::NULL).0,
        window_bytes: window.map_or(0, |window| window.shared().len() as u64),
        name: NameBytes::new(&info.name),
    }
}

fn send(to: &Mutex<impl Write>, bytes: &[u8]) -> io::Result<()> {
    let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
    to.write_all(bytes)?;
    to.flush()
}

/// What the heartbeat is told.
enum Work {
    Began,
    Ended,
}

/// Runs the session with a second thread that says [`Frame::Alive`] during long work.
fn with_heartbeat<W: Write + Send, T>(to: &Mutex<W>, run: impl FnOnce(mpsc::Sender<Work>) -> T) -> T {
    let (busy, told) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut working = false;
            loop {
                match told.recv_timeout(if working { ALIVE_EVERY } else { Duration::MAX }) {
                    Ok(Work::Began) => working = true,
                    Ok(Work::Ended) => working = false,
                    // A guest that is gone shows at the next read.
                    Err(RecvTimeoutError::Timeout) => drop(send(to, &Frame::Alive.encode())),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        run(busy)
    })
}

struct Session<'a, 'd, R, W> {
    from: R,
    to: &'a Mutex<W>,
    device: &'a mut Device<'d>,
    metrics: &'a Metrics,
    /// Slots of all submissions so far.
    done: u64,
    busy: mpsc::Sender<Work>,
}

impl<R: Read, W: Write> Session<'_, '_, R, W> {
    /// The next submission; `None` when the guest is gone.
    fn submission(&mut self) -> Result<Option<(u64, u32, u32, u32)>, BrokerError> {
        let mut slot = [0; SLOT_BYTES];
        match self.from.read_exact(&mut slot) {
            Ok(()) => {}
            Err(error)
                if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        match Frame::parse(&slot)? {
            Frame::Submit { to, slots, data_bytes, reply_bytes } => {
                Ok(Some((to, slots, data_bytes, reply_bytes)))
            }
            _ => Err(BrokerError::Protocol("it sent a frame that only a broker sends")),
        }
    }

    fn run_ring(&mut self, place: RingPlace, window: &GuestWindow) -> Result<(), BrokerError> {
        let shared = window.shared();
        while let Some((to, slots, data_bytes, reply_bytes)) = self.submission()? {
            let n = to.checked_sub(self.done).filter(|n| *n <= place.slots.into());
            let n = n.ok_or(BrokerError::Protocol("it submitted more slots than the ring has"))? as usize;
            if (slots, data_bytes, reply_bytes) != (0, 0, 0) {
                return Err(BrokerError::Protocol("it sends inline what belongs into the window"));
            }
            let started = self.begin();
            // Copied out before anything is looked at: the guest may write at any time.
            let commands: Vec<Slot> =
                (self.done..to).map(|number| shared.slot(place.command(number))).collect();
            let replies = self.work(&commands, n, &mut Host::Window(window))?;
            for (reply, number) in replies.iter().zip(self.done..) {
                shared.write(place.reply(number), reply);
            }
            self.done = to;
            shared.store_release(place.done(), to);
            self.end(started);
        }
        Ok(())
    }

    fn run_inline(&mut self) -> Result<(), BrokerError> {
        while let Some((to, slots, data_bytes, reply_bytes)) = self.submission()? {
            if to.checked_sub(self.done) != Some(slots.into()) {
                return Err(BrokerError::Protocol("its count of slots is not that of the slots it sent"));
            }
            // Lengths are bounded by the frame's parser.
            let mut commands = vec![[0; SLOT_BYTES]; slots as usize];
            self.from.read_exact(commands.as_flattened_mut())?;
            let mut data = vec![0; data_bytes as usize];
            self.from.read_exact(&mut data)?;
            let started = self.begin();
            let mut reply = vec![0; reply_bytes as usize];
            let mut host = Host::Inline { data: &data, reply: &mut reply };
            let replies = self.work(&commands, slots as usize, &mut host)?;
            self.done = to;
            self.end(started);
            let complete = Frame::Complete { to, slots, data_bytes: reply_bytes };
            let bytes = [&complete.encode()[..], replies.as_flattened(), &reply].concat();
            send(self.to, &bytes)?;
        }
        Ok(())
    }

    fn begin(&self) -> Instant {
        Metrics::add(&self.metrics.submissions, 1);
        // The heartbeat lives as long as the session.
        let _ = self.busy.send(Work::Began);
        Instant::now()
    }

    fn end(&self, started: Instant) {
        let _ = self.busy.send(Work::Ended);
        Metrics::add(&self.metrics.busy_ns, started.elapsed().as_nanos() as u64);
    }

    /// Does a submission's commands; the replies, in the places of the commands' first slots.
    fn work(&mut self, commands: &[Slot], n: usize, host: &mut Host<'_>) -> Result<Vec<Slot>, BrokerError> {
        let mut replies = vec![[0; SLOT_BYTES]; n];
        let mut at = 0;
        let mut last = 0;
        while at < n {
            let (command, used) = Command::parse(&commands[at..n.min(at + MAX_SLOTS)])?;
            replies[at] = self.device.execute(&command, host).encode();
            (last, at) = (at, at + used);
        }
        if let Err(error) = self.device.settle()
            && n > 0
        {
            // Copies that were queued by some command failed: the last one says so.
            let status =
                if matches!(error, DriverError::Lost { .. }) { Status::Lost } else { Status::Driver };
            replies[last] = uk_wire::Reply::failed(status, 0).encode();
        }
        Ok(replies)
    }
}
