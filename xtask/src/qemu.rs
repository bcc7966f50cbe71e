//! `cargo xtask qemu`: boots the image with a model, on QEMU, and forwards a port to it.
//!
//! Always by QEMU's own translator (TCG), which every machine can run; `--kvm` asks for the processor's help. With
//! `--gpu` a broker is started first, and the guest's RAM is a file that both map.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::apt;
use crate::error::TaskError;
use crate::fetch;
use crate::image;
use crate::process;
use crate::wheel::Scratch;
use crate::workspace::Workspace;

/// Arguments.
pub const ARGS: &str = "[--model FILE] [--machine q35|pc|microvm] [--cores N] [--memory MIB] [--port N] [--gpu emu] [--kvm] [-- WORDS]";
/// One line of help.
pub const HELP: &str = "boot the image with a model (SmolLM2) on QEMU; WORDS go to its command line";
/// Debian's package of QEMU, and of what its machines boot with.
pub const PACKAGES: &[&str] = &["qemu-system-x86", "seabios"];
/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Makes a CD that boots by GRUB.
pub const GRUB: &str = "grub-mkrescue";
/// Debian's packages of it.
pub const GRUB_PACKAGES: &[&str] = &["grub-pc-bin", "grub-common", "xorriso", "mtools"];
/// How long a broker may take to listen.
const BROKER_PATIENCE: Duration = Duration::from_secs(20);

struct Options {
    model: Option<PathBuf>,
    machine: String,
    cores: String,
    memory_mib: Option<u64>,
    port: String,
    gpu: Option<String>,
    kvm: bool,
    words: Vec<String>,
}

/// Boots.
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let options = parse(args)?;
    need(PROGRAM, PACKAGES)?;
    let model = match &options.model {
        Some(path) => path.clone(),
        None => fetch::smollm2()?,
    };
    let image = image::build(workspace)?;
    let bytes = std::fs::metadata(&model).map_err(TaskError::path("look at", &model))?.len();
    // Beside the model: its copy by QEMU, the KV cache, and activations.
    let memory_mib = options.memory_mib.unwrap_or((bytes >> 20) + 768);
    let scratch = Scratch::create(std::env::temp_dir().join(format!("runik-qemu-{}", std::process::id())))?;
    let mut qemu = Command::new(PROGRAM);
    qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    if options.kvm {
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        qemu.args(["-accel", "tcg", "-cpu", "max"]);
    }
    let micro = options.machine == "microvm";
    let kind = |name: &str| format!("{name}-{}", if micro { "device" } else { "pci" });
    qemu.args(["-m", &memory_mib.to_string(), "-smp", &options.cores]);
    qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
    qemu.arg("-netdev").arg(format!("user,id=net,hostfwd=tcp:127.0.0.1:{0}-:{0}", options.port));
    qemu.arg("-device").arg(format!("{},netdev=net", kind("virtio-net")));
    qemu.arg("-kernel").arg(&image).arg("-initrd").arg(&model);
    let mut words = format!("port={}", options.port);
    let broker = match &options.gpu {
        None => {
            qemu.args(["-M", &options.machine]);
            None
        }
        Some(device) => {
            let (ram, socket) = (ram_file(&scratch, memory_mib)?, scratch.0.join("gpu"));
            let broker = start_broker(workspace, device, &ram.0, &socket)?;
            qemu.arg("-M").arg(format!("{},memory-backend=ram", options.machine));
            qemu.arg("-object").arg(format!(
                "memory-backend-file,id=ram,mem-path={},size={memory_mib}M,share=on",
                ram.0.display()
            ));
            qemu.arg("-chardev").arg(format!("socket,id=gpu,path={}", socket.display()));
            qemu.arg("-device").arg(format!("{},max_ports=1", kind("virtio-serial")));
            qemu.args(["-device", "virtconsole,chardev=gpu"]);
            words += " device=gpu";
            Some((broker, ram))
        }
    };
    for word in &options.words {
        words.push(' ');
        words.push_str(word);
    }
    qemu.arg("-append").arg(words);
    eprintln!("{}\n", process::line(&qemu));
    let body = r#"{"messages":[{"role":"user","content":"Why is the sky blue?"}],"max_tokens":40}"#;
    eprintln!("when it listens: curl http://127.0.0.1:{}/v1/chat/completions -d '{body}'", options.port);
    eprintln!("to end it: ctrl-c\n");
    let ended = process::run(&mut qemu);
    if let Some((mut broker, _ram)) = broker {
        // It ends with its guest.
        broker.wait().map_err(TaskError::io("wait for the broker"))?;
    }
    ended
}

/// A file in memory, gone with the value.
struct RamFile(PathBuf);

impl Drop for RamFile {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The guest's RAM as a file: in /dev/shm where there is one, for drivers pin no disk file's pages.
fn ram_file(scratch: &Scratch, memory_mib: u64) -> Result<RamFile, TaskError> {
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { shm } else { &scratch.0 };
    let path = folder.join(format!("runik-ram-{}", std::process::id()));
    let file = RamFile(path);
    let made = std::fs::File::create(&file.0).and_then(|made| made.set_len(memory_mib << 20));
    made.map_err(TaskError::path("make the guest's RAM", &file.0))?;
    Ok(file)
}

fn start_broker(workspace: &Workspace, device: &str, ram: &Path, socket: &Path) -> Result<Child, TaskError> {
    let mut build = workspace.cargo();
    process::run(build.args(["build", "--quiet", "--release", "-p", "uk-broker"]))?;
    let mut broker = Command::new(workspace.target().join("release").join("runik-gpu-host"));
    broker.arg("--device").arg(device).arg("--ram").arg(ram).arg("--socket").arg(socket);
    let mut child = broker.spawn().map_err(TaskError::io(format!("start `{}`", process::line(&broker))))?;
    let started = Instant::now();
    while !socket.exists() {
        let ended = child.try_wait().map_err(TaskError::io("look after the broker"))?;
        if ended.is_some() || started.elapsed() > BROKER_PATIENCE {
            let what = String::from("it does not listen; its own message is above");
            return Err(TaskError::Output { line: process::line(&broker), what });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

/// Makes sure that a program runs, with Debian's packages if need be.
pub fn need(program: &str, packages: &[&str]) -> Result<(), TaskError> {
    if process::works(Command::new(program).arg("--version")) {
        return Ok(());
    }
    apt::install(packages).map_err(|what| TaskError::Missing {
        what: format!("{program} is not installed ({what})"),
        fix: apt::line(packages),
    })
}

fn parse(args: &[String]) -> Result<Options, TaskError> {
    let mut options = Options {
        model: None,
        machine: "q35".into(),
        cores: "2".into(),
        memory_mib: None,
        port: "8080".into(),
        gpu: None,
        kvm: false,
        words: Vec::new(),
    };
    let usage = |what: String| TaskError::Usage { what: format!("{what}\nusage: cargo xtask qemu {ARGS}") };
    let mut args = args.iter();
    while let Some(name) = args.next() {
        match name.as_str() {
            "--kvm" => options.kvm = true,
            "--" => options.words.extend(args.by_ref().cloned()),
            _ => {
                let value = args.next().ok_or_else(|| usage(format!("{name} needs a value")))?.clone();
                match name.as_str() {
                    "--model" => options.model = Some(value.into()),
                    "--machine" => options.machine = value,
                    "--cores" => options.cores = value,
                    "--memory" => {
                        let mib =
                            value.parse().map_err(|_| usage(format!("--memory {value}: expected MiB")))?;
                        options.memory_mib = Some(mib);
                    }
                    "--port" => options.port = value,
                    "--gpu" => options.gpu = Some(value),
                    _ => return Err(usage(format!("qemu does not know {name:?}"))),
                }
            }
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_after_the_dashes_are_the_guests() {
        let args: Vec<String> =
            ["--machine", "microvm", "--kvm", "--", "predict=4", "--x"].map(String::from).into();
        let options = parse(&args).unwrap();
        assert_eq!((options.machine.as_str(), options.kvm), ("microvm", true));
        assert_eq!(options.words, ["predict=4", "--x"]);
        for bad in [&["--floppy", "1"][..], &["--memory", "much"], &["--port"]] {
            let bad: Vec<String> = bad.iter().map(|word| word.to_string()).collect();
            assert!(matches!(parse(&bad), Err(TaskError::Usage { .. })), "{bad:?}");
        }
    }
}
