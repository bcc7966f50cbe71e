//! Both ends of the GPU protocol with a hostile other end: for the fuzz targets, and for the tests that replay what they
//! found.

use std::io::{self, Read};
use std::time::Duration;

use gpu_kernels::driver::{Driver, EventId, MemKind, ModuleId, StreamId};
use gpu_kernels::emu::{Emulator, Options};
use gpu_kernels::launch::{DevicePtr, Launch, Params};
use runtime_uk::{Link, LinkError, RemoteDriver};
use uk_broker::metrics::Metrics;
use uk_broker::{Limits, serve};

/// A broker that hears these bytes from its guest ends, whatever they are, and gives back all that the guest had.
pub fn broker(bytes: &[u8]) {
    let driver = Emulator::new(Options::default());
    // Little, so that a guest that asks for much is refused, not served slowly.
    let limits = Limits { memory_bytes: 1 << 20, host_bytes: 1 << 20, allocations: 16, handles: 16 };
    let metrics = Metrics::default();
    // What it says of the guest is its own matter; that it comes back is what counts.
    let _ = serve(bytes, io::sink(), &driver, None, limits, &metrics);
}

/// A link from which these bytes come, and then nothing more.
struct Script(io::Cursor<Vec<u8>>);

impl Link for Script {
    fn send(&mut self, _bytes: &[u8]) -> Result<(), LinkError> {
        Ok(())
    }
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, LinkError> {
        match self.0.read(into) {
            Ok(0) if !into.is_empty() => Err(LinkError::Closed),
            Ok(n) => Ok(n),
            Err(_) => Err(LinkError::Device),
        }
    }
    fn pause(&mut self) {}
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// A guest that hears these bytes from its broker goes on with errors, or with numbers that mean nothing.
pub fn guest(bytes: &[u8]) {
    let link = Script(io::Cursor::new(bytes.to_vec()));
    let Ok(driver) = RemoteDriver::open(Box::new(link), None, 0) else { return };
    assert!(driver.info().name.len() <= 64);
    let at = driver.alloc(MemKind::Device, 4096).unwrap_or(DevicePtr(4096));
    let launch =
        Launch { entry: "k", grid: [1; 3], cta: 32, cluster: 1, smem_bytes: 0, params: Params::new() };
    let mut back = vec![0; 300];
    let stream = driver.create_stream().unwrap_or(StreamId::DEFAULT);
    // Results are the broker's to invent; none of them may be a panic.
    let _ = driver.write(at, &[1; 300], stream);
    let _ = driver.launch(ModuleId(0), &launch, stream);
    let _ = driver.read(&mut back, at, stream);
    let _ = driver.is_done(EventId(1));
    let _ = driver.free(at);
    let _ = driver.synchronise(stream);
}
