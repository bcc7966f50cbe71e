//! `runik-gpu-host`: a GPU for one unikernel guest.
//!
//! Listens on a unix socket, which the VMM connects to a console or a socket device of the guest; serves the first guest
//! that comes, and ends with it. Start one for each guest, before the VMM.
#![deny(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gpu_kernels::driver::Driver;
use gpu_kernels::emu::{Emulator, Options};
use uk_broker::metrics::Metrics;
use uk_broker::privileges::{self, Identity};
use uk_broker::{GuestWindow, Limits, serve};

const HELP: &str = "\
usage: runik-gpu-host --socket PATH [options]

  --socket PATH      unix socket to listen on; for vsock-style VMMs the guest's port is part of it: PATH_5000
  --ram FILE         the guest's RAM (QEMU: memory-backend-file,share=on), for copies in place
  --device NAME      emu: the emulator on this machine's cores (default), emu:90 as a GPU of Hopper; cuda or cuda:N: an
                     NVIDIA GPU
  --memory BYTES     memory that the guest may have at most, the device's and the host's together
  --host-memory BYTES
                     memory of the host's that it may have pinned or managed of that (4 GiB)
  --user UID:GID     become this user before a guest is listened to
  --metrics FILE     write counters there, in Prometheus' format, every second and at the end
";

/// How often counters are written.
const METRICS_EVERY: Duration = Duration::from_secs(1);

struct Args {
    socket: PathBuf,
    ram: Option<PathBuf>,
    device: String,
    limits: Limits,
    identity: Option<Identity>,
    metrics: Option<PathBuf>,
}

fn parse(args: impl Iterator<Item = String>) -> Result<Option<Args>, String> {
    let mut args = args;
    let mut parsed = Args {
        socket: PathBuf::new(),
        ram: None,
        device: String::from("emu"),
        limits: Limits::default(),
        identity: None,
        metrics: None,
    };
    while let Some(name) = args.next() {
        if name == "--help" || name == "-h" {
            return Ok(None);
        }
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let bad = |expected: &str| format!("{name} {value:?}: expected {expected}");
        match name.as_str() {
            "--socket" => parsed.socket = PathBuf::from(&value),
            "--ram" => parsed.ram = Some(PathBuf::from(&value)),
            "--device" => parsed.device = value,
            "--memory" => parsed.limits.memory_bytes = value.parse().map_err(|_| bad("a number of bytes"))?,
            "--host-memory" => {
                parsed.limits.host_bytes = value.parse().map_err(|_| bad("a number of bytes"))?
            }
            "--user" => {
                let ids =
                    value.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
                let (uid, gid) = ids.ok_or_else(|| bad("UID:GID, both numbers"))?;
                parsed.identity = Some(Identity { uid, gid });
            }
            "--metrics" => parsed.metrics = Some(PathBuf::from(&value)),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if parsed.socket.as_os_str().is_empty() {
        return Err(String::from("--socket is missing"));
    }
    Ok(Some(parsed))
}

fn open(device: &str) -> Result<Box<dyn Driver>, String> {
    match device {
        "emu" => Ok(Box::new(Emulator::new(Options::default()))),
        "emu:90" => Ok(Box::new(Emulator::new(Options { sm: 90, ..Options::default() }))),
        other => hosted(other),
    }
}

/// `cuda` or `cuda:N`.
#[cfg(feature = "cuda")]
fn hosted(device: &str) -> Result<Box<dyn Driver>, String> {
    let number = match device.split_once(':') {
        None if device == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let number = number.ok_or_else(|| format!("--device {device:?}: expected emu, cuda or cuda:N"))?;
    let driver = engine::backends::cuda::hosted::Hosted::open(number).map_err(|error| error.to_string())?;
    Ok(Box::new(driver))
}

#[cfg(not(feature = "cuda"))]
fn hosted(device: &str) -> Result<Box<dyn Driver>, String> {
    Err(format!(
        "--device {device:?}: this build has emu only; build with --features cuda,ptx for NVIDIA GPUs"
    ))
}

fn run(args: Args) -> Result<(), String> {
    let driver = open(&args.device)?;
    let at = |path: &Path| format!("{}: ", path.display());
    let mut window = match &args.ram {
        Some(path) => Some(GuestWindow::open(path).map_err(|error| at(path) + &error.to_string())?),
        None => None,
    };
    if let Some(window) = &mut window
        && let Err(error) = window.register(&*driver)
    {
        eprintln!(
            "runik-gpu-host: the guest's RAM cannot be pinned ({error}); copies go through this process"
        );
    }
    // A socket of a broker that was killed.
    let _ = std::fs::remove_file(&args.socket);
    let listener = UnixListener::bind(&args.socket).map_err(|error| at(&args.socket) + &error.to_string())?;
    privileges::drop(args.identity).map_err(|error| format!("giving up privileges: {error}"))?;
    eprintln!("runik-gpu-host: {} for a guest at {}", driver.info().name, args.socket.display());
    let (stream, _) = listener.accept().map_err(|error| at(&args.socket) + &error.to_string())?;
    let metrics = Metrics::default();
    let done = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        let reporter = args.metrics.as_ref().map(|path| {
            let (metrics, done) = (&metrics, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Acquire) {
                    std::thread::park_timeout(METRICS_EVERY);
                    write_metrics(path, metrics);
                }
                write_metrics(path, metrics);
            })
        });
        let reader = stream.try_clone().map_err(|error| error.to_string());
        let served = reader.and_then(|reader| {
            serve(reader, &stream, &*driver, window.as_ref(), args.limits, &metrics)
                .map_err(|error| error.to_string())
        });
        done.store(true, Ordering::Release);
        if let Some(reporter) = reporter {
            // It writes a last time and ends.
            reporter.thread().unpark();
        }
        served
    });
    if let Some(window) = &mut window {
        window.unregister(&*driver).map_err(|error| error.to_string())?;
    }
    // Gone with the guest; a leftover would only look like a broker.
    let _ = std::fs::remove_file(&args.socket);
    served
}

/// Replaces the file at once, so that a reader never sees half of it.
fn write_metrics(path: &Path, metrics: &Metrics) {
    let new = path.with_extension("new");
    let written = std::fs::write(&new, metrics.to_string()).and_then(|()| std::fs::rename(&new, path));
    if let Err(error) = written {
        eprintln!("runik-gpu-host: {}: {error}", path.display());
    }
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        Ok(None) => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Ok(Some(args)) => match run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(what) => {
                eprintln!("runik-gpu-host: {what}");
                ExitCode::from(1)
            }
        },
        Err(what) => {
            eprintln!("runik-gpu-host: {what}\n\n{HELP}");
            ExitCode::from(2)
        }
    }
}
