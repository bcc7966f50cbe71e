//! A guest on QEMU whose GPU is a broker's emulator.

#[path = "../../image/tests/common/mod.rs"]
mod guests;
#[path = "../../../cli/tests/common/http.rs"]
mod http;

use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backends::cuda::Cuda;
use engine::executor::Serial;
use gpu_kernels::emu::{Emulator, Options};
use guests::{DONE, FAILED, Guest, Running, Scratch, hosted_on, setup};
use http::Client;

/// A broker process, the guest's RAM, and the socket between them.
struct Broker {
    child: Child,
    ram: Scratch,
    socket: Scratch,
    metrics: Scratch,
}

impl Broker {
    fn start(name: &str, memory_mib: u64) -> Broker {
        Broker::of(name, memory_mib, "emu")
    }

    fn of(name: &str, memory_mib: u64, device: &str) -> Broker {
        let mut ram = Scratch::new(&format!("{name}-ram"));
        if PathBuf::from("/dev/shm").is_dir() {
            ram = Scratch(PathBuf::from("/dev/shm").join(ram.0.file_name().unwrap()));
        }
        let (socket, metrics) =
            (Scratch::new(&format!("{name}-gpu")), Scratch::new(&format!("{name}-metrics")));
        std::fs::File::create(&ram.0).unwrap().set_len(memory_mib << 20).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_runik-gpu-host"));
        command.arg("--socket").arg(&socket.0).arg("--ram").arg(&ram.0).arg("--metrics").arg(&metrics.0);
        let child = command.args(["--device", device]).spawn().unwrap();
        let started = Instant::now();
        while !socket.0.exists() {
            assert!(started.elapsed() < Duration::from_secs(20), "the broker does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Broker { child, ram, socket, metrics }
    }

    fn boot(&self, machine: &'static str, memory_mib: u32, image: &std::path::Path, words: &str) -> Running {
        self.boot_with(machine, memory_mib, image, words, &[])
    }

    fn boot_with(
        &self,
        machine: &'static str,
        memory_mib: u32,
        image: &std::path::Path,
        words: &str,
        more: &[&str],
    ) -> Running {
        self.guest(machine, memory_mib, words).arg(more).boot(image)
    }

    fn guest(&self, machine: &'static str, memory_mib: u32, words: &str) -> Guest {
        let mut guest = Guest::new(machine, words);
        guest.memory_mib = memory_mib;
        let serial = format!("{},max_ports=1", guest.device("virtio-serial"));
        let ram = format!(
            "memory-backend-file,id=ram,mem-path={},size={memory_mib}M,share=on",
            self.ram.0.display()
        );
        let socket = format!("socket,id=gpu,path={}", self.socket.0.display());
        guest = guest.arg(&["-object", &ram, "-machine", "memory-backend=ram", "-chardev", &socket]);
        guest.arg(&["-device", &serial, "-device", "virtconsole,chardev=gpu"])
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It may have ended with its guest.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies in place, launches and results, on either bus; with RAM on both sides of the hole too. The broker ends with its
/// guest and everything is given back.
#[test]
fn the_way_to_the_device_and_back() {
    let Some(setup) = setup() else { return };
    for (machine, memory_mib) in [("q35", 256), ("microvm", 256), ("q35", 4096)] {
        let mut broker = Broker::start("way", memory_mib.into());
        let mut running = broker.boot(machine, memory_mib, &setup.image, "selftest=gpu");
        assert_eq!(running.end(), DONE, "{machine}:\n{}", running.text());
        assert!(running.text().contains("gpu \"emulator\": 0 wrong of "), "{machine}:\n{}", running.text());
        assert!(broker.child.wait().unwrap().success());
        let metrics = std::fs::read_to_string(&broker.metrics.0).unwrap();
        for line in [
            "runik_gpu_host_launches_total 100",
            "runik_gpu_host_failures_total 0",
            "runik_gpu_host_allocated_bytes 0",
        ] {
            assert!(metrics.lines().any(|is| is == line), "no {line:?}:\n{metrics}");
        }
        assert!(!broker.socket.0.exists(), "the socket is gone with the broker");
    }
}

/// Greedy tokens of a guest on the broker's emulator are those of the engine on the emulator itself.
#[test]
fn tokens_are_the_hosted_engines() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let words = "prompt=\"The quick\" predict=4 ctx=64 device=gpu exit";
    // On Hopper prompts go through kernels of their own.
    for (device, sm) in [("emu", 80), ("emu:90", 90)] {
        let mut broker = Broker::of("tokens", 256, device);
        let mut running =
            broker.boot_with("q35", 256, &setup.image, words, &["-initrd", model.to_str().unwrap()]);
        assert_eq!(running.end(), DONE, "{device}: {}", running.text());
        assert!(broker.child.wait().unwrap().success());
        let expected = hosted_on(&model, "The quick", 4, 64, |model| {
            let device = Arc::new(Emulator::new(Options { sm, ..Options::default() }));
            Box::new(Cuda::new(device, Arc::new(Serial), model.weights().clone()))
        });
        assert_eq!(running.tokens(), expected, "{device}: {}", running.text());
    }
}

/// A broker that dies: the guest says so within the patience of its session, and ends.
#[test]
fn a_dead_broker_is_noticed() {
    let Some(setup) = setup() else { return };
    let mut broker = Broker::start("dead", 256);
    // Stopped, so that the greeting waits.
    let id = broker.child.id().to_string();
    assert!(Command::new("kill").args(["-STOP", &id]).status().unwrap().success());
    let mut running = broker.boot("microvm", 256, &setup.image, "selftest=gpu");
    running.wait_for("virtio Console");
    broker.child.kill().unwrap();
    assert_eq!(running.end(), FAILED, "{}", running.text());
    assert!(
        running.text().contains("error: no GPU driver: the broker has been silent for"),
        "{}",
        running.text()
    );
}

/// The way to the GPU is lost while the guest serves: its clients are told, and it goes on.
#[test]
fn clients_are_told_of_a_lost_broker() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let mut broker = Broker::start("lost", 256);
    let (guest, address) = broker.guest("q35", 256, "ctx=64 device=gpu").module(&model).network();
    let mut running = guest.boot(&setup.image);
    running.wait_until_it_serves();
    let mut client = Client::connect(&address);
    let body =
        serde_json::json!({ "prompt": "The quick", "max_tokens": 2, "temperature": 0, "ignore_eos": true });
    let answer = client.post("/v1/completions", &body);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 2, "{}", answer.body);
    broker.child.kill().unwrap();
    let answer = client.post("/v1/completions", &body);
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("broker"), "{}", answer.body);
    assert_eq!(client.get("/health").status, 200);
}
