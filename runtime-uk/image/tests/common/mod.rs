//! Guests on QEMU, always by its own translator (TCG), and what the hosted engine says to the same prompt.
#![allow(dead_code)] // each test binary uses its part

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::backend::Backend;
use engine::backends::cpu::{Cpu, Isa};
use engine::executor::Serial;
use engine::sampler::argmax;
use engine::tokenizer::EncodeOptions;
use engine::weights::ByteSource;
use engine::{Batch, Context, ContextParams, Model};

/// No guest here takes a tenth of this on an idle machine; a hanging one must not hang the tests.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a guest test needs; `None` (said aloud) where something is missing.
pub struct Setup {
    pub image: PathBuf,
    pub tiny: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// Guests take turns: each has a core or two of its own, and so may the machine.
static TURN: Mutex<()> = Mutex::new(());

pub fn setup() -> Option<Setup> {
    let Some(image) = std::env::var_os("RUNIK_IMAGE").map(PathBuf::from) else {
        println!("skipped: no image (`cargo xtask image` builds one; set RUNIK_IMAGE to its path)");
        return None;
    };
    if !Command::new("qemu-system-x86_64").arg("--version").output().is_ok_and(|out| out.status.success()) {
        println!("skipped: no qemu-system-x86_64 (Debian: apt-get install qemu-system-x86 seabios)");
        return None;
    }
    let goldens = std::env::var_os("RUNIK_GOLDENS")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/goldens"));
    let tiny = goldens.join("tiny");
    if !tiny.is_dir() {
        println!("skipped: no golden data at {} (set RUNIK_GOLDENS)", goldens.display());
        return None;
    }
    Some(Setup { image, tiny, _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner) })
}

/// A guest's command line for QEMU.
pub struct Guest {
    pub machine: &'static str,
    pub memory_mib: u32,
    pub cores: u32,
    pub cpu: &'static str,
    pub words: String,
    pub args: Vec<String>,
}

impl Guest {
    pub fn new(machine: &'static str, words: &str) -> Guest {
        Guest { machine, memory_mib: 256, cores: 1, cpu: "max", words: words.into(), args: Vec::new() }
    }

    pub fn arg(mut self, args: &[&str]) -> Guest {
        self.args.extend(args.iter().map(|arg| arg.to_string()));
        self
    }

    pub fn module(self, path: &Path) -> Guest {
        self.arg(&["-initrd", path.to_str().unwrap()])
    }

    /// The name of a virtio device on this machine's bus.
    pub fn device(&self, name: &str) -> String {
        format!("{name}-{}", if self.machine.starts_with("microvm") { "device" } else { "pci" })
    }

    /// A network card, and the address on the host that is forwarded to the guest's port 8080.
    pub fn network(self) -> (Guest, String) {
        // Free now, and nobody else takes one by its number.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let net = format!("user,id=net,hostfwd=tcp:{free}-:8080");
        let device = format!("{},netdev=net", self.device("virtio-net"));
        (self.arg(&["-netdev", &net, "-device", &device]), free.to_string())
    }

    /// Boots the image.
    pub fn boot(&self, image: &Path) -> Running {
        let kernel = ["-kernel", image.to_str().unwrap(), "-append", &self.words].map(String::from);
        self.start(&kernel)
    }

    /// Boots whatever the arguments say.
    pub fn start(&self, more: &[String]) -> Running {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-M", self.machine, "-cpu", self.cpu]);
        command.args(["-m", &self.memory_mib.to_string(), "-smp", &self.cores.to_string()]);
        command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        command.args(&self.args).args(more);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (send, lines) = channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_string();
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines, log: Vec::new(), until: Instant::now() + PATIENCE }
    }
}

/// A guest that runs. It is ended when the value goes.
pub struct Running {
    pub child: Child,
    lines: Receiver<String>,
    pub log: Vec<String>,
    until: Instant,
}

impl Running {
    /// Waits for a line with this in it; the line.
    pub fn wait_for(&mut self, what: &str) -> String {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if line.contains(what) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {what:?} in time:\n{}", self.text()),
                Err(RecvTimeoutError::Disconnected) => panic!("no {what:?} before the end:\n{}", self.text()),
            }
        }
    }

    /// Waits until it serves. QEMU takes connections before the guest has an address, and drops them.
    pub fn wait_until_it_serves(&mut self) {
        self.wait_for("listening on port 8080");
        if !self.text().contains("address 10.0.2.15/24") {
            self.wait_for("address 10.0.2.15/24");
        }
    }

    /// Waits for the end; QEMU's exit status.
    pub fn end(&mut self) -> i32 {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.log.push(line),
                Err(RecvTimeoutError::Timeout) => panic!("the guest hangs:\n{}", self.text()),
                Err(RecvTimeoutError::Disconnected) => {
                    return self.child.wait().unwrap().code().unwrap_or(-1);
                }
            }
        }
    }

    pub fn text(&self) -> String {
        self.log.join("\n")
    }

    /// The tokens that the guest says it generated.
    pub fn tokens(&self) -> Vec<u32> {
        let line = self.log.iter().find_map(|line| line.split_once("tokens [").map(|(_, rest)| rest));
        let list = line.and_then(|rest| rest.strip_suffix(']'));
        let list = list.unwrap_or_else(|| panic!("no tokens:\n{}", self.text()));
        list.split(", ").map(|id| id.parse().unwrap()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's exit status for the image's own: see `uk_kernel::exit`.
pub const DONE: i32 = 1;
pub const FAILED: i32 = 3;
pub const PANIC: i32 = 5;
pub const FAULT: i32 = 7;

/// Greedy tokens of the hosted engine, as `answer.rs` of the image makes them.
pub fn hosted(path: &Path, prompt: &str, n_predict: usize, n_ctx: usize) -> Vec<u32> {
    hosted_on(path, prompt, n_predict, n_ctx, |model| {
        Box::new(Cpu::new(model.weights().clone(), Arc::new(Serial), Isa::detect()))
    })
}

/// The same on any back end.
pub fn hosted_on(
    path: &Path,
    prompt: &str,
    n_predict: usize,
    n_ctx: usize,
    backend: impl FnOnce(&Model) -> Box<dyn Backend>,
) -> Vec<u32> {
    let bytes: Arc<dyn ByteSource> = Arc::new(std::fs::read(path).unwrap());
    let model = Arc::new(Model::load(vec![bytes]).unwrap());
    let backend = backend(&model);
    let params = ContextParams { n_ctx, ..ContextParams::default() };
    let mut context = Context::new(model.clone(), backend, params).unwrap();
    let options = EncodeOptions { add_special: true, parse_special: true };
    let ids = model.tokenizer().encode(prompt.as_bytes(), options).unwrap();
    context.decode(&Batch::prompt(0, &ids)).unwrap();
    let mut tokens = Vec::new();
    loop {
        let token = argmax(context.output(0));
        if model.tokenizer().is_eog(token) || tokens.len() == n_predict {
            return tokens;
        }
        tokens.push(token);
        let mut batch = Batch::default();
        batch.push_generated(0, token);
        context.decode(&batch).unwrap();
    }
}

/// A file for one test, gone with the value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("runik-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
