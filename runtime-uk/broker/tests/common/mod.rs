//! A guest and its broker in one process, over a pair of sockets.
#![allow(dead_code)] // each test binary uses its part

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gpu_kernels::case;
use gpu_kernels::driver::{Driver, DriverError};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::ptx::BUILD;
use gpu_kernels::registry;
use runtime_uk::{Link, LinkError, RemoteDriver, Window};
use uk_broker::metrics::Metrics;
use uk_broker::{BrokerError, GuestWindow, Limits, serve};

/// A link over a socket, in pieces of at most `most` bytes.
pub struct SocketLink {
    pub socket: UnixStream,
    pub most: usize,
    pub started: Instant,
}

impl SocketLink {
    pub fn new(socket: UnixStream, most: usize) -> SocketLink {
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        SocketLink { socket, most, started: Instant::now() }
    }
}

impl Link for SocketLink {
    fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        bytes
            .chunks(self.most)
            .try_for_each(|piece| self.socket.write_all(piece).map_err(|_| LinkError::Closed))
    }
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, LinkError> {
        let most = into.len().min(self.most);
        match self.socket.read(&mut into[..most]) {
            Ok(0) => Err(LinkError::Closed),
            Ok(n) => Ok(n),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(0),
            Err(_) => Err(LinkError::Closed),
        }
    }
    fn pause(&mut self) {}
    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

/// A reader that gives few bytes at a time.
pub struct Short(pub UnixStream, pub usize);

impl Read for Short {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(self.1);
        self.0.read(&mut into[..most])
    }
}

/// A broker on the emulator, on a thread.
pub struct Broker {
    pub thread: JoinHandle<Result<(), BrokerError>>,
    pub metrics: Arc<Metrics>,
}

impl Broker {
    /// Ends when the guest's end of the socket is dropped.
    pub fn start(
        socket: UnixStream,
        most: usize,
        window: Option<GuestWindow>,
        register: bool,
        limits: Limits,
    ) -> Broker {
        let metrics = Arc::new(Metrics::default());
        let counters = metrics.clone();
        let thread = std::thread::spawn(move || {
            let driver = Emulator::new(Options::default());
            let mut window = window;
            if register && let Some(window) = &mut window {
                window.register(&driver).unwrap();
            }
            let reader = Short(socket.try_clone().unwrap(), most);
            let result = serve(reader, socket, &driver, window.as_ref(), limits, &counters);
            if let Some(window) = &mut window {
                window.unregister(&driver).unwrap();
            }
            result
        });
        Broker { thread, metrics }
    }

    /// Waits for its end; nothing of the guest's is left.
    pub fn end(self) -> Result<(), BrokerError> {
        self.thread.join().unwrap()
    }
}

/// A guest and its broker without a window.
pub fn inline(most: usize, limits: Limits) -> (RemoteDriver, Broker) {
    let (guest, host) = UnixStream::pair().unwrap();
    let broker = Broker::start(host, most, None, false, limits);
    (RemoteDriver::open(Box::new(SocketLink::new(guest, most)), None, BUILD).unwrap(), broker)
}

/// A guest of another build, and its broker.
pub fn of_another_build() -> (Result<RemoteDriver, DriverError>, Broker) {
    let (guest, host) = UnixStream::pair().unwrap();
    let broker = Broker::start(host, 4096, None, false, Limits::default());
    (RemoteDriver::open(Box::new(SocketLink::new(guest, 4096)), None, BUILD ^ 1), broker)
}

/// With a window.
pub fn windowed(window: Box<dyn Window>, map: GuestWindow, register: bool) -> (RemoteDriver, Broker) {
    let (guest, host) = UnixStream::pair().unwrap();
    let broker = Broker::start(host, 4096, Some(map), register, Limits::default());
    (RemoteDriver::open(Box::new(SocketLink::new(guest, 4096)), Some(window), BUILD).unwrap(), broker)
}

/// Runs cases of a kernel on a driver.
pub fn run_cases(driver: &dyn Driver, kernel: &str, n: usize) {
    let kernel = registry::find(kernel).unwrap();
    let module = driver.builtin().unwrap();
    for i in 0..kernel.n_cases().min(n) {
        let problem = kernel.problem(i, 7);
        case::run(driver, module, &problem, kernel.nmse_max())
            .unwrap_or_else(|error| panic!("{}: {error}", kernel.label(i)));
    }
}

pub fn count(counter: &std::sync::atomic::AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

pub fn is_lost<T: std::fmt::Debug>(result: Result<T, DriverError>) -> bool {
    matches!(result, Err(DriverError::Lost { .. }))
}
